"""autorestic's configuration: its backends with their credentials, and what stands there of ours.

As autorestic has it (internal/backend.go, internal/config.go): names of backends are read in lower case, variables of
`.autorestic.env` beside the file do not override those that are set, and AUTORESTIC_<BACKEND>_... override all. What is
ours stands below `extras`, the one place where autorestic takes anything:

extras:
  blockferry:
    volumes: {vm: {path: /srv/vm.img}}
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pluggy

from blockferry.config.configuration import Configuration
from blockferry.config.dotenv import read_environment
from blockferry.config.foreign import ForeignTool
from blockferry.config.own import KEYS
from blockferry.config.reference import ForeignReference
from blockferry.config.restic_job import open_restic
from blockferry.config.resticprofile import expand, home, options_of, text
from blockferry.config.section import nearest
from blockferry.config.yaml_file import YamlFile
from blockferry.errors import UsageError
from blockferry.hookspecs import hookimpl

if TYPE_CHECKING:
    from blockferry.repository import Repository

_OURS = ("extras", "blockferry")
_SHAPE = frozenset({"backends", "locations"})
_NAMED_BY_TYPE = ("b2", "azure", "gs", "s3", "sftp", "rclone")


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend as its file has it."""

    file: YamlFile = dataclasses.field(repr=False)
    name: str
    values: Mapping[str, Any] = dataclasses.field(repr=False)

    def environment(self, around: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that autorestic would have restic find, and the options that it would give."""
        around = self.around(around)
        found = {name: value for name, value in around.items() if name != "RESTIC_REPOSITORY_FILE"}
        if self.values.get("key"):
            found["RESTIC_PASSWORD"] = text(self.values["key"])
        found["RESTIC_REPOSITORY"] = self._location(around)
        found |= {str(name).upper(): text(value) for name, value in (self.values.get("env") or {}).items()}
        prefix = f"AUTORESTIC_{re.sub('[^A-Za-z0-9]', '_', self.name.upper())}_"
        found |= {name.removeprefix(prefix): value for name, value in around.items() if name.startswith(prefix)}
        options = [*self.options_of(self.file.mapping.get("global"), "all")]
        options += self.options_of(self.values.get("options"), "all")
        return found | ({"BLOCKFERRY_RESTIC_OPTIONS": shlex.join(options)} if options else {})

    def around(self, around: Mapping[str, str]) -> dict[str, str]:
        """Return the variables around autorestic, with those of the file beside its own, which override none."""
        beside = Path(self.file.path).with_name(".autorestic.env")
        return {**(read_environment(str(beside)) if beside.is_file() else {}), **around}

    @staticmethod
    def options_of(options: object, *kinds: str) -> list[str]:
        """Return the words of the options that are given for kinds of commands."""
        given = options if isinstance(options, Mapping) else {}
        return [word for kind in kinds for word in options_of({str(k): v for k, v in (given.get(kind) or {}).items()})]

    def _location(self, around: Mapping[str, str]) -> str:
        """Return where the repository is, in restic's words."""
        kind, path = text(self.values.get("type") or ""), text(self.values.get("path") or "")
        where = self.file.place("backends", self.name)
        if not path:
            raise UsageError(f"{where}: has no path", remedy="Say below it where the repository is: path: ...")
        if kind == "local":
            return os.path.abspath(os.path.join(os.path.dirname(self.file.path), home(path)))  # noqa: PTH100, PTH120
        if kind == "rest":
            return f"rest:{self._with_user(expand(path, around))}"
        if kind in _NAMED_BY_TYPE:
            return f"{kind}:{path}"
        raise UsageError(
            f"{self.file.place('backends', self.name, 'type')}: {kind!r} is no type of backends",
            remedy=nearest(kind, ("local", "rest", *_NAMED_BY_TYPE)),
        )

    def _with_user(self, url: str) -> str:
        rest = self.values.get("rest") or {}
        user, password = text(rest.get("user") or ""), text(rest.get("password") or "")
        if not user:
            return url
        who = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        scheme, separator, place = url.partition("://")
        return f"{scheme}{separator}{who}@{place.rpartition('@')[2] if '@' in place.split('/')[0] else place}"


class Autorestic(ForeignTool):
    """The plugin."""

    tool = "autorestic"

    @hookimpl
    def blockferry_load_config(self, path: str) -> Configuration | None:
        """Read a file that has the shape of autorestic's."""
        file = YamlFile(path)
        if not file.shape & _SHAPE or file.shape & set(KEYS):
            return None
        extras = file.mapping.get(_OURS[0])
        ours = extras.get(_OURS[1]) if isinstance(extras, Mapping) else None
        return self.understand(file, _OURS, ours, len(_backends(file)))

    def open(self, named: ForeignReference, environment: Mapping[str, str]) -> Repository:
        """Open the repository of a backend; without a name, of the only one."""
        return open_restic(self.manager, named, backend_of(named).environment(environment))


def plugin(manager: pluggy.PluginManager) -> Autorestic:
    """Return the plugin, which needs the manager that it is registered with."""
    return Autorestic(manager)


def backend_of(named: ForeignReference) -> Backend:
    """Return the backend that a reference means; raise UsageError if there is not exactly one."""
    file = YamlFile(named.file)
    backends = _backends(file)
    found = [name for name in backends if name.lower() == named.name.lower() or not named.name]
    if len(found) != 1:
        if named.name:
            raise UsageError(f"{named}: no backend of that name", remedy=nearest(named.name, backends.keys()))
        what = "has several backends" if backends else "has no backends"
        raise UsageError(f"{named}: {what}", remedy=f"Say which: {named}#NAME, of {', '.join(backends)}.")
    values = backends[found[0]]
    if not isinstance(values, Mapping):
        raise UsageError(f"{file.place('backends', found[0])}: is no mapping", remedy="Write type: and path: below it.")
    return Backend(file, found[0], values)


def _backends(file: YamlFile) -> dict[str, Any]:
    backends = file.mapping.get("backends")
    return {str(name): values for name, values in backends.items()} if isinstance(backends, Mapping) else {}
