"""Which plugins there are: the built-in ones, in the order in which they are asked, and everybody else's."""

from __future__ import annotations

import importlib

import pluggy

from blockferry import hookspecs
from blockferry.errors import UsageError

BUILTIN = (
    # A plugin registered later is asked earlier: each list reads from the last resort to the first choice.
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
