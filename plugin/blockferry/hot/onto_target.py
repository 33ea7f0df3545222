"""The plugin for a restore onto a device or file: it opens the target and its map, or takes them up again."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from pathlib import Path

from blockferry.errors import NotNowError, UsageError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import CacheOptions, hookimpl
from blockferry.hot import attachment
from blockferry.hot.attachment import Attachment
from blockferry.hot.cache import RestoreCache, TargetCache
from blockferry.hot.source import Source
from blockferry.hot.state import StateMap
from blockferry.hot.target import HotTarget, bears, open_target


@hookimpl
def blockferry_restore_cache(
    source: Source, options: CacheOptions
) -> contextlib.AbstractContextManager[RestoreCache] | None:
    """Return the cache of a restore onto a target."""
    return _cache(source, options) if options.target else None


@contextlib.contextmanager
def _cache(source: Source, options: CacheOptions) -> Iterator[RestoreCache]:
    known = attachment.load(options.name)
    wanted = _wanted(source, options)
    if known and known.target != wanted.target and bears(wanted.target, known.mark):
        known = dataclasses.replace(known, target=wanted.target)  # it has another name since a reboot
    if known and (known.snapshot, known.target) != (wanted.snapshot, wanted.target):
        raise UsageError(
            f"{options.name}: is a restore of snapshot {known.snapshot} onto {known.target} already",
            remedy=f"Give this one another --name, or forget that one: blockferry detach --forget {options.name}",
        )
    _refuse_half_restored(wanted)
    directory = attachment.make_directory(options.name)
    with contextlib.ExitStack() as held:
        target = held.enter_context(
            open_target(
                options.target,
                source.size,
                directory / "head",
                mark=(known or wanted).mark,
                resume=known is not None,
                finished=known is not None and known.finished,
                force=options.force,
            )
        )
        if known:
            target.blank = False  # what was written and never synced may be there
            state = StateMap.load(directory / "map", source.size, known.about())
            known.save()
        else:
            known, state = _begin(wanted, directory, source, target)
        cache = TargetCache(source, target, state, known, zeros_are_content=options.zeros_are_content)
        held.callback(cache.close)
        yield cache


def _refuse_half_restored(wanted: Attachment) -> None:
    """Raise NotNowError if another restore onto the target has begun: what its map says would not be true any more."""
    for other in attachment.load_all():
        if other.target == wanted.target and other.name != wanted.name and not other.finished:
            raise NotNowError(
                f"{wanted.target}: in use: {other.name} is a restore of snapshot {other.snapshot} onto it",
                remedy=f"Go on with that one, or forget it: blockferry detach --forget {other.name}",
            )


def _wanted(source: Source, options: CacheOptions) -> Attachment:
    return Attachment(
        name=options.name,
        repository=options.repository,
        snapshot=options.snapshot,
        target=options.target,
        size=source.size,
        block_size=options.block_size,
        total=0,
        mark=secrets.token_hex(16),
    )


def _begin(wanted: Attachment, directory: Path, source: Source, target: HotTarget) -> tuple[Attachment, StateMap]:
    """Make the map, and last the record: what broke off before it is there has not begun."""
    absent = source.used if target.blank else ExtentSet.whole(source.size)
    state = StateMap.create(directory / "map", source.size, wanted.about(), absent)
    missing = (state.present.count - state.present.total) * state.block
    begun = dataclasses.replace(wanted, total=missing)
    # A device that bears a mark is in nobody's way if we die before the record is there; a file that has its size is.
    if target.is_device:
        target.begin()
    begun.save()
    if not target.is_device:
        target.begin()
    return begun, state
