"""A backup of a volume as a run of borgmatic: it believes to create an archive of its own.

`borgmatic create prune compact check` runs with its hooks, monitoring, retries and credentials, as its file says. Where
it calls borg we stand (`standing_in.py`): `borg create` is the backup of the volume, `borg prune` is confined to the
volume's own series, everything else is borg's.

Series: an archive is called VOLUME+FORMAT, where FORMAT is borgmatic's `archive_name_format`. No volume's name has a +:
`sh:VOLUME+...*` means no other volume's archives, and borgmatic's pattern for its own, which begins with FORMAT, none
of ours. Where it is so wide that it would mean ours all the same, nothing is backed up.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pluggy

from blockferry.config import borgmatic, standing_in
from blockferry.config.reference import ForeignReference
from blockferry.config.restic_job import lies_on_others
from blockferry.errors import NotNowError, PartialError, RepositoryError, UsageError
from blockferry.hookspecs import Job
from blockferry.repository import Repository

log = logging.getLogger(__name__)

_FORMAT = "{hostname}-{now:%Y-%m-%dT%H:%M:%S.%f}"
"""borgmatic's own (borgmatic/borg/flags.py)."""
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_CHANGING = re.compile(r"\{(now|utcnow|pid)([:%\w.-]*)\}")
"""What borgmatic takes for any text where it looks for archives of a format (likewise)."""


def run_job(
    manager: pluggy.PluginManager,
    named: ForeignReference,
    environment: Mapping[str, str],
    volume: str,
    store: Callable[[Repository], object],
) -> Job:
    """Run borgmatic, with `store` in the place of `borg create`."""
    shown = borgmatic.show(named.file, environment)
    repository = borgmatic.choose(named, shown)
    merged = {**shown, **repository}
    borg = borgmatic.borg_of(shown, environment)
    series = f"{re.sub('[^A-Za-z0-9._@-]+', '-', volume)}+"
    form = str(merged.get("archive_name_format") or _FORMAT)
    actions = _actions(named, merged)
    if "prune" in actions:
        _check_apart(named, merged, form, series)
    results: list[object] = []
    parts: list[str] = []

    def answer(call: standing_in.Call, take: standing_in.Take) -> standing_in.Run | standing_in.Done:
        words = list(call.words)
        if words[:1] == ["prune"] and parts:
            return standing_in.Done(said="nothing is pruned: there are parts, which lie on earlier snapshots")
        if words[:1] == ["prune"]:
            return standing_in.Run([borg, *confined(words, series, form)])
        if words[:1] != ["create"]:
            return standing_in.Run([borg, *words])
        if "--dry-run" in words:
            return standing_in.Done(said=_planned(words))
        told = borgmatic.settings(shown, repository, call, take(), borg)
        told = standing_in.Told({**told.environment, "BLOCKFERRY_BORG_ARCHIVE_NAME": series + form}, told.passphrase)
        location = borgmatic.located(repository, call)
        with contextlib.closing(borgmatic.open_told(manager, named, location, told)) as opened:
            results.append(store(opened))
            parts.extend([volume] if lies_on_others(opened, volume) else [])
        return standing_in.Done()

    summing_up: list[str] = []

    def say(line: str) -> None:
        """Pass on what borgmatic says, but not a second time what it says again at its end."""
        summing_up.extend([line] if line == "summary:" else [])
        if not summing_up:
            log.warning("borgmatic: %s", line)

    words = ["--config", named.file, *_without_snapshots(named, merged), *actions]
    words += ["--repository", borgmatic.chosen(repository)]
    status, lines = standing_in.run(words, environment, answer, said=say)
    return _outcome(named, results, status, lines)


def _outcome(named: ForeignReference, results: Sequence[object], status: int, lines: Sequence[str]) -> Job:
    """Return what a run came to; raise if there was no backup."""
    said = borgmatic.reason(lines)
    if results:
        if status == 0:
            return Job(results[-1])
        return Job(
            results[-1],
            PartialError(
                f"{named}: the snapshot is stored, but borgmatic ended with status {status}: {said}",
                remedy=f"See what it says above; `borgmatic --config {named.file} prune compact check` does the rest.",
            ),
        )
    if status == 0:
        raise NotNowError(
            f"{named}: borgmatic made no backup: one of its commands ended with 75, not now",
            remedy="Look at commands: in its file; a later run may go well.",
        )
    raise RepositoryError(
        f"{named}: borgmatic ended with status {status} before the backup: {said}",
        remedy=f"Look at commands: in {named.file}, and run `borgmatic --config {named.file} repo-info`.",
    )


def _actions(named: ForeignReference, merged: Mapping[str, Any]) -> list[str]:
    """Return what borgmatic is to do: what it does by default, but for what its file skips or has no rules for."""
    skipped = set(merged.get("skip_actions") or [])
    if "create" in skipped:
        raise UsageError(
            f"{named}: skip_actions has create: no backups are made by this file", remedy="Name another file."
        )
    keeps = any(key.startswith("keep_") and key != "keep_exclude_tags" for key in merged)
    wanted = ["create", *(["prune"] if keeps else []), "compact", "check"]
    return [action for action in wanted if action not in skipped]


def _check_apart(named: ForeignReference, merged: Mapping[str, Any], form: str, series: str) -> None:
    """Raise UsageError if borgmatic, run by itself, would prune the archives of a series with its own."""
    prefix = merged.get("prefix")
    pattern = f"{prefix}*" if prefix else str(merged.get("match_archives") or _CHANGING.sub("*", form))
    if means(pattern, series + form):
        raise UsageError(
            f"{named}: borgmatic would prune the archives of volumes with its own: its pattern is {pattern}",
            remedy="In its file, begin archive_name_format with a text or {hostname}, or narrow match_archives.",
        )


def means(pattern: str, name: str) -> bool:
    """Tell whether a pattern may mean an archive of a name, both with placeholders in them."""
    style, _, rest = pattern.partition(":")
    if style == "re":
        wanted = rest
    else:
        glob = rest if style in {"sh", "id"} else pattern
        # No placeholder's value has a + in it.
        pieces = re.split(r"(\{[^{}]*\}|\*+|\?)", glob)
        kinds = {"*": ".*", "?": ".", "{": "[^+]*"}
        wanted = "".join(kinds[piece[0]] if piece[:1] in kinds else re.escape(piece) for piece in pieces if piece)
    try:
        return re.fullmatch(wanted, _PLACEHOLDER.sub("0", name)) is not None
    except re.error:
        return True


def confined(words: Sequence[str], series: str, form: str) -> list[str]:
    """Return the words of `borg prune`, which is to look at the archives of a series only."""
    options = ("--match-archives", "--glob-archives", "-a", "--prefix", "-P")
    kept: list[str] = []
    option = "--glob-archives"
    skip = False
    for word in words:
        name = word.split("=", 1)[0]
        if skip:
            skip = False
        elif name in options:
            option = name if name in options[:2] else option
            skip = "=" not in word
        else:
            kept.append(word)
    pattern = series + _CHANGING.sub("*", form)
    return [kept[0], option, f"sh:{pattern}" if option == "--match-archives" else pattern, *kept[1:]]


def _without_snapshots(named: ForeignReference, merged: Mapping[str, Any]) -> list[str]:
    """Return the options that keep borgmatic from making snapshots of filesystems; UsageError if it dumps databases."""
    if dumped := sorted(key for key in merged if key.endswith("_databases")):
        raise UsageError(
            f"{named}: has {dumped[0]}: borgmatic would dump them for each volume",
            remedy="Put the volumes into a file of their own, that includes what both have in common; or say --no-job.",
        )
    return [f"--no-{key}" for key in ("btrfs", "lvm", "zfs") if key in merged]


def _planned(words: Sequence[str]) -> str:
    """Return what `borg create --dry-run --list` is to print: something of each directory that borgmatic asks for."""
    try:
        file = words[words.index("--patterns-from") + 1]
        roots = [line[2:] for line in Path(file).read_text().splitlines() if line.startswith("R ")]
    except (ValueError, IndexError, OSError):
        return ""
    return "\n".join(f"- {root}/all" for root in roots)
