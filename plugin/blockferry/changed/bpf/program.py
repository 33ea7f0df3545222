"""One generation: a bpftrace process that notes every write to a device from one moment to another.

Its map has a key a bio, not a block: the first of the 64 KiB chunks that it touches and how many more, in one number
(first << 17 | more), so that discarding 4 GiB, the most that a bio holds, takes one. The keys are limited; a full map
is an error that bpftrace reports.

When it has really attached is not what it prints first ("Attaching 2 probes...", and a BEGIN probe too, come before).
But `bpftrace -c COMMAND` starts the command when all probes are attached, and ends, detaches and prints its maps when
the command does. The command here is `cat`: what we write to it comes back as soon as everything is attached, it ends
when we close its input, and also when we die, however we do.

The answer counts only if nothing at all is odd. bpftrace must have run to the moment that we chose, and must have ended
with status 0; must have said nothing but the map: no lost event, no failed helper (`-k`), nothing on stderr once
attached; the map has to parse, and hold fewer keys than it could; and the kernel must have run its programs for every
event (`recursion_misses` of /proc/PID/fdinfo, bpf(2)). An empty map is not printed.

The map is written to without being read: newer versions report a key that is not there as a failed helper.
Tried with bpftrace 0.17 (Debian 12) and 0.23 (Debian 13).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np

from blockferry.changed.bpf.device import Device, losses_are_counted
from blockferry.errors import BlockferryError, ToolMissingError
from blockferry.extents import ExtentSet
from blockferry.programs import find

CHUNK = 64 << 10
"""What one bit of knowledge is worth, in bytes."""
_MORE_BITS = 17
_SECTOR = 512
_PROGRAMS = 2
_TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_FEWEST_KEYS, _MOST_KEYS = 1 << 12, 1 << 20
"""The map takes about 80 bytes of kernel memory a key, all of it at the start."""
_PATIENCE = 120.0
"""Seconds for bpftrace to attach, or to print a full map: on a busy machine each takes a few."""
_ECHO = b"attached\n"


class LostError(Exception):
    """A generation does not know all that was written; the message says why, in a phrase."""


class Generation:
    """A bpftrace process that notes the writes to a device, from when it is made until `end`."""

    def __init__(self, number: int, device: Device) -> None:
        """Return when everything is attached: each bio that is queued from now on is noted.

        Raise BlockferryError if bpftrace does not come so far.
        """
        self.number = number
        self.device = device
        self.keys = _keys(device)
        self._output = os.memfd_create("blockferry-bpf-output")
        self._errors = os.memfd_create("blockferry-bpf-errors")
        self._process = self._start()
        try:
            self._said_before = self._wait_for_echo()
        except BaseException:
            self.abandon()
            raise

    def trouble(self) -> str:
        """Return why this generation cannot be trusted, "" as long as it can. Cheap."""
        misses = self._misses()
        if self._process.poll() is not None or len(misses) < _PROGRAMS:
            return "bpftrace ended before it was told to"
        if any(misses):
            return f"the kernel withheld {sum(misses)} events from bpftrace"
        try:
            self._map()
        except LostError as reason:
            return str(reason)
        return ""

    def end(self) -> ExtentSet:
        """Detach, and return all that was written, as offsets into the device; raise LostError if that is not known.

        More may be in it than was written, never less.
        """
        try:
            reason = self.trouble()
            if reason:
                raise LostError(reason)
            self._stdin.close()
            if self._process.wait(_PATIENCE):
                raise LostError(f"bpftrace ended with status {self._process.returncode}")
            return self._extents(self._map())
        except subprocess.TimeoutExpired:
            raise LostError(f"bpftrace did not end within {_PATIENCE:.0f} seconds") from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End without an answer. May be called again."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.wait()
        for descriptor in (self._output, self._errors):
            if descriptor >= 0:
                os.close(descriptor)
        self._output = self._errors = -1

    def _start(self) -> subprocess.Popen[bytes]:
        keys = str(self.keys)
        process = subprocess.Popen(
            [
                *(find("bpftrace"), "-k", "-f", "json"),
                *("-c", find("cat"), "-e", source(self.device)),
            ],
            # The limit's name before bpftrace 0.21, and since.
            env=os.environ | {"LC_ALL": "C", "BPFTRACE_MAP_KEYS_MAX": keys, "BPFTRACE_MAX_MAP_KEYS": keys},
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._errors,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us
        )
        assert process.stdin  # noqa: S101  # asked for
        self._stdin = process.stdin
        return process

    def _wait_for_echo(self) -> int:
        """Wait until everything is attached; return the size of what was said on stderr until then."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(_ECHO)
            self._stdin.flush()
        deadline = time.monotonic() + _PATIENCE
        while _ECHO not in _content(self._output):
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = _content(self._errors).decode("utf-8", "replace").strip().splitlines()
                raise BlockferryError(
                    f"bpftrace does not attach: {lines[-1] if lines else 'it says nothing'}",
                    remedy="It takes root, Linux with CONFIG_BPF_EVENTS, and a tracefs on /sys/kernel/tracing.",
                )
            time.sleep(0.01)
        return len(_content(self._errors))

    def _misses(self) -> list[int]:
        """Return, for each of the process's programs, how many events it did not get."""
        found = []
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{self._process.pid}/fdinfo").iterdir():
                lines = entry.read_text().splitlines()
                found += [int(line.split()[1]) for line in lines if line.startswith("recursion_misses:")]
        return found

    def _map(self) -> dict[str, int]:
        """Return the map, empty if it was not printed; raise LostError if anything else was said."""
        errors = _content(self._errors)[self._said_before :].decode("utf-8", "replace").strip()
        if errors:
            raise LostError(f"bpftrace says: {errors.splitlines()[0]}")
        written: dict[str, int] = {}
        for line in _content(self._output).replace(_ECHO, b"", 1).splitlines():
            if not line:
                continue
            try:
                said = json.loads(line)
                if said["type"] == "map":
                    written = said["data"]["@written"]
                elif said["type"] != "attached_probes":
                    raise LostError(_in_words(said))
            except (ValueError, KeyError, TypeError):
                raise LostError("what bpftrace printed makes no sense") from None
        return written

    def _extents(self, written: dict[str, int]) -> ExtentSet:
        """Return the extents of a map's keys, as offsets into the device."""
        if len(written) >= self.keys:
            raise LostError(f"more was written than bpftrace could note ({self.keys} places)")
        start, end = self.device.start, self.device.start + self.device.size
        try:
            keys = np.fromiter(map(int, written), np.int64, len(written))
            first, more = keys >> _MORE_BITS, keys & ((1 << _MORE_BITS) - 1)
            on_disk = ExtentSet.from_ranges(first * CHUNK, (first + more + 1) * CHUNK)
        except (ValueError, OverflowError):
            raise LostError("what bpftrace printed makes no sense") from None
        return on_disk.clip(start, end).shift(-start)


def source(device: Device) -> str:
    """Return the program that notes each bio that is not a read and touches a device."""
    # The disk's number as the kernel writes it: 12 bits of major, 20 of minor (linux/kdev_t.h).
    disk = device.disk[0] << 20 | device.disk[1]
    begin, end = device.start // _SECTOR, (device.start + device.size) // _SECTOR
    # Other devices' requests go first: that is all that they cost.
    wanted = (
        f"args->dev == {disk} && args->nr_sector > 0 && "
        f'args->sector < {end} && args->sector + args->nr_sector > {begin} && strncmp(args->rwbs, "R", 1) != 0'
    )
    shift = (CHUNK // _SECTOR).bit_length() - 1
    note = (
        f"$first = args->sector >> {shift}; $last = (args->sector + args->nr_sector - 1) >> {shift}; "
        f"@written[($first << {_MORE_BITS}) | ($last - $first)] = 1;"
    )
    return f"tracepoint:block:block_bio_queue, tracepoint:block:block_bio_remap /{wanted}/ {{ {note} }}"


def require() -> None:
    """Raise BlockferryError unless bpftrace and what it takes of the system are there."""
    find("bpftrace")
    if not any((Path(place) / "events" / "block").exists() for place in _TRACEFS):
        raise ToolMissingError(
            "bpftrace needs the kernel's tracefs, which is not mounted",
            remedy="mount -t tracefs tracefs /sys/kernel/tracing",
        )
    if not losses_are_counted():
        raise BlockferryError(
            "this kernel may withhold events from bpftrace without counting them: it is older than 6.7 and preempts "
            "itself, or does not say that it does not",
            remedy="Boot with preempt=voluntary, and mount debugfs on /sys/kernel/debug.",
        )


def _keys(device: Device) -> int:
    """Return how many places a map has room for: a few for each chunk of a small device."""
    limit = os.environ.get("BLOCKFERRY_BPF_KEYS")
    return int(limit) if limit else min(max(4 * device.size // CHUNK, _FEWEST_KEYS), _MOST_KEYS)


def _in_words(said: dict[str, object]) -> str:
    """Return what bpftrace reports instead of a map."""
    if said.get("helper") == "map_update_elem" and said.get("retcode") == -7:  # E2BIG
        return "more was written than bpftrace could note"
    return f"bpftrace says: {json.dumps(said)[:200]}"


def _content(descriptor: int) -> bytes:
    """Return all of an open file, without moving the offset that a writer shares with us."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
