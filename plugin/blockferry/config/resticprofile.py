"""resticprofile's profiles: a repository with its credentials, as its plain files have them.

Read here are YAML, TOML and JSON with profiles that inherit from each other (resticprofile's documentation, "Profiles",
"Inheritance"; config/profile.go). What takes resticprofile itself to understand (templates, HCL, mixins, includes) is
refused: its own `show` masks the secrets, so there is nobody to ask.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from blockferry.config.dotenv import read_environment
from blockferry.config.foreign import ForeignTool
from blockferry.config.reference import ForeignReference
from blockferry.config.restic_job import open_restic
from blockferry.config.section import nearest
from blockferry.config.yaml_file import YamlFile
from blockferry.errors import UsageError

if TYPE_CHECKING:
    from blockferry.repository import Repository

_WAY_OUT = "Write what the profile has of its repository into a plain file of its own, and name that."
_NO_PROFILES = frozenset({"global", "groups", "includes", "version", "$schema", "mixins", "profiles"})
_PATHS = {
    "repository-file": "RESTIC_REPOSITORY_FILE",
    "password-file": "RESTIC_PASSWORD_FILE",
    "cache-dir": "RESTIC_CACHE_DIR",
    "cacert": "RESTIC_CACERT",
    "tls-client-cert": "RESTIC_TLS_CLIENT_CERT",
}
"""Keys that name a file, relative to the profiles' own directory, and restic's variables for them."""
_TEXTS = {
    "password-command": "RESTIC_PASSWORD_COMMAND",
    "key-hint": "RESTIC_KEY_HINT",
    "compression": "RESTIC_COMPRESSION",
    "pack-size": "RESTIC_PACK_SIZE",
}
_OPTIONS = (
    "limit-download",
    "limit-upload",
    "retry-lock",
    "http-user-agent",
    "stuck-request-timeout",
    "option",
    "no-cache",
    "cleanup-cache",
    "insecure-tls",
    "insecure-no-password",
)
"""Keys that are restic's global options, and have no variable."""
_INSTEAD = {
    "repository": ("RESTIC_REPOSITORY_FILE",),
    "repository-file": ("RESTIC_REPOSITORY",),
    "password-file": ("RESTIC_PASSWORD", "RESTIC_PASSWORD_COMMAND"),
    "password-command": ("RESTIC_PASSWORD", "RESTIC_PASSWORD_FILE"),
}
"""Which variables a key overrides beside its own, as restic's options do."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A profile with all that it inherits; keys are in lower case, as resticprofile reads them."""

    file: str
    name: str
    values: Mapping[str, Any] = dataclasses.field(repr=False)
    settings: Mapping[str, Any] = dataclasses.field(repr=False)
    """The section `global`."""
    version: str = "1"
    """Of the file's format."""

    def environment(self, around: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that restic is to find: those around it, of the profile's files, and of the profile."""
        found = dict(around)
        for file in texts(self.values.get("env-file")):
            found |= read_environment(self.path(file, found))
        folded = {name.upper(): name for name in around}
        for name, value in (self.values.get("env") or {}).items():
            found[folded.get(name.upper(), name.upper())] = text(value)
        # An option goes before a variable.
        for key, instead in _INSTEAD.items():
            if self.values.get(key):
                found = {name: value for name, value in found.items() if name not in instead}
        said = {name: self.path(text(self.values[key]), found) for key, name in _PATHS.items() if self.values.get(key)}
        said |= {name: text(self.values[key]) for key, name in _TEXTS.items() if self.values.get(key)}
        if self.values.get("repository"):
            said["RESTIC_REPOSITORY"] = home(expand(text(self.values["repository"]), around))
        if self.settings.get("restic-binary"):
            said["BLOCKFERRY_RESTIC"] = expand(text(self.settings["restic-binary"]), around)
        if options := options_of({key: self.values[key] for key in _OPTIONS if key in self.values}):
            said["BLOCKFERRY_RESTIC_OPTIONS"] = shlex.join(options)
        return found | said

    def path(self, name: str, known: Mapping[str, str]) -> str:
        """Return a path as resticprofile takes it: relative to the directory of its file."""
        return os.path.join(os.path.dirname(self.file), home(expand(name, known)))  # noqa: PTH120


class Resticprofile(ForeignTool):
    """The plugin."""

    tool = "resticprofile"

    def open(self, named: ForeignReference, environment: Mapping[str, str]) -> Repository:
        """Open the repository of a profile; without a name, of the one that is called default."""
        return open_restic(self.manager, named, profile_of(named).environment(environment))


def plugin(manager: pluggy.PluginManager) -> Resticprofile:
    """Return the plugin, which needs the manager that it is registered with."""
    return Resticprofile(manager)


def profile_of(named: ForeignReference) -> Profile:
    """Return a profile with all that it inherits; raise UsageError if it is not there, or is not plain."""
    top = _read(named.file)
    version = text(top.get("version") or "1").split(".")[0]
    if top.get("includes"):
        raise _not_plain(named.file, "includes", "it includes other files")
    profiles = top.get("profiles") or {} if version != "1" else top
    known = [name for name in profiles if name not in _NO_PROFILES or version != "1"]
    values: Any = {}
    name, seen = (named.name or "default").lower(), set[str]()
    chain = []
    while name:
        if name not in known or name in seen:
            what = "inherits from itself" if name in seen else "no such profile"
            raise UsageError(f"{named.file}: {name}: {what}", remedy=nearest(name, known))
        seen.add(name)
        chain.append(profiles[name] or {})
        name = text(chain[-1].get("inherit") or "").lower()
    for each in reversed(chain):
        _check_plain(named.file, each)
        values = _merged(values, each, by_index=version == "1")
    return Profile(named.file, named.name or "default", values, top.get("global") or {}, version)


def _read(file: str) -> dict[str, Any]:
    """Return what a file says, with keys in lower case."""
    try:
        content = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{file}: cannot be read: {reason}", remedy="Check the name of the file.") from None
    if (at := content.find("{{")) >= 0:
        line = content.count("\n", 0, at) + 1
        raise UsageError(f"{file}:{line}: holds templates ({{{{ }}}}), which take resticprofile", remedy=_WAY_OUT)
    kind = Path(file).suffix.lower()
    if kind == ".hcl":
        raise _not_plain(file, "", "it is HCL")
    try:
        if kind in {".toml", ".conf"}:
            read: Any = tomllib.loads(content)
        else:
            read = json.loads(content) if kind == ".json" else YamlFile(file).mapping
    except ValueError as error:
        raise UsageError(f"{file}: cannot be read: {error}", remedy="Run `resticprofile show` to find out.") from None
    if not isinstance(read, Mapping):
        raise UsageError(f"{file}: is no file of profiles", remedy="Name resticprofile's own.")
    return _lower(read)  # type: ignore[no-any-return]  # a mapping stays one


def _lower(value: Any) -> Any:
    """Return what was read as plain mappings, lists and values, with keys in lower case."""
    if isinstance(value, Mapping):
        return {str(key).lower(): _lower(each) for key, each in value.items()}
    return [_lower(each) for each in value] if isinstance(value, list) else value


def _check_plain(file: str, profile: object) -> None:
    """Raise UsageError if a profile has what takes resticprofile to understand."""
    if not isinstance(profile, Mapping):
        raise UsageError(f"{file}: a profile is no mapping", remedy="Run `resticprofile show` to find out.")
    for key, value in profile.items():
        if key == "use":
            raise _not_plain(file, key, "it uses mixins")
        if re.search(r"__(append|prepend)\Z|\A\.\.\.|\.\.\.\Z", key):
            raise _not_plain(file, key, "it adds to lists that it inherits")
        if isinstance(value, Mapping):
            _check_plain(file, value)


def _not_plain(file: str, key: str, why: str) -> UsageError:
    where = f"{file}: {key}" if key else file
    return UsageError(f"{where}: {why}, which takes resticprofile", remedy=_WAY_OUT)


def _merged(below: Any, above: Any, *, by_index: bool) -> Any:
    """Return what a profile makes of what it inherits; format 1 puts lists together item by item."""
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        both = {key: _merged(below[key], above[key], by_index=by_index) for key in below.keys() & above.keys()}
        return {**below, **above, **both}
    if by_index and isinstance(below, list) and isinstance(above, list):
        return [*above, *below[len(above) :]]
    return above


def options_of(values: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line; false, null and "" are none."""
    words: list[str] = []
    for key, value in values.items():
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                words.append(f"--{key}")
            elif each is not False and each is not None and each != "":
                words.append(f"--{key}={text(each)}")
    return words


def texts(value: object) -> list[str]:
    """Return a list of texts, of which there may also be just one, or none."""
    return [text(each) for each in (value if isinstance(value, list) else [value]) if each]


def text(value: object) -> str:
    """Return a value as Go's libraries make a text of it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def expand(value: str, known: Mapping[str, str]) -> str:
    """Return a text with the variables in it expanded, unknown ones to nothing; `$$` is a dollar sign."""
    return re.sub(
        r"\$(\$|\{(\w+)\}|(\w+))", lambda found: "$" if found[1] == "$" else known.get(found[2] or found[3], ""), value
    )


def home(path: str) -> str:
    """Return a path with `~` expanded."""
    return os.path.expanduser(path)  # noqa: PTH111  # of any user
