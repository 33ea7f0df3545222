"""Holding volumes still in tests, by the built-in ways alone: no repository's plugin is needed for that."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pluggy

from blockferry import hookspecs
from blockferry.freeze import hold_still
from blockferry.hookspecs import FreezeOptions, Frozen
from blockferry.manager import BUILTIN
from blockferry.volume import Volume


def hold(path: Path | str, options: FreezeOptions | None = None) -> AbstractContextManager[Frozen]:
    """Hold a volume still by the built-in ways, in their order."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in BUILTIN:
        if name.startswith(("blockferry.freeze.", "blockferry.qemu.freeze")):
            manager.register(importlib.import_module(name), name)
    return hold_still(manager, Volume.discover(path), options or FreezeOptions())


def make_image(path: Path, filesystem: str, size: int) -> Path:
    """Make a sparse image with a filesystem on it."""
    path.touch()
    os.truncate(path, size)
    subprocess.run([f"mkfs.{filesystem}", "-q", str(path)], check=True)
    return path


def keep_open(path: Path | str, mode: str = "r+b") -> subprocess.Popen[bytes]:
    """Start a process that has a file open; return when it has."""
    program = f"file = open({os.fspath(path)!r}, {mode!r}); print('open', flush=True); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"open\n"
    return process


def read(frozen: Frozen) -> bytes:
    """Return all bytes of a volume that holds still."""
    with frozen.volume.open() as disk:
        buffer = bytearray(disk.size)
        disk.read_into(0, memoryview(buffer))
        return bytes(buffer)
