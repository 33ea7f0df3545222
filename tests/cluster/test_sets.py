"""Sets: fuzzy shares with a log over them are the volume at the instant, for all that can be done with a snapshot."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockferry import chain as chains
from blockferry.backup import back_up
from blockferry.blockmap import BlockMap, Kind
from blockferry.chain import trace
from blockferry.checkpoints import Checkpoints
from blockferry.cluster.stored import close_set, store_share
from blockferry.difference import Choice
from blockferry.errors import DamagedSnapshotError, SnapshotNotFoundError, UsageError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import FreezeOptions
from blockferry.joined import JoinedRepository
from blockferry.manager import plugin_manager, repository_named
from blockferry.merge import apply_log, merge
from blockferry.repository import Repository
from blockferry.restore import restore
from blockferry.retention import to_remove
from blockferry.sets import incomplete, without_shares
from blockferry.shares import SharesLayer
from blockferry.snapshot import WHOLE, Record, Snapshot, find, new_snapshot_id
from commands_support import Depot, blockferry, new_depot
from sets_support import Bytes, MadeSet, SharedVolume, common_record, make_set, state_of
from simulation import BLOCK, Disk, MemoryRepository

MIB = 1 << 20
SIZE = 26 * MIB + 5 * 512
UNIT = 8 * BLOCK
SMALL = 10 * UNIT + 3 * BLOCK


class Quiet:
    """No progress to show."""

    @contextlib.contextmanager
    def task(self, _name, _total):
        yield lambda _count: None


def nothing(_count: int) -> None:
    """Where no progress is to be shown."""


def cut_at(size: int, *places: int) -> list[ExtentSet]:
    """Return the extents between places, and the ends of the volume."""
    edges = [0, *places, size]
    return [ExtentSet.from_ranges([one], [other]) for one, other in itertools.pairwise(edges)]


@contextlib.contextmanager
def opened(depot: Depot, patch: pytest.MonkeyPatch) -> Iterator[Repository]:
    for name, value in depot.env.items():
        patch.setenv(name, value)
    with contextlib.closing(repository_named(plugin_manager(), depot.reference)) as repository:
        yield repository


def a_set(repository: Repository) -> MadeSet:
    """Store 26 MiB in three shares, of which two meet inside of a chunk, while blocks all over are written to."""
    chance = random.Random(3)
    volume = SharedVolume(chance.randbytes(SIZE))
    used = ExtentSet.from_pairs([(0, 7 * MIB), (7 * MIB + 4096, 9 * MIB), (20 * MIB, SIZE - 20 * MIB)])
    writes = {
        1: [(100_000, chance.randbytes(5000)), (21 * MIB, bytes(200_000)), (17 * MIB, b"in free space" * 9)],
        2: [(100_100, chance.randbytes(50)), (8 * MIB - 10, chance.randbytes(70_000))],
        3: [(SIZE - 512, chance.randbytes(512))],
    }
    cuts = cut_at(SIZE, 8 * MIB, 12 * MIB + 512 * 1000)
    record = common_record(SIZE, repository.unit(SIZE), checkpoints={"some": {"generation": 3}})
    return make_set(repository, volume, used, cuts, writes, record)


# -- with borg and restic


@dataclasses.dataclass(frozen=True)
class Kept:
    """A repository with a set in it, the way into it, and a place for what is restored."""

    depot: Depot
    repository: Repository
    made: MadeSet
    place: Path

    def restored(self, snapshot: Snapshot, repository: Repository | None = None) -> bytes:
        """Restore over something older, as `blockferry restore` does; return what is there then."""
        target = self.place / f"{snapshot.id}.img"
        target.write_bytes(b"old!" * (SIZE // 4))
        restore(
            plugin_manager(),
            repository or self.repository,
            snapshot,
            str(target),
            delta=False,
            force=True,
            progress=Quiet(),
        )
        return target.read_bytes()


with_restic_first = pytest.mark.parametrize(
    "original", ["restic", pytest.param("borg", marks=pytest.mark.thorough)], indirect=True
)


@pytest.fixture(scope="module", params=["borg", "restic"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Depot, MadeSet]:
    depot = new_depot(request.param, tmp_path_factory.mktemp("sets") / "repository")
    with pytest.MonkeyPatch.context() as patch, opened(depot, patch) as repository:
        return depot, a_set(repository)


@pytest.fixture
def kept(original: tuple[Depot, MadeSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """Give a copy of its own."""
    depot, made = original
    monkeypatch.setenv("BORG_BASE_DIR", str(tmp_path / "home"))  # to borg it is the same repository, gone back in time
    shutil.copytree(depot.path, tmp_path / "repository")
    depot = dataclasses.replace(depot, path=tmp_path / "repository")
    with opened(depot, monkeypatch) as repository:
        yield Kept(depot, repository, made, tmp_path)


def test_a_set_is_restored_as_the_volume_was_at_the_instant(kept: Kept):
    depot, made = kept.depot, kept.made
    (listed,) = depot.ferry("snapshots", "--json").json()["snapshots"]
    assert (listed["id"], listed["closing"], listed["incomplete"]) == (made.snapshot.id, True, False)
    target = kept.place / "target.img"
    target.write_bytes(b"old!" * (SIZE // 4))
    depot.ferry("restore", "latest", target, "--force", "--json").json()
    made.assert_is(target.read_bytes())
    assert depot.ferry("verify", made.snapshot.id[:6], "--against", target, "--json").json()["bytes_compared"]
    depot.check()


def test_a_set_is_shown_with_its_shares_and_they_are_no_snapshots(kept: Kept):
    depot, made = kept.depot, kept.made
    shown = depot.ferry("show", "latest", "--json").json()
    assert (shown["shares"], shown["chain"]) == ([each.id for each in made.shares], [made.snapshot.id])
    words = depot.ferry("show", "latest").out
    assert all(each.id in words for each in made.shares)
    target, share = kept.place / "x.img", made.shares[1].id
    depot.ferry("restore", share, target).refused(2, share, f"share of the set {made.snapshot.id}")
    assert not target.exists()


def test_a_set_becomes_one_whole_snapshot(kept: Kept):
    depot, made = kept.depot, kept.made
    unit = kept.repository.unit(SIZE)
    touched = trace(kept.repository, made.snapshot).newest.stored.align(unit, SIZE)
    done = depot.ferry("apply-log", "latest", "--json").json()
    assert done["merged"] == [made.snapshot.id]
    if depot.tool == "borg":
        # Besides the log's chunks only the one in which two shares meet.
        assert done["bytes_read"] == touched.total + unit
    depot.ferry("apply-log", done["snapshot"]).refused(2, "is no set")
    assert depot.ferry("delete", made.snapshot.id, "--json").json()["deleted"] == [made.snapshot.id]
    assert depot.archives() == [done["archive"]]
    (whole,) = kept.repository.snapshots()
    made.assert_is(kept.restored(whole))
    record = kept.repository.describe(whole)[0]
    assert (record.part, record.shares, record.state_of) == (False, None, made.snapshot.id)
    assert record.checkpoints == made.record.checkpoints
    depot.check()


def test_a_share_that_a_set_needs_is_not_deleted_and_a_lost_one_is_named(kept: Kept):
    depot, made = kept.depot, kept.made
    depot.ferry("delete", made.shares[0].id).refused(2, "needed by", made.snapshot.id)
    kept.repository.delete([made.shares[0]])
    target = kept.place / "x.img"
    depot.ferry("restore", "latest", target).refused(1, made.snapshot.id, f"share {made.shares[0].id}", "gone")
    assert not target.exists()
    assert made.shares[0].id in depot.ferry("show", "latest", "--json").json()["tier_reason"]
    for attempt in (merge, apply_log):
        with pytest.raises(DamagedSnapshotError, match=made.shares[0].id):
            attempt(kept.repository, *([[made.snapshot]] if attempt is merge else [made.snapshot]), Quiet())
    chains.delete(kept.repository, [made.snapshot])
    assert depot.archives() == []


@with_restic_first
def test_what_a_failed_backup_leaves_is_listed_as_incomplete_and_deleted(kept: Kept):
    depot, made = kept.depot, kept.made
    record = common_record(SIZE, kept.repository.unit(SIZE))
    extents = ExtentSet.from_pairs([(0, MIB)])
    share = store_share(kept.repository, Bytes(bytes(SIZE)), extents, record, nothing).snapshot
    told = depot.ferry("snapshots", "--all", "--json").json()["snapshots"]
    assert [each["id"] for each in told] == [made.snapshot.id]  # the other may still come
    kept.repository.delete([made.snapshot])
    record = common_record(SIZE, kept.repository.unit(SIZE))
    none = ExtentSet.empty()
    later = close_set(kept.repository, Bytes(bytes(SIZE), none), [], none, record, nothing)
    told = depot.ferry("snapshots", "--all", "--json").json()["snapshots"]
    left = {each.id for each in (*made.shares, share)}
    assert {each["id"] for each in told if each["incomplete"]} == left
    assert [each["id"] for each in told if not each["incomplete"]] == [later.snapshot.id]
    assert "incomplete" in depot.ferry("snapshots", "--all").out
    depot.ferry("delete", *left, "--json").json()
    assert len(depot.archives()) == 1


@with_restic_first
def test_the_log_may_be_kept_in_a_repository_of_another_tool(kept: Kept, tmp_path, monkeypatch):
    depot, made = kept.depot, kept.made
    other = new_depot({"borg": "restic", "restic": "borg"}[depot.tool], tmp_path / "logs")
    copies = kept.repository
    copies.delete([made.snapshot])
    with opened(other, monkeypatch) as logs:
        joined = JoinedRepository(logs, copies)
        close_set(joined, made.log, made.shares, made.used, made.record, nothing)
        assert [each.id for each in logs.snapshots()] == [made.snapshot.id]
    assert without_shares(copies.snapshots()) == []
    both = dataclasses.replace(depot, env=depot.env | other.env)
    apart = ("--log-repo", other.reference)
    target = tmp_path / "target.img"
    other.ferry("restore", "latest", target).refused(1, "share", "--log-repo")
    both.ferry("restore", "latest", target, *apart, "--json").json()
    made.assert_is(target.read_bytes())
    told = both.ferry("snapshots", *apart, "--json").json()["snapshots"]
    assert [each["id"] for each in told] == [made.snapshot.id]
    done = both.ferry("merge", "latest", *apart, "--json").json()
    assert done["archive"] in depot.archives()
    both.ferry("delete", made.snapshot.id, *apart, "--json").json()
    assert (depot.archives(), other.archives()) == ([done["archive"]], [])
    made.assert_is(kept.restored(*copies.snapshots()))


@pytest.mark.root
def test_a_set_is_attached_while_it_is_restored(kept: Kept):
    depot, made, name = kept.depot, kept.made, f"set-of-{kept.depot.tool}"
    said = depot.ferry("attach", made.snapshot.id, kept.place / "hot.img", "--name", name, "--json").json()
    try:
        made.assert_is(Path(said["device"]).read_bytes())
    finally:
        assert blockferry("detach", "--forget", name).code == 0


@pytest.mark.parametrize("incremental", [True, False])
def test_later_backups_go_on_from_a_set(depot: Depot, tmp_path, monkeypatch, incremental):
    """The tracker is the one of the simulation; the repository is real."""
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    size = 16 * MIB
    disk = Disk(tmp_path / "disk", size)
    manager, chance = disk.manager(), random.Random(5)
    with opened(depot, monkeypatch) as repository:
        record = common_record(size, repository.unit(size), volume="disk", identity=disk.volume.identity)
        begun = Checkpoints(manager).begun(disk.volume, record.snapshot, record.created, repository, "")
        with begun as checkpoints:
            volume = SharedVolume(disk.content)
            writes = {1: [(MIB, chance.randbytes(3000)), (9 * MIB, chance.randbytes(300_000))]}
            for offset, data in writes[1]:
                disk.write(offset, data)
            record = dataclasses.replace(record, checkpoints=checkpoints.states)
            made = make_set(repository, volume, ExtentSet.whole(size), cut_at(size, 8 * MIB), writes, record)
        disk.write(3 * MIB, chance.randbytes(1000))
        choice = Choice(since=made.snapshot.id, incremental=incremental)
        done = back_up(manager, disk.volume, repository, freeze=FreezeOptions(), choice=choice, progress=Quiet())
        assert (done.record.base, done.record.part) == (made.snapshot.id, incremental)
        assert done.record.tier == "changed"
        # The chunks of three writes. restic takes over from one share at most, and reads the other's segment too.
        assert done.bytes_read == {"borg": 3 * MIB, "restic": (8 if incremental else 12) * MIB}[depot.tool]
        assert state_of(repository, done.snapshot) == disk.content
        assert state_of(repository, made.snapshot) == made.instant
        if not incremental:
            chains.delete(repository, [made.snapshot])
            assert state_of(repository, done.snapshot) == disk.content
            return
        with pytest.raises(UsageError, match=done.snapshot.id):
            chains.delete(repository, [made.snapshot])
        merged = merge(repository, [done.snapshot], Quiet())
        assert merged.merged == [made.snapshot.id, done.snapshot.id]
        chains.delete(repository, [done.snapshot, made.snapshot])
        assert len(repository.snapshots()) == 1
        assert state_of(repository, merged.snapshot) == disk.content
    depot.check()


# -- in memory

CAPABILITIES = [frozenset(), frozenset({"reuse"}), frozenset({"reuse", "merge"}), frozenset({"reuse", "parallel"})]


@pytest.fixture
def memory() -> MemoryRepository:
    return MemoryRepository(frozenset({"reuse", "merge"}), UNIT)


def small_set(repository: Repository, volume: str = "shared", size: int = SMALL) -> MadeSet:
    content = random.Random(size).randbytes(size)
    writes = {1: [(BLOCK, b"new" * 100)]}
    record = common_record(size, UNIT, volume=volume)
    shared = SharedVolume(content, 2 * BLOCK)
    return make_set(repository, shared, ExtentSet.whole(size), cut_at(size, 4 * UNIT), writes, record)


blocks = st.integers(0, SMALL // BLOCK - 1)
ranges = st.lists(st.tuples(blocks, st.integers(1, 12)), max_size=12)


def extents_of(pairs: list[tuple[int, int]]) -> ExtentSet:
    return ExtentSet.from_pairs((first * BLOCK, count * BLOCK) for first, count in pairs).clip(0, SMALL)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    capabilities=st.sampled_from(CAPABILITIES),
    used=ranges.map(extents_of),
    whole=st.booleans(),
    owners=st.lists(st.integers(0, 3), min_size=len(range(0, SMALL, BLOCK)), max_size=len(range(0, SMALL, BLOCK))),
    runs=st.integers(1, 20),
    written=st.lists(st.tuples(st.integers(0, 4), blocks, st.integers(1, 3000)), max_size=8),
    chunk=st.sampled_from([BLOCK, 2 * BLOCK, 3 * BLOCK]),
)
def test_any_set_is_the_volume_at_the_instant(capabilities, used, whole, owners, runs, written, chunk):
    repository = MemoryRepository(capabilities, UNIT)
    used = ExtentSet.whole(SMALL) if whole else used
    owner = np.repeat(owners, runs)[: len(owners)]  # long runs of one share, and short ones
    cuts = [ExtentSet.from_bits(owner == number, BLOCK).clip(0, SMALL) for number in range(4)]
    volume = SharedVolume(random.Random(1).randbytes(SMALL), chunk)
    writes: dict[int, list[tuple[int, bytes]]] = {}
    for number, (when, block, length) in enumerate(written):
        data = (number.to_bytes(2, "big") * length)[:length][: SMALL - block * BLOCK]
        writes.setdefault(when, []).append((block * BLOCK, data))
    record = common_record(SMALL, UNIT, method=WHOLE if whole else "bitmaps")
    made = make_set(repository, volume, used, cuts, writes, record)
    expected = bytearray(SMALL)
    for start, length in used:
        expected[start : start + length] = made.instant[start : start + length]
    assert state_of(repository, made.snapshot) == expected
    chain = trace(repository, made.snapshot)
    wanted = BlockMap.build(SMALL, data=ExtentSet.empty(), same=used).on_grid(UNIT).extents(Kind.SAME)
    taken = ExtentSet.empty()
    for base in chain.bases(wanted):
        assert not taken.intersection(base.extents)
        assert base.extents == base.extents.align(UNIT, SMALL)
        taken = taken.union(base.extents)
        image = repository.extract(base.snapshot)
        for start, length in base.extents.intersection(used):
            assert image[start : start + length] == expected[start : start + length]
    touched = chain.newest.stored.align(UNIT, SMALL)
    assert not taken.intersection(touched)
    of_one = [link.stored.align(UNIT, SMALL) for link in chain.shares]
    for start, length in wanted.difference(touched):
        for place in range(start, start + length, UNIT):
            holders = [each for each in of_one if each.clip(place, place + 1)]
            assert taken.covers(place, place + 1) == (len(holders) == 1)
    merged = merge(repository, [made.snapshot], Quiet())
    assert state_of(repository, merged.snapshot) == expected
    if "merge" in capabilities:
        assert merged.bytes_read == wanted.difference(taken).total
    assert not whole or repository.extract(merged.snapshot) == expected


def test_an_empty_log_and_no_shares_are_possible(memory):
    content = random.Random(2).randbytes(SMALL)
    used = ExtentSet.from_pairs([(0, 5 * BLOCK)])
    quiet = make_set(memory, SharedVolume(content), used, cut_at(SMALL), {}, common_record(SMALL, UNIT))
    quiet.assert_is(state_of(memory, quiet.snapshot))
    all_logged = SharedVolume(content, BLOCK)
    all_logged.write(0, bytes(5 * BLOCK))
    logged = make_set(memory, all_logged, used, [], {}, common_record(SMALL, UNIT))
    logged.assert_is(state_of(memory, logged.snapshot))
    logged.assert_is(state_of(memory, apply_log(memory, logged.snapshot, Quiet()).snapshot))
    empty = make_set(memory, SharedVolume(content), ExtentSet.empty(), [], {}, common_record(SMALL, UNIT))
    assert state_of(memory, empty.snapshot) == bytes(SMALL)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"share_of": "0123456789ab"}, "it is of 0123456789ab"),
        ({"share_of": None, "base": "0123456789ab"}, "it is of no set"),
        ({"size": SMALL + UNIT}, "size"),
        ({"unit": 2 * UNIT}, "unit"),
        ({"volume": "another"}, "volume"),
    ],
)
def test_a_share_that_does_not_belong_under_the_log_is_named(memory, change, why):
    made = small_set(memory)
    archive = memory.archives[made.shares[0].id]
    archive.record = dataclasses.replace(archive.record, **change)
    for attempt in (lambda: trace(memory, made.snapshot), lambda: apply_log(memory, made.snapshot, Quiet())):
        with pytest.raises(DamagedSnapshotError, match=f"{made.shares[0].id}.*{made.snapshot.id}.*{why}"):
            attempt()


def test_shares_that_overlap_or_lack_something_are_refused(memory):
    made = small_set(memory)
    archive = memory.archives[made.shares[0].id]
    archive.block_map = BlockMap.build(SMALL, data=ExtentSet.from_pairs([(0, 5 * UNIT)]))
    with pytest.raises(DamagedSnapshotError, match="two of its shares"):
        trace(memory, made.snapshot)
    archive.block_map = BlockMap.build(SMALL, data=ExtentSet.from_pairs([(0, 3 * UNIT)]))
    with pytest.raises(DamagedSnapshotError, match=f"bytes at {3 * UNIT}"):
        trace(memory, made.snapshot)


def test_nothing_is_stored_of_a_set_that_would_not_be_right(memory):
    record = common_record(SMALL, UNIT)
    source, whole = Bytes(bytes(SMALL)), ExtentSet.whole(SMALL)
    half = ExtentSet.from_pairs([(0, 4 * UNIT)])
    with pytest.raises(ValueError, match="does not have all"):
        store_share(memory, Bytes(bytes(SMALL), half), whole, record, nothing)
    share = store_share(memory, source, half, record, nothing).snapshot
    again = store_share(memory, source, half, record, nothing).snapshot
    foreign = store_share(memory, source, half, common_record(SMALL, UNIT), nothing).snapshot
    stored, log = set(memory.archives), Bytes(bytes(SMALL), ExtentSet.empty())
    for shares, used, error in [
        ([share], whole, ValueError),
        ([share], ExtentSet.from_pairs([(0, UNIT)]), ValueError),
        ([share, again], half, DamagedSnapshotError),
        ([foreign], half, DamagedSnapshotError),
    ]:
        with pytest.raises(error):
            close_set(memory, log, shares, used, record, nothing)
    assert set(memory.archives) == stored


def test_lists_show_no_shares(memory):
    made = small_set(memory)
    listed = memory.snapshots()
    assert find(listed, "latest") == made.snapshot == find(listed, made.snapshot.id[:7])
    assert find(listed, made.shares[0].id, shares=True) == made.shares[0]
    with pytest.raises(UsageError, match=f"share of the set {made.snapshot.id}"):
        find(listed, made.shares[0].id)
    with pytest.raises(SnapshotNotFoundError, match="holds no snapshot"):
        find(made.shares, "latest")
    with pytest.raises(UsageError, match="share of the set"):
        trace(memory, made.shares[0])
    with pytest.raises(UsageError, match="is no set"):
        apply_log(memory, merge(memory, [made.snapshot], Quiet()).snapshot, Quiet())
    assert to_remove(without_shares(listed), {"keep_last": 1}) == []


def test_shares_without_their_set_are_incomplete_when_it_will_not_come_any_more():
    _day, made = "2026-01-02T", "2026-01-02T12:00:00Z"
    record = common_record(SMALL, UNIT, created=made)
    memory = MemoryRepository(frozenset(), UNIT)
    share = store_share(memory, Bytes(bytes(SMALL)), ExtentSet.from_pairs([(0, UNIT)]), record, nothing).snapshot
    old, young = (
        dataclasses.replace(share, id=new_snapshot_id(), created=time) for time in (made, "2026-01-03T10:00Z")
    )
    assert incomplete([old], "2026-01-03T11:00:00Z") == []
    assert incomplete([old], "2026-01-03T13:00:00Z") == [old]
    assert incomplete([old, young], "2026-01-03T13:00:00Z") == []  # the set goes on
    closed = dataclasses.replace(share, id=share.share_of, share_of=None, closing=True)
    assert incomplete([old, closed], "2026-01-09T00:00:00Z") == []
    later = dataclasses.replace(closed, id=new_snapshot_id(), created="2026-01-02T13:00:00Z")
    assert incomplete([old, later], "2026-01-02T14:00:00Z") == [old]
    another = dataclasses.replace(later, volume="another")
    assert incomplete([old, another], "2026-01-02T14:00:00Z") == []
    assert incomplete([dataclasses.replace(old, created="never")], "2026-01-02T14:00:00Z") != []


def test_what_a_deletion_breaks_off_leaves_is_no_set(memory):
    made = small_set(memory)

    class Failing(MemoryRepository):
        def delete(self, snapshots):
            super().delete(snapshots[:1])
            raise DamagedSnapshotError("the connection is lost")

    failing = Failing(memory.capabilities, UNIT)
    failing.archives = memory.archives
    with pytest.raises(DamagedSnapshotError):
        chains.delete(failing, [made.shares[0], made.snapshot])
    assert without_shares(memory.snapshots()) == []
    chains.delete(memory, memory.snapshots())
    assert memory.snapshots() == []


@pytest.mark.parametrize(
    "damage",
    [
        {"shares": ["a", "a"]},
        {"shares": [7]},
        {"shares": "a"},
        {"shares": [], "part": False},
        {"shares": [], "base": "0123456789ab"},
        {"shares": [], "share_of": "0123456789ab"},
        {"share_of": 7},
        {"part": True},
    ],
)
def test_a_record_that_is_in_a_set_and_cannot_be_is_refused(damage):
    record = dataclasses.replace(common_record(SMALL, UNIT), **{"part": "shares" in damage} | damage)
    with pytest.raises(DamagedSnapshotError, match="here"):
        Record.from_json(record.to_json(), "here")


def test_of_many_shares_few_are_open_unless_all_have_to_be():
    open_now: set[int] = set()
    most = 0

    class Counted(Bytes):
        def __init__(self, number: int) -> None:
            super().__init__(bytes([number + 1]) * SMALL, cuts[number])
            open_now.add(number)
            self.number = number

        def close(self) -> None:
            open_now.remove(self.number)

    cuts = cut_at(SMALL, *range(BLOCK, SMALL, BLOCK))
    shares = [(cut, lambda number=number: Counted(number)) for number, cut in enumerate(cuts)]
    expected = b"".join(bytes([number + 1]) * cut.total for number, cut in enumerate(cuts))
    with SharesLayer(shares, SMALL, when_read=True) as layer:
        assert open_now == set()
        found = bytearray(SMALL)
        layer.read_into(0, memoryview(found))
        assert found == expected
        streams = [layer.stream(ExtentSet.whole(SMALL), 100) for _ in range(3)]
        for pieces in zip(*streams, strict=True):
            most = max(most, len(open_now))
            for offset, piece in pieces:
                assert piece == expected[offset : offset + len(piece)]
        assert most <= 7
    assert open_now == set()
    with SharesLayer(shares, SMALL, when_read=False):
        assert open_now == set(range(len(cuts)))
    assert open_now == set()


def test_a_joined_repository_has_what_each_of_its_own_has():
    first, second = (MemoryRepository(frozenset({"reuse", "merge", "parallel"}), UNIT) for _ in range(2))
    second.capabilities -= {"parallel"}
    joined = JoinedRepository(first, second)
    assert joined.capabilities == {"reuse", "merge"}
    one, other = small_set(first), small_set(second)
    assert {each.id for each in joined.snapshots()} == set(first.archives) | set(second.archives)
    assert state_of(joined, other.snapshot) == other.instant
    here = merge(joined, [other.snapshot], Quiet())  # nothing can be taken over from over there
    assert here.snapshot.id in first.archives
    assert state_of(joined, here.snapshot) == other.instant
    chains.delete(joined, [one.snapshot, other.snapshot])
    assert (set(first.archives), set(second.archives)) == ({here.snapshot.id}, set())
