"""What a backup leaves behind: an image item, and beside it a record that describes it.

The record (`blockferry.json`) and the block map (`blockferry.map`) lie in the same archive as the image; everything
else that blockferry knows can be made again from them. `docs/format.md` is the page from which a stranger can read
them. A repository is untrusted input: `Record.from_json` checks what it takes.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import secrets
from collections.abc import Sequence
from typing import Any

from blockferry.blockmap import Kind
from blockferry.errors import DamagedSnapshotError, SnapshotNotFoundError
from blockferry.sets import refuse_share, without_shares

RECORD_NAME = "blockferry.json"
MAP_NAME = "blockferry.map"
WHOLE = "whole volume"
SPARSE = "sparse file"
"""The methods of listing blocks that know nothing of what they mean, but for the holes of an image file."""
SCHEMA = 1


class Tier(enum.StrEnum):
    """The step of the ladder that a backup took."""

    CHANGED = "changed"
    USED = "used"
    WHOLE = "whole"


class Stability(enum.StrEnum):
    """How still the volume held while it was read."""

    OFFLINE = "offline"
    """Nobody could write: not mounted, or mounted read-only."""
    FROZEN = "frozen"
    """The filesystem was made consistent and held: an LVM snapshot, fsfreeze."""
    CRASH_CONSISTENT = "crash-consistent"
    """One instant, as after a power cut: a reflink copy of an image in use."""
    LIVE = "live"
    """Nothing held: blocks may be of different instants."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The self-description of a snapshot. Sizes in bytes, times in UTC (ISO 8601)."""

    snapshot: str
    created: str
    host: str
    volume: str
    """The volume's name, which groups its snapshots."""
    path: str
    size: int
    block_size: int
    filesystem: str
    identity: dict[str, str]
    tier: Tier
    tier_reason: str
    method: str
    """Who listed the blocks in use."""
    stability: Stability
    freeze: str
    """What made the volume hold still."""
    unit: int
    """The chunk (borg) or segment (restic) size: the grid on which the image is stored."""
    bytes_used: int
    bytes_changed: int
    base: str | None = None
    """The snapshot from which on the changes were listed."""
    part: bool = False
    """Only some of it is stored here, such as what changed since the base: the rest is to be had by tracing back."""
    tracker: str = ""
    """Who listed the changes, if anybody did."""
    checkpoints: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By tracker: what it needs to list the changes since this snapshot."""
    state_of: str | None = None
    """Of a merged snapshot: the one whose state of the volume this is, and whose the checkpoints are."""
    group: dict[str, Any] | None = None
    """Of a group of files: what it is, and in `table` where in the image the table of its files is."""
    share_of: str | None = None
    """Of a share of a volume: the set that it is of, which is stored later."""
    shares: list[str] | None = None
    """Of a set: the shares that its own image, the entire log, lies over."""
    blockferry: str = ""
    """The version that wrote it."""
    schema: int = SCHEMA

    @property
    def closing(self) -> bool:
        """Whether this is what closes a set: the entire log, stored when all shares were."""
        return self.shares is not None

    @property
    def stored_kinds(self) -> tuple[Kind, ...]:
        """The kinds of runs in the block map of which the image itself has the bytes."""
        return (Kind.DATA,) if self.part else (Kind.DATA, Kind.SAME)

    @property
    def zeros_are_content(self) -> bool:
        """Whether zeros in the block map are what the volume held, not merely space that was free."""
        return zeros_are_content(self.method)

    def to_json(self) -> bytes:
        """Return the stored form."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, stored: bytes, where: str) -> Record:
        """Return the record; raise DamagedSnapshotError, naming `where`, if it is not one that we can read."""
        try:
            fields = json.loads(stored)
            schema = fields["schema"]
            if schema != SCHEMA:
                raise DamagedSnapshotError(
                    f"{where}: written in record schema {schema!r}; this blockferry reads {SCHEMA}",
                    remedy="Use the blockferry that wrote it, or a newer one; docs/format.md has the layout.",
                )
            known = {field.name: field for field in dataclasses.fields(cls)}
            values = {name: fields[name] for name in known if name in fields}
            values["tier"], values["stability"] = Tier(values["tier"]), Stability(values["stability"])
            record = cls(**values)
            numbers = (record.size, record.block_size, record.unit, record.bytes_used, record.bytes_changed)
            if not all(isinstance(number, int) and 0 <= number < 1 << 62 for number in numbers) or not record.unit:
                raise ValueError("a size is not a number of bytes")
            if not all(isinstance(text, str) for text in (record.snapshot, record.volume, record.path, record.created)):
                raise ValueError("a name is not a text")
            _check_relations(record)
            if not isinstance(record.checkpoints, dict) or not isinstance(record.identity, dict):
                raise ValueError("an identity or a checkpoint is not what it should be")
            if not isinstance(record.group, dict | None):
                raise ValueError("a group is not what it should be")
            return record
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise DamagedSnapshotError(
                f"{where}: the record cannot be read: {error}",
                remedy="Check the repository with its own tool (borg check, restic check).",
            ) from None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One snapshot as a repository lists it, without reading its record."""

    id: str
    archive: str
    """What the repository's own tool calls it: an archive's name, or restic's snapshot id."""
    volume: str
    created: str
    size: int
    tier: str
    base: str | None = None
    part: bool = False
    state_of: str | None = None
    share_of: str | None = None
    closing: bool = False

    @classmethod
    def of(cls, record: Record, archive: str) -> Snapshot:
        """Return the snapshot that a record describes, stored under that name."""
        return cls(
            id=record.snapshot,
            archive=archive,
            volume=record.volume,
            created=record.created,
            size=record.size,
            tier=record.tier.value,
            base=record.base,
            part=record.part,
            state_of=record.state_of,
            share_of=record.share_of,
            closing=record.closing,
        )


@dataclasses.dataclass(frozen=True)
class Stored:
    """What `Repository.store` did: the snapshot, and the bytes by which the repository grew."""

    snapshot: Snapshot
    bytes_stored: int


def zeros_are_content(method: str) -> bool:
    """Tell whether who lists the blocks in use knows nothing of free space: then what is not listed is zero."""
    return method in (WHOLE, SPARSE)


def find(snapshots: Sequence[Snapshot], name: str, *, shares: bool = False) -> Snapshot:
    """Return the snapshot of that id, of which it is a unique prefix, or the newest for `latest`.

    Raise SnapshotNotFoundError if there is none, or more than one; UsageError if it is a share, but for `shares`.
    """
    states = without_shares(snapshots)
    if name == "latest" and states:
        # A merged snapshot is as old as the one whose state it is.
        return max(states, key=lambda snapshot: (snapshot.created, snapshot.state_of is not None))
    matching = _beginning_with(states, name) or _beginning_with(snapshots, name)
    if len(matching) == 1:
        if not shares:
            refuse_share(matching[0])
        return matching[0]
    remedy = "`blockferry snapshots` lists what there is."
    if matching:
        raise SnapshotNotFoundError(f"{name}: {len(matching)} snapshots begin with it", remedy=remedy)
    if not states:
        raise SnapshotNotFoundError(
            "the repository holds no snapshot of blockferry's", remedy="Make one: blockferry backup VOLUME --repo REF"
        )
    raise SnapshotNotFoundError(f"{name}: no such snapshot", remedy=remedy)


def _beginning_with(snapshots: Sequence[Snapshot], name: str) -> list[Snapshot]:
    return [each for each in snapshots if name and each.id.startswith(name)]


def _check_relations(record: Record) -> None:
    """Raise ValueError unless it can be told what a part lies on: a base, a log's shares, or a share's neighbours."""
    if not isinstance(record.base, str | None) or not isinstance(record.share_of, str | None):
        raise ValueError("a base or a set is not an id")
    shares = record.shares
    if not isinstance(shares, list | None) or not all(isinstance(each, str) for each in shares or []):
        raise ValueError("the shares are not a list of ids")
    if len(set(shares or [])) < len(shares or []):
        raise ValueError("a share is there twice")
    in_a_set = (record.share_of is not None) + (shares is not None)
    if in_a_set > 1 or (in_a_set and (record.base or not record.part)):
        raise ValueError("what is in a set is nothing else")
    if record.part and not record.base and not in_a_set:
        raise ValueError("a part has no base")


def new_snapshot_id() -> str:
    """Return an id for a new snapshot: 12 hexadecimal digits that no other has."""
    return secrets.token_hex(6)


def now() -> str:
    """Return the time in UTC, to the microsecond, as records carry it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
