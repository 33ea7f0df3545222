"""Which plugins there are: the built-in ones, in the order in which they are asked, and everybody else's."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable, Mapping

import pluggy

from blockferry import hookspecs
from blockferry.cluster.index import LogIndex
from blockferry.errors import UsageError
from blockferry.repository import Repository

log = logging.getLogger(__name__)

BUILTIN = (
    # A plugin registered later is asked earlier: each list reads from the last resort to the first choice.
    "blockferry.config.own",
    "blockferry.metrics.plugin",
    "blockferry.config.borgmatic",
    "blockferry.config.resticprofile",
    "blockferry.config.autorestic",
    "blockferry.directory",
    "blockferry.freeze.live",
    "blockferry.freeze.fsfreeze",
    "blockferry.freeze.reflink",
    "blockferry.freeze.lvm",
    "blockferry.freeze.offline",
    "blockferry.qemu.freeze",
    "blockferry.qemu.tracker",
    "blockferry.changed.era",
    "blockferry.changed.dmsnapshot",
    "blockferry.changed.thin",
    "blockferry.changed.bpf.tracker",
    "blockferry.changed.reflink",
    "blockferry.used.sparse",
    "blockferry.used.partitions",
    "blockferry.used.xfs.reader",
    "blockferry.used.ext4.reader",
    "blockferry.used.fsmap",
    "blockferry.groups.on_disk",
    "blockferry.hot.buffer",
    "blockferry.hot.onto_target",
    "blockferry.hot.arming",
    "blockferry.cluster.sqlite_index",
    "blockferry.cluster.redis_index",
)


def plugin_manager() -> pluggy.PluginManager:
    """Return a manager with the built-in plugins and those that entry points of the group `blockferry` name.

    Raise UsageError, naming the plugin, if one cannot be loaded or implements a hook that does not exist.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in BUILTIN:
        module = importlib.import_module(name)
        # One that asks the hooks itself has to know the manager: its module makes it.
        make = getattr(module, "plugin", None)
        manager.register(make(manager) if make else module, name)
    try:
        manager.load_setuptools_entrypoints(hookspecs.PROJECT)
        manager.check_pending()
    except (pluggy.PluginValidationError, ImportError) as error:
        raise UsageError(
            f"a plugin cannot be loaded: {error}", remedy="Upgrade or uninstall the package that brings it."
        ) from error
    return manager


def repository_named(
    manager: pluggy.PluginManager, reference: str, environment: Mapping[str, str] = os.environ
) -> Repository:
    """Return the repository that a reference names; raise UsageError if no plugin knows such references."""
    repository: Repository | None = manager.hook.blockferry_open_repository(
        reference=reference, environment=environment
    )
    if repository is None:
        raise UsageError(
            f"{mask(reference)}: not a repository reference",
            remedy="Write borg:PATH-OR-URL, restic:PATH-OR-URL, or borgmatic:FILE#LABEL and the like: borg:/srv/borg.",
        )
    return repository


def log_index_named(manager: pluggy.PluginManager, reference: str) -> LogIndex:
    """Return the log index that a reference names, opened; raise UsageError if no plugin knows such references."""
    index: LogIndex | None = manager.hook.blockferry_log_index(reference=reference)
    if index is None:
        _, user, rest = reference.rpartition("@")
        raise UsageError(
            f"{'***@' if user else ''}{rest}: not a log index",
            remedy="Write redis://HOST:PORT/DB, rediss://HOST:PORT/DB (TLS), redis+unix:///PATH or sqlite:///PATH.",
        )
    return index


def tell(hook: Callable[..., object], **facts: object) -> None:
    """Call a hook that only tells, where nothing may come of it: a plugin that fails is a warning."""
    try:
        hook(**facts)
    except Exception as error:
        log.warning("a plugin failed: %s", error)


def without_credentials(reference: str) -> str:
    """Return a reference without user names and passwords, those of URLs and of USER@HOST:PATH alike."""
    scheme, separator, rest = reference.partition("://")
    if not separator:
        return re.sub(r"^((?:\w+:)*)[^/:@]+@(?=[^/]+:)", r"\1", reference)
    place, slash, path = rest.partition("/")
    # A password that should have been written as %2F and %40 may hold both.
    if "@" in path and re.fullmatch(r"[^@]*:(?!\d*$).*", place):
        place, slash, path = rest.rpartition("@")[2], "", ""
    return f"{scheme}{separator}{place.rpartition('@')[2]}{slash}{path}"


def mask(reference: str) -> str:
    """Return a reference without the user name and password that a URL in it may carry."""
    scheme, separator, rest = reference.partition("://")
    host = rest.split("/", 1)[0]
    return f"{scheme}{separator}***@{rest.split('@', 1)[1]}" if separator and "@" in host else reference
