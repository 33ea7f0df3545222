"""Whatever happens to a volume and its snapshots: each of them restores to what the volume was, byte for byte."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from blockferry.backup import back_up
from blockferry.blockmap import Kind
from blockferry.chain import broken, delete, needed, trace
from blockferry.checkpoints import Checkpoints
from blockferry.difference import Choice
from blockferry.errors import DamagedSnapshotError, UsageError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import FreezeOptions
from blockferry.merge import merge
from blockferry.retention import carry_out, look_over
from blockferry.sets import without_shares
from blockferry.snapshot import SPARSE, WHOLE, Snapshot, Tier, now
from sets_support import SharedVolume, common_record, make_set
from simulation import BLOCK, Disk, MemoryRepository

UNIT = 4 * BLOCK
SIZE = 8 * UNIT
EXAMPLES, STEPS = 70, 50
"""Of one search; as many are made as it takes."""
AT_LEAST = int(os.environ.get("BLOCKFERRY_TEST_STEPS", "2500"))
"""Steps."""

CAPABILITIES = [frozenset(), frozenset({"reuse"}), frozenset({"reuse", "merge"})]
places = st.integers(0, SIZE // BLOCK - 1)
lengths = st.integers(1, 9)
steps_taken = 0


class Quiet:
    """No progress to show."""

    @contextlib.contextmanager
    def task(self, _name, _total):
        yield lambda _count: None


class History(RuleBasedStateMachine):
    """The machine: what happened is drawn, what has to hold is checked after every step that stores or removes."""

    @initialize(capabilities=st.sampled_from(CAPABILITIES), method=st.sampled_from(["bitmaps", WHOLE, SPARSE]))
    def begin(self, capabilities, method):
        self.place = contextlib.ExitStack()
        directory = Path(self.place.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        patch = self.place.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("BLOCKFERRY_STATE_DIR", str(directory / "state"))
        self.disk = Disk(directory / "disk", SIZE, method)
        self.manager = self.disk.manager()
        self.repository = MemoryRepository(capabilities, UNIT)
        self.expected: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.gone: set[str] = set()
        self.counter = 0

    def listed(self) -> list[Snapshot]:
        """Return the snapshots that can be restored."""
        return [each for each in without_shares(self.repository.snapshots()) if each.id not in self.broken]

    def teardown(self):
        if hasattr(self, "place"):
            for snapshot in self.listed():
                self.check(snapshot)
            self.place.close()

    # -- what happens to the volume

    def fresh(self, length: int) -> bytes:
        global steps_taken
        steps_taken += 1
        self.counter += 1
        return (self.counter.to_bytes(4, "big") * (length // 4 + 1))[:length]

    @rule(block=places, count=lengths, odd=st.integers(0, BLOCK - 1))
    def write(self, block, count, odd):
        length = min(count * BLOCK - odd, SIZE - block * BLOCK)
        self.disk.write(block * BLOCK, self.fresh(length))

    @rule(block=places, count=lengths)
    def discard(self, block, count):
        self.fresh(0)
        length = min(count * BLOCK, SIZE - block * BLOCK)
        self.disk.write(block * BLOCK, bytes(length), in_use=False)

    @rule(block=places, count=lengths, used=st.booleans())
    def allocate_or_free_without_writing(self, block, count, used):
        self.fresh(0)
        if self.disk.method != SPARSE:  # there, what is not in use has no content
            self.disk.used[block : block + count] = [used] * len(self.disk.used[block : block + count])

    @rule()
    def restart_the_tracker(self):
        self.fresh(0)
        self.disk.tracker.forget()

    @rule()
    def format_anew(self):
        self.disk.uuid = f"filesystem {self.counter}"
        self.disk.write(0, self.fresh(4 * BLOCK))

    @precondition(lambda self: getattr(self, "expected", None))
    @rule(data=st.data())
    def repair_a_base(self, data):
        """What `borg check --repair` leaves cannot be taken over from any more."""
        self.fresh(0)
        self.repository.unusable.add(data.draw(st.sampled_from(list(self.expected))))

    # -- what is done with snapshots

    @rule(data=st.data(), incremental=st.booleans(), before=st.none() | places, after=st.none() | places)
    def back_up(self, data, incremental, before, after):
        mine = [each.id for each in self.listed()]
        since = data.draw(st.sampled_from(["latest", "latest", "none", *mine]))
        self.disk.before_freeze = lambda: before is not None and self.disk.write(before * BLOCK, self.fresh(BLOCK))
        self.disk.after_freeze = lambda: after is not None and self.disk.write(after * BLOCK, self.fresh(BLOCK))
        self.fresh(0)
        choice = Choice(since=since, incremental=incremental, sample=2)
        done = back_up(
            self.manager,
            self.disk.volume,
            self.repository,
            freeze=FreezeOptions(),
            choice=choice,
            progress=Quiet(),
        )
        self.expected[done.snapshot.id] = self.disk.frozen_state
        assert done.record.part <= (incremental and done.record.tier is Tier.CHANGED)
        assert done.record.tier_reason or done.record.tier is Tier.CHANGED
        if not self.repository.unusable:  # else what was begun may have been begun again
            chunks = self.repository.archives[done.snapshot.id].block_map.on_grid(UNIT).extents(Kind.DATA)
            assert done.bytes_read <= chunks.total
        self.check(done.snapshot)

    @rule(
        edges=st.lists(places, max_size=3), writes=st.lists(st.tuples(st.integers(0, 3), places, lengths), max_size=5)
    )
    def back_up_as_a_set(self, edges, writes):
        """As several hosts do: share by share, while writes go on, and what was there before them last."""
        self.fresh(0)
        volume, used = self.disk.volume, self.disk.used_blocks()
        record = common_record(
            SIZE, UNIT, volume=volume.name, identity=volume.identity, method=used.method, created=now()
        )
        begun = Checkpoints(self.manager).begun(volume, record.snapshot, record.created, self.repository, "")
        with begun as checkpoints:
            record = dataclasses.replace(record, checkpoints=checkpoints.states)
            shared, expected = SharedVolume(self.disk.content, 2 * BLOCK), self.disk.state()
            cuts = [0, *sorted(edge * BLOCK for edge in edges), SIZE]
            during: dict[int, list[tuple[int, bytes]]] = {}
            for when, block, count in writes:
                length = min(count * BLOCK, SIZE - block * BLOCK)
                during.setdefault(min(when, len(edges) + 1), []).append((block * BLOCK, self.fresh(length)))
            extents = [ExtentSet.from_ranges([one], [other]) for one, other in itertools.pairwise(cuts)]
            made = make_set(self.repository, shared, used.extents, extents, during, record)
        for when in sorted(during):
            for offset, data in during[when]:
                self.disk.write(offset, data)
        self.expected[made.snapshot.id] = expected
        self.check(made.snapshot)

    @precondition(lambda self: any(each.part for each in self.listed()))
    @rule(data=st.data())
    def merge(self, data):
        self.fresh(0)
        parts = [each for each in self.listed() if each.part]
        part = data.draw(st.sampled_from(parts))
        whole_below = not trace(self.repository, part).shares
        done = merge(self.repository, [part], Quiet())
        assert not done.record.part
        if "merge" in self.repository.capabilities and whole_below:
            assert done.bytes_read == 0 or self.repository.unusable & set(done.merged)
        self.expected[done.snapshot.id] = self.expected[part.id]
        self.check(done.snapshot)

    @precondition(lambda self: getattr(self, "expected", None))
    @rule(data=st.data())
    def delete(self, data):
        self.fresh(0)
        listed = self.listed()
        victims = data.draw(st.lists(st.sampled_from(listed), min_size=1, max_size=3, unique=True))
        lost = needed(listed, victims)
        with pytest.raises(UsageError) if lost else contextlib.nullcontext():
            delete(self.repository, victims)
            for victim in victims:
                del self.expected[victim.id]
        assert {each.id for each in self.listed()} == set(self.expected)
        assert {each.share_of for each in self.repository.snapshots()} <= {
            None,
            *self.expected,
            *self.broken,
            *self.gone,
        }

    @precondition(lambda self: getattr(self, "expected", None))
    @rule(keep=st.integers(1, 3), remove_broken=st.booleans())
    def prune(self, keep, remove_broken):
        """The newest stay, and whatever they lie on, however many there are that are of no use any more."""
        self.fresh(0)
        newest = sorted(self.listed(), key=lambda each: (each.created, not each.part))[-keep:]
        pruning = look_over(self.repository, self.disk.volume.name, {"keep_last": keep})
        assert set(pruning.broken) == self.broken
        gone = {each.id for each in carry_out(self.repository, pruning, remove_broken=remove_broken)}
        assert not gone & {each.id for each in newest}
        if remove_broken:
            assert self.broken <= gone
            self.broken.clear()
        for name in gone & set(self.expected):
            del self.expected[name]
        assert {each.id for each in self.listed()} == set(self.expected)
        for each in newest:
            self.check(each)

    @precondition(lambda self: getattr(self, "expected", None))
    @rule(data=st.data(), cleaned_up=st.booleans())
    def lose_one_to_somebody_elses_prune(self, data, cleaned_up):
        """A part whose base is gone is refused and found, and nothing is built on it."""
        self.fresh(0)
        listed = self.repository.snapshots()
        victim = data.draw(st.sampled_from(listed))
        lost = [each for each in needed(listed, [victim]) if each.id not in self.broken]
        self.repository.delete([victim])
        self.expected.pop(victim.id, None)
        for each in lost:
            with pytest.raises(DamagedSnapshotError, match="is gone"):
                trace(self.repository, each)
        self.broken.discard(victim.id)
        self.gone.add(victim.id)
        for each in lost:
            del self.expected[each.id]
        self.broken |= {each.id for each in lost}
        assert set(broken(self.repository, self.repository.snapshots())) == self.broken
        if cleaned_up:
            self.repository.delete([each for each in self.repository.snapshots() if each.id in self.broken])
            self.broken.clear()
            self.repository.delete(
                [each for each in self.repository.snapshots() if each.share_of not in {None, *self.expected}]
            )

    @precondition(lambda self: getattr(self, "expected", None))
    @rule(data=st.data())
    def restore(self, data):
        self.fresh(0)
        self.check(data.draw(st.sampled_from(self.listed())))

    def check(self, snapshot: Snapshot) -> None:
        """Read a snapshot by tracing back, and, where it is whole, as the stock tool would."""
        expected = self.expected[snapshot.id]
        image = trace(self.repository, snapshot).open(self.repository)
        found = bytearray(len(expected))
        image.read_into(0, memoryview(found))
        assert found == expected
        streamed = bytearray(len(expected))
        for offset, piece in image.stream(image.extents, 3 * BLOCK):
            streamed[offset : offset + len(piece)] = piece
        assert streamed == expected
        if not snapshot.part:
            record, block_map = self.repository.describe(snapshot)
            stock = self.repository.extract(snapshot)
            if record.zeros_are_content:
                assert stock == expected
            for start, length in block_map.extents(*record.stored_kinds):
                assert stock[start : start + length] == expected[start : start + length]


def test_every_snapshot_restores_to_what_the_volume_was():
    chosen = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    while steps_taken < AT_LEAST:  # how long a history gets is drawn
        run_state_machine_as_test(History, settings=chosen)
