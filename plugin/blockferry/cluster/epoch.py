"""A backup of a shared volume as all hosts see it: one epoch, whose words lie in the log index.

    volumes/NAME/epoch             what is to be done: written by the coordinator alone, and gone soon after it is
    volumes/NAME/hosts/HOST/       a guard, renewed by it as long as it lives
    volumes/NAME/asked             written before the guards are looked for: whether the index takes anything
    volumes/NAME/devices/HOST/     a device whose users go on without the guard if that is killed; gone when it is
    epochs/EPOCH/reports/HOST      how far a host is
    epochs/EPOCH/claims            which chunks are logged, and by which host
    epochs/EPOCH/logs/HOST         the queue by which its log is handed over

    stage      every host                                                         reports
    prepare    writes out what is dirty, and has its guard in its users' path     ready
    freeze     freezes its filesystems, or writes out again if they cannot be     quiet
    hold       lets no write pass any more, and makes the volume durable          held
    open       this is the instant: lets writes pass again, and logs them         logging
    seal       stops logging, hands its log over; its guard leaves the path       sealed

A stage begins when all hosts reported the one before. A host that cannot go on reports `failed`, and its users' writes
pass; so they do when the coordinator is not heard of any more. An epoch counts only if every host reported `sealed`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

HEARD_OF = 10.0
"""Seconds after which whoever did not renew its word is taken for dead."""
RENEWED = 2.0
"""Seconds after which a word is renewed."""
HELD = 5.0
"""Seconds for which a host's users may have to wait, at most, between `freeze` and `open`."""
CHUNK = 64 << 10
"""Bytes that are logged at a time."""


class Stage(enum.StrEnum):
    """What the coordinator has every host do."""

    PREPARE = "prepare"
    FREEZE = "freeze"
    HOLD = "hold"
    OPEN = "open"
    SEAL = "seal"


class Report(enum.StrEnum):
    """How far a host is."""

    READY = "ready"
    QUIET = "quiet"
    HELD = "held"
    LOGGING = "logging"
    SEALED = "sealed"
    FAILED = "failed"


REPORTED = {
    Stage.PREPARE: Report.READY,
    Stage.FREEZE: Report.QUIET,
    Stage.HOLD: Report.HELD,
    Stage.OPEN: Report.LOGGING,
    Stage.SEAL: Report.SEALED,
}
"""What every host reports when it has done what a stage asks for."""


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What the coordinator says."""

    id: str
    stage: Stage
    hosts: tuple[str, ...]
    """Those that were there when it began."""
    chunk: int = CHUNK

    def as_json(self) -> dict[str, Any]:
        """Return it as it lies in the index."""
        return {"id": self.id, "stage": self.stage.value, "hosts": list(self.hosts), "chunk": self.chunk}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Epoch:
        """Return what an index holds; raise ValueError, KeyError or TypeError if it is no epoch."""
        return cls(str(said["id"]), Stage(said["stage"]), tuple(map(str, said["hosts"])), int(said["chunk"]))


def epoch_key(volume: str) -> str:
    """Return where the coordinator's word is."""
    return f"volumes/{volume}/epoch"


def asked_key(volume: str) -> str:
    """Return what is written before the guards of a volume are looked for."""
    return f"volumes/{volume}/asked"


def host_key(volume: str, host: str = "") -> str:
    """Return where a guard's word is; without a host, where all of them are."""
    return f"volumes/{volume}/hosts/" + (f"{host}/" if host else "")


def device_key(volume: str, host: str = "") -> str:
    """Return where it is said that a host's users may go on without a guard; without a host, where all of them are."""
    return f"volumes/{volume}/devices/" + (f"{host}/" if host else "")


def report_key(epoch: str, host: str = "") -> str:
    """Return where a host's report is; without a host, where all of them are."""
    return f"epochs/{epoch}/reports/{host}"


def log_queue(epoch: str, host: str) -> str:
    """Return the queue by which a host hands its log over."""
    return f"epochs/{epoch}/logs/{host}"


def claims_of(epoch: str) -> str:
    """Return the name under which chunks are claimed."""
    return f"epochs/{epoch}/claims"


def below(epoch: str) -> str:
    """Return the beginning of all that an epoch leaves in an index."""
    return f"epochs/{epoch}/"
