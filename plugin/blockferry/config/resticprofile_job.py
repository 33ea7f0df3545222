"""A backup of a volume as `resticprofile backup` makes its own (wrapper.go, `runProfile`; "Run commands before/after").

run-before of the profile, of backup; check-before; retention before-backup; the backup; retention after-backup;
check-after; run-after of backup, of the profile
whatever fails ends that, then: run-after-fail of backup, of the profile
in any case: run-finally of backup, of the profile
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pluggy

from blockferry.config.reference import ForeignReference
from blockferry.config.restic_job import (
    CommandError,
    Commands,
    attempt,
    check_apart,
    forget,
    open_restic,
    outcome,
    restic,
)
from blockferry.config.resticprofile import Profile, home, options_of, profile_of, texts
from blockferry.errors import BlockferryError, NotNowError
from blockferry.hookspecs import Job
from blockferry.repository import Repository

log = logging.getLogger(__name__)

_SENDERS = ("send-before", "send-after", "send-after-fail", "send-finally")


def run_job(
    manager: pluggy.PluginManager,
    named: ForeignReference,
    environment: Mapping[str, str],
    volume: str,
    store: Callable[[Repository], object],
) -> Job:
    """Run a profile's backup, with `store` in the place of restic's."""
    profile = profile_of(named)
    backup, retention = _section(profile.values, "backup"), _section(profile.values, "retention")
    found = profile.environment(environment)
    tagged = backup.get("tag")
    tags = [tag for each in texts(tagged if tagged is not True else None) for tag in each.split(",")]
    found |= {"BLOCKFERRY_RESTIC_TAGS": shlex.join(tags)} if tags else {}
    for name in ("retention", "forget"):
        check_apart(f"{named}: {name}", _implied(profile, name))
    for key in set(_SENDERS) & backup.keys():
        log.warning("%s: backup.%s: is resticprofile's own, and left out", named, key)
    rules = options_of({key: value for key, value in retention.items() if key.startswith("keep-") or key == "prune"})
    with (
        _locked(profile, found),
        contextlib.closing(open_restic(manager, named, found)) as repository,
    ):
        made: list[object] = []
        steps: list[Callable[[], None]] = []
        if backup.get("check-before"):
            steps.append(lambda: restic(found, "check"))
        if retention.get("before-backup"):
            steps.append(lambda: forget(found, repository, volume, rules))
        steps.append(lambda: made.append(store(repository)))
        if _after_backup(profile, retention):
            steps.append(lambda: forget(found, repository, volume, rules))
        if backup.get("check-after"):
            steps.append(lambda: restic(found, "check"))
        failure = _between(profile, named, found, steps)
    return outcome(made, failure)


def _between(
    profile: Profile, named: ForeignReference, environment: Mapping[str, str], steps: list[Callable[[], None]]
) -> BlockferryError | None:
    """Run steps between a profile's commands; return what the first failure was of."""
    sections = (profile.values, _section(profile.values, "backup"))
    shell = (texts(profile.settings.get("shell")) or ["auto"])[0]
    commands = Commands(
        where=str(named),
        interpreter=shell if shell != "auto" else "bash" if Path("/bin/bash").exists() else "sh",
        directory=home(str(profile.values.get("base-dir") or "")),
        environment={**environment, "PROFILE_NAME": profile.name, "PROFILE_COMMAND": "backup"},
    )

    def command(kind: str, section: Mapping[str, Any], more: Mapping[str, str] | None = None) -> Callable[[], None]:
        return lambda: commands.run(kind, texts(section.get(kind)), more)

    before = [command("run-before", each) for each in sections]
    after = [command("run-after", each) for each in reversed(sections)]
    failure: BlockferryError | None = BlockferryError("the backup was interrupted")
    try:
        failure = attempt([*before, *steps, *after])
    finally:
        more = _told(failure)
        if failure:
            _note(attempt([command("run-after-fail", each, more) for each in reversed(sections)]))
        for section in reversed(sections):
            for line in texts(section.get("run-finally")):
                _note(attempt([lambda line=line: commands.run("run-finally", [line], more)]))  # type: ignore[misc]
    return failure


def _told(failure: BlockferryError | None) -> dict[str, str]:
    """Return the variables that tell commands of a failure."""
    if failure is None:
        return {}
    status = failure.status if isinstance(failure, CommandError) else failure.exit_code
    message = failure.message
    return {"ERROR": message, "ERROR_MESSAGE": message, "ERROR_EXIT_CODE": str(status), "ERROR_STDERR": message}


def _note(error: BlockferryError | None) -> None:
    if error:
        log.warning("%s", error.message)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _implied(profile: Profile, name: str) -> Mapping[str, Any]:
    """Return a section with what resticprofile adds: retention is of the paths of the backup, if not said otherwise."""
    section = _section(profile.values, name)
    implied = {"path": True} if name == "retention" and "backup" in profile.values else {}
    return {**implied, **section}


def _after_backup(profile: Profile, retention: Mapping[str, Any]) -> bool:
    """Tell whether retention follows the backup: format 2 takes that for granted where there are rules."""
    if profile.version != "1" and retention.get("after-backup") is None and retention.get("before-backup") is None:
        return any(key.startswith("keep-") for key in retention)
    return bool(retention.get("after-backup"))


@contextlib.contextmanager
def _locked(profile: Profile, environment: Mapping[str, str]) -> Iterator[None]:
    """Hold the profile's lock file (lock/lock.go); raise NotNowError if somebody else does."""
    if not profile.values.get("lock"):
        yield
        return
    path = profile.path(str(profile.values["lock"]), environment)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"blockferry\n{os.getpid()}")
    except FileExistsError:
        raise NotNowError(
            f"{path}: the profile is locked: another backup runs", remedy="Wait for it; remove the file if it is dead."
        ) from None
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
