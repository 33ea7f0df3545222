"""A backup of a volume as autorestic makes those of a location (internal/location.go, `Backup`).

    prevalidate; before; the backup; after; then success or, after a failure of any of those, failure; after success
    forget, if the location says so

The location is the one that is called like the volume, and goes to the backend; without one there is nothing to run.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import pluggy

from blockferry.config.autorestic import Backend, backend_of
from blockferry.config.reference import ForeignReference
from blockferry.config.restic_job import Commands, attempt, check_apart, forget, open_restic, outcome
from blockferry.config.resticprofile import home, texts
from blockferry.hookspecs import Job
from blockferry.repository import Repository


def run_job(
    manager: pluggy.PluginManager,
    named: ForeignReference,
    environment: Mapping[str, str],
    volume: str,
    store: Callable[[Repository], object],
) -> Job:
    """Run a location's backup, with `store` in the place of restic's."""
    backend = backend_of(named)
    name, location = _location(backend, volume)
    around = backend.around(environment)
    found = backend.environment(environment)
    if name:
        given = [*backend.options_of(location.get("options"), "all", "backup")]
        tags = [f"ar:location:{name}", *_tags(given)]
        found["BLOCKFERRY_RESTIC_TAGS"] = shlex.join(tags)
        forgetting = (location.get("options") or {}).get("forget") or {}
        check_apart(f"{named}: {name}", {key: value for key, value in forgetting.items() if key != "tag"})
    rules = _rules(backend, location)
    hooks = location.get("hooks") or {}
    home_of_file = os.path.dirname(backend.file.path)  # noqa: PTH120
    commands = Commands(
        where=f"{named}: {name}",
        interpreter="bash",
        directory=os.path.join(home_of_file, home(str(hooks.get("dir") or ""))),
        environment={**around, "AUTORESTIC_LOCATION": name},
    )
    made: list[object] = []
    told: dict[str, str] = {}
    with contextlib.closing(open_restic(manager, named, found)) as repository:

        def hook(kind: str) -> Callable[[], None]:
            return lambda: commands.run(kind, texts(hooks.get(kind)), told)

        def make() -> None:
            made.append(store(repository))
            snapshot = getattr(getattr(made[-1], "snapshot", None), "archive", "")
            for key, value in (("SNAPSHOT_ID", snapshot), ("EXIT_CODE", "0")):
                told.update({f"AUTORESTIC_{key}_0": value, f"AUTORESTIC_{key}_{backend.name.upper()}": value})

        failure = attempt([hook("prevalidate"), hook("before"), make, hook("after")])
        last = attempt([hook("failure" if failure else "success")])
        if not failure and not last and str(location.get("forget") or "no").lower() not in {"no", "false"}:
            last = attempt([lambda: forget(found, repository, volume, rules)])
    return outcome(made, failure or last)


def _location(backend: Backend, volume: str) -> tuple[str, Mapping[str, Any]]:
    """Return the location that is called like a volume, with its name; nothing if there is none for the backend."""
    locations = backend.file.mapping.get("locations")
    for name, values in (locations if isinstance(locations, Mapping) else {}).items():
        goes_to = {each.lower() for each in texts(values.get("to"))} if isinstance(values, Mapping) else set()
        if str(name).lower() == volume.lower() and backend.name.lower() in goes_to:
            return str(name), values
    return "", {}


def _rules(backend: Backend, location: Mapping[str, Any]) -> list[str]:
    """Return the rules of `restic forget`, from all over the file, as words."""
    words = backend.options_of(backend.file.mapping.get("global"), "forget")
    words += backend.options_of(backend.values.get("options"), "forget")
    words += backend.options_of(location.get("options"), "forget")
    prune = ["--prune"] if str(location.get("forget")).lower() == "prune" else []
    return [word for word in words if word.startswith("--keep-")] + prune


def _tags(options: list[str]) -> list[str]:
    """Return the tags that are among options."""
    return [tag for word in options if word.startswith("--tag=") for tag in word.removeprefix("--tag=").split(",")]
