"""borgmatic's configuration: its repositories with every credential resolved, and what stands there of ours.

borgmatic itself reads its file, with includes, overrides, environment and coercion (`borgmatic config show --json`),
and resolves its credentials: it believes to run borg (`standing_in.py`). What is ours stands below `constants`, the one
place where borgmatic takes anything:

constants:
  blockferry:
    volumes: {vm: {path: /srv/vm.img}}
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from blockferry.config import standing_in
from blockferry.config.configuration import Configuration
from blockferry.config.foreign import ForeignTool
from blockferry.config.own import KEYS
from blockferry.config.reference import ForeignReference
from blockferry.config.section import QUOTE, ConfigurationError, nearest
from blockferry.config.yaml_file import YamlFile
from blockferry.errors import BlockferryError, UsageError
from blockferry.hookspecs import hookimpl
from blockferry.manager import mask, repository_named

if TYPE_CHECKING:
    from blockferry.repository import Repository

_OURS = ("constants", "blockferry")
_SHAPE = frozenset({"repositories", "source_directories", "location", "constants", "<<"})
"""A key of these at the top: a file of borgmatic's. `<<` includes another, which may have all of them."""
_SHOWN: dict[tuple[str, int], dict[str, Any]] = {}
_COERCED = (
    "borgmatic makes numbers of texts that look like some wherever a file has constants:, in quotes or not. Put "
    "something before it: serial:0012345 for a serial number, ./7 for a path."
)


class Borgmatic(ForeignTool):
    """The plugin."""

    tool = "borgmatic"

    @hookimpl
    def blockferry_load_config(self, path: str) -> Configuration | None:
        """Read a file that has the shape of borgmatic's."""
        file = YamlFile(path)
        if not file.shape & _SHAPE or file.shape & set(KEYS):
            return None
        shown = show(path)
        ours = (shown.get(_OURS[0]) or {}).get(_OURS[1])
        try:
            return self.understand(file, _OURS, ours, len(repositories_of(shown)))
        except ConfigurationError as error:
            for each in (error, *error.others):
                each.remedy = _COERCED if each.remedy == QUOTE else each.remedy
            raise

    def open(self, named: ForeignReference, environment: Mapping[str, str]) -> Repository:
        """Open a repository of a file of borgmatic's, by its label or path, else the only one."""
        location, told = resolve(named, environment)
        return open_told(self.manager, named, location, told)


def plugin(manager: pluggy.PluginManager) -> Borgmatic:
    """Return the plugin, which needs the manager that it is registered with."""
    return Borgmatic(manager)


def show(path: str, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return a file of borgmatic's as borgmatic understands it, secrets among it; UsageError if it does not.

    borgmatic takes a second for that: it is asked once, unless the file changes.
    """
    key = (os.path.abspath(path), os.stat(path).st_mtime_ns)  # noqa: PTH100
    if key not in _SHOWN:
        _SHOWN[key] = _show(path, environment)
    return _SHOWN[key]


def _show(path: str, environment: Mapping[str, str]) -> dict[str, Any]:
    # --dry-run: when borgmatic has shown the file it goes on to run those hooks that belong to every action.
    words = [standing_in.command(environment), "--config", path, "--dry-run", "config", "show", "--json"]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=dict(environment)
    )
    with contextlib.suppress(ValueError):
        # Its status says whether it went well after that, where it tries borg.
        (shown,), _end = json.JSONDecoder().raw_decode(done.stdout)
        if isinstance(shown, dict):
            return shown
    raise UsageError(
        f"{path}: borgmatic refuses it: {reason(done.stderr.splitlines())}",
        remedy=f"Run `borgmatic --config {path} config validate`.",
    )


def repositories_of(shown: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the repositories that borgmatic shows."""
    return list(shown.get("repositories") or [])


def choose(named: ForeignReference, shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return the repository that a reference means, by label or path; UsageError if there is not exactly one."""
    found = repositories_of(shown)
    if named.name:
        found = [each for each in found if named.name in {each.get("label"), each["path"]}]
    if len(found) != 1:
        known = [str(each.get("label") or mask(each["path"])) for each in repositories_of(shown)]
        what = "no repository of that label or path" if named.name else "has several repositories"
        remedy = nearest(named.name, known) if named.name else f"Say which: {named}#LABEL, of {', '.join(known)}."
        raise UsageError(f"{named}: {what}", remedy=remedy)
    if "local_path" in found[0]:
        # What stands with the repository goes before --local-path.
        raise UsageError(
            f"{named}: local_path stands below the repository, where nothing can take its place",
            remedy="Write local_path: at the top of borgmatic's file.",
        )
    return found[0]


def resolve(named: ForeignReference, environment: Mapping[str, str]) -> tuple[str, standing_in.Told]:
    """Return where borg would find a repository, and what borgmatic would tell it.

    Nothing is run but what gives the credentials: borgmatic leaves out its hooks when it is only to look (--dry-run).
    """
    shown = show(named.file, environment)
    repository = choose(named, shown)
    borg = borg_of(shown, environment)
    found: list[tuple[str, standing_in.Told]] = []

    def answer(call: standing_in.Call, take: standing_in.Take) -> standing_in.Run | standing_in.Done:
        if call.words[:1] != ["info"]:
            return standing_in.Run([borg, *call.words])
        found.append((located(repository, call), settings(shown, repository, call, take(), borg)))
        return standing_in.Done()

    words = ["--config", named.file, "--dry-run", "repo-info", "--repository", chosen(repository)]
    status, lines = standing_in.run(words, environment, answer)
    if not found:
        raise BlockferryError(
            f"{named}: borgmatic ended with status {status}: {reason(lines)}",
            remedy=f"Run `borgmatic --config {named.file} repo-info`.",
        )
    return found[0]


def open_told(
    manager: pluggy.PluginManager, named: ForeignReference, location: str, told: standing_in.Told
) -> Repository:
    """Open a repository with what borgmatic tells of it; the passphrase goes through a pipe, as with borgmatic."""
    environment, passphrase = dict(told.environment), told.passphrase
    if passphrase is None and "BORG_PASSPHRASE" in environment:
        passphrase = environment.pop("BORG_PASSPHRASE")
        environment.pop("BORG_PASSCOMMAND", None)  # which would go before the pipe
    with _piped(passphrase) as pipe:
        repository = repository_named(manager, f"borg:{location}", environment | pipe)
    repository.named = str(named)
    return repository


def settings(
    shown: Mapping[str, Any],
    repository: Mapping[str, Any],
    call: standing_in.Call,
    told: standing_in.Told,
    borg: str,
) -> standing_in.Told:
    """Return what borg would find, and beside it what borgmatic would say in words, as variables of ours."""
    merged = {**shown, **repository}
    said = {
        "BLOCKFERRY_BORG": borg,
        # Not as usual: `VOLUME-...` may be what borgmatic prunes, if the volume is called like the host.
        "BLOCKFERRY_BORG_ARCHIVE_NAME": "{volume}+{now}-{snapshot}",
        "BLOCKFERRY_BORG_COMPRESSION": str(merged.get("compression") or ""),
        "BLOCKFERRY_BORG_UMASK": _after(call.words, "--umask"),
        "BLOCKFERRY_LOCK_WAIT": _after(call.words, "--lock-wait"),
        "BORG_REMOTE_PATH": _after(call.words, "--remote-path"),
        "BLOCKFERRY_BORG_CHECKPOINT": str(merged.get("checkpoint_interval") or ""),
    }
    added = {name: value for name, value in said.items() if value}
    return standing_in.Told({**told.environment, **added}, told.passphrase)


def borg_of(shown: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Return the borg that borgmatic would run."""
    return str(shown.get("local_path") or environment.get("BLOCKFERRY_BORG") or "borg")


def chosen(repository: Mapping[str, Any]) -> str:
    """Return what `--repository` is to be for borgmatic to take this one."""
    return str(repository.get("label") or repository["path"])


def located(repository: Mapping[str, Any], call: standing_in.Call) -> str:
    """Return where a repository is, from any directory."""
    path = os.path.expanduser(str(repository["path"]))  # noqa: PTH111  # as borgmatic does
    return path if ":" in path else os.path.join(call.directory, path)


def _after(words: Sequence[str], option: str) -> str:
    """Return the word after an option, "" if it is not there."""
    return next((after for word, after in itertools.pairwise(words) if word == option), "")


@contextlib.contextmanager
def _piped(passphrase: str | None) -> Iterator[dict[str, str]]:
    """Put a passphrase into a pipe for the length of the context; give the variable that names it."""
    if passphrase is None:
        yield {}
        return
    reading, writing = os.pipe()
    try:
        with os.fdopen(writing, "w", encoding="utf-8") as filled:
            filled.write(passphrase)
        yield {"BORG_PASSPHRASE_FD": str(reading)}
    finally:
        os.close(reading)


def reason(lines: Sequence[str]) -> str:
    """Return what borgmatic complained about, on one line, without its colours."""
    said = [line for line in map(standing_in.plain, lines) if line]
    telling = [line for line in said if not line.startswith(("Need some help", "summary:"))]
    return "; ".join(telling[-3:]) or "it said nothing"
