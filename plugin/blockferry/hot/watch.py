"""Watching for armed devices where no systemd does: udev says that something happened, and then we look ourselves.

What udev says is only a reason to look; which devices are here is asked anew each time. So nothing is missed while a
restore begins, and a device that is here already needs no event.

A device that was refused is left alone until it looks different: looking at it makes udev send an event in turn.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

from blockferry import service
from blockferry.errors import BlockferryError, ToolMissingError
from blockferry.hot import arming, client, udev
from blockferry.hot.arming import Armed, Match
from blockferry.hot.showing_up import begin, may_pass
from blockferry.programs import package_of

log = logging.getLogger(__name__)

_LOOK_AT_REFUSED_AGAIN = 45.0
"""Seconds until a device that was refused is looked at again although it looks the same."""
_LOOK_AGAIN = 30.0
"""Seconds until what may pass, such as a repository that does not answer, is tried again."""
_RECEIVE_BUFFER = 8 << 20
_TELLING = ("DISKSEQ", "ID_FS_TYPE", "ID_PART_TABLE_TYPE")
"""What changes when another medium is in a device, or something else on it (the kernel counts media by DISKSEQ)."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """What was tried, and from when on the same may be tried again (time.monotonic())."""

    look: tuple[Armed, list[str], bool]
    """What is armed, the devices, and whether a restore broke off."""
    again_at: float


class Watch:
    """Begins restores; remembers what it has begun, or what was refused, as long as that looks the same."""

    def __init__(self) -> None:
        self._tried: dict[Match, Tried] = {}

    def look(self) -> list[dict[str, Any]]:
        """Begin the restore onto each armed device that is here, unless it is under way; return what began."""
        try:
            everything = arming.load_all()
        except BlockferryError as error:
            log.error("%s", error)
            return []
        return [said for armed in everything for said in self._look_at(armed)]

    def _look_at(self, armed: Armed) -> Iterator[dict[str, Any]]:
        devices = udev.devices_of(armed.match)
        if not devices:
            self._tried.pop(armed.match, None)
            return
        seen = sorted(str((each.device_node, *map(each.properties.get, _TELLING))) for each in devices)
        state = _state(armed.name)
        look = (dataclasses.replace(armed, refused=""), seen, state == "broken off")
        tried = self._tried.get(armed.match)
        if state == "under way" or (tried and tried.look == look and time.monotonic() < tried.again_at):
            return
        try:
            yield begin(armed)
        except BlockferryError as error:
            if error.message != armed.refused:
                log.error("%s: %s", armed.match, error)
            # udev may not have known all of a device yet when it was refused: what is there now can look the same.
            pause = _LOOK_AGAIN if may_pass(error) else _LOOK_AT_REFUSED_AGAIN
            self._tried[armed.match] = Tried(look, time.monotonic() + pause)
        else:
            # Who detaches it does not want it begun again at once; if it breaks off, that is another look.
            self._tried[armed.match] = Tried((*look[:2], False), math.inf)


def watch(*, once: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield what began, at first for the devices that are here, then for as long as devices show up, unless `once`.

    Raise ToolMissingError if nobody says what shows up.
    """
    import pyudev  # noqa: PLC0415  # few commands need it

    context = udev.context()
    if not udev.udevd_runs():
        raise ToolMissingError(
            "udevd does not run: nobody says which devices show up",
            remedy=f"Install the package {package_of('udevadm')}, and start udevd.",
        )
    monitor = pyudev.Monitor.from_netlink(context, "udev")
    monitor.filter_by("block")
    monitor.set_receive_buffer_size(_RECEIVE_BUFFER)
    monitor.start()
    service.notify_systemd("READY=1")
    watching = Watch()
    yield watching.look()
    while not once:
        if monitor.poll(_LOOK_AGAIN):
            while monitor.poll(0):
                pass
        yield watching.look()


def _state(name: str) -> str:
    """Return whether a restore is `under way`, `broken off`, or neither: ""."""
    try:
        client.ask(name, {"do": "status"})
    except service.NobodyThereError as error:
        return "broken off" if error.broken_off else ""
    except service.DeclinedError:
        pass
    return "under way"
