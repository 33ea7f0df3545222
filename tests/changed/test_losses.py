"""Whatever is lost, swapped or damaged between two backups: the next one is right, and says why it read more.

Or it is refused. It is never wrong: each of these ends with a comparison of every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockferry import difference
from blockferry.backup import Result, back_up
from blockferry.chain import trace
from blockferry.difference import Choice
from blockferry.errors import TrackerError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import FreezeOptions
from blockferry.snapshot import Tier
from borg_support import BORGS, Volume, missing
from changes_support import MIB, Job, filesystem, install_mischief, pack_of_a_segment, wait_for
from commands_support import PASSPHRASE, Depot, new_depot
from simulation import BLOCK, Disk, MemoryRepository

needs_root = pytest.mark.root


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An XFS on which images can be kept track of, a plugin that does harm, an empty restic repository."""
    directory = tmp_path_factory.mktemp("shared")
    install_mischief(directory / "plugin")
    new_depot("restic", directory / "restic")
    with filesystem("xfs", directory):
        yield directory


Make = Callable[..., Job]


@pytest.fixture
def make_job(shared: Path, tmp_path: Path) -> Iterator[Make]:
    """Return a function that makes an image and an empty repository for it."""
    place = shared / "xfs-mounted" / "images"
    place.mkdir()

    def make(tool: str = "borg", file_size: int = 8 * MIB) -> Job:
        depot, plugin = make_depot(shared, tool, tmp_path), {"PYTHONPATH": f"{shared}/plugin"}
        return Job(depot, place / "disk.img", tmp_path / "state", plugin, file_size)

    yield make
    shutil.rmtree(place)


def make_depot(shared: Path, tool: str, directory: Path) -> Depot:
    """Make an empty repository; deriving restic's key anew would take longer than the test."""
    if tool == "borg":
        return new_depot(tool, directory / tool)
    path = shutil.copytree(shared / "restic", directory / tool)
    return Depot(tool, path, {"RESTIC_PASSWORD": PASSPHRASE})


both = pytest.mark.parametrize("tool", ["borg", "restic"])
either = pytest.mark.parametrize("tool", ["borg", pytest.param("restic", marks=pytest.mark.thorough)])


def forget(depot: Depot, archive: str) -> None:
    """Remove an archive as its own tool does, which knows nothing of us."""
    depot.stock(*(["delete", f"::{archive}"] if depot.tool == "borg" else ["forget", archive]))


# -- what this host remembers


def the_copy_is_deleted(job: Job, base: str) -> str:
    job.copy_of(base).unlink()
    return "No such file"


def the_copy_is_another(job: Job, base: str) -> str:
    shutil.copyfile(job.image, job.copy_of(base))  # its mark stays: it is the same file
    return "somebody changed"


def the_state_is_lost(job: Job, _base: str) -> str:
    shutil.rmtree(job.state)
    return "no tracker remembers"


def the_state_is_an_older_one(job: Job, base: str) -> str:
    older = job.state.with_name("older")
    shutil.copytree(job.state, older)
    job.backup()
    shutil.rmtree(job.state)
    older.rename(job.state)
    assert job.copies() != {base}
    return "No such file"


def the_checkpoint_is_garbage(job: Job, base: str) -> str:
    job.checkpoint_of(base).write_bytes(os.urandom(300))
    return "no tracker remembers"


def the_checkpoint_is_of_another_copy(job: Job, base: str) -> str:
    path = job.checkpoint_of(base)
    fields = json.loads(path.read_bytes())
    fields["checkpoint"]["state"]["copy"] = "/etc/hostname"
    path.write_text(json.dumps(fields))
    return "is not the one that this host remembers"


# -- the image


def the_image_is_another(job: Job, _base: str) -> str:
    other = job.image.with_name("other.img")
    job.make(other, seed=2)
    other.rename(job.image)
    return "formatted anew"


def the_image_is_formatted_anew(job: Job, _base: str) -> str:
    job.make(job.image, seed=2)
    return "formatted anew"


def the_image_has_no_filesystem_any_more(job: Job, _base: str) -> str:
    with job.image.open("r+b") as file:
        file.write(bytes(64 << 10))
    return "formatted anew"


def the_image_has_grown(job: Job, _base: str) -> str:
    os.truncate(job.image, 30 * MIB)
    return "changed its size"


def the_image_has_shrunk(job: Job, _base: str) -> str:
    os.truncate(job.image, 23 * MIB)
    return "changed its size"


LOSSES = {
    "copy deleted": the_copy_is_deleted,
    "copy overwritten": the_copy_is_another,
    "state lost": the_state_is_lost,
    "state set back": the_state_is_an_older_one,
    "checkpoint garbage": the_checkpoint_is_garbage,
    "checkpoint of another copy": the_checkpoint_is_of_another_copy,
    "image another": the_image_is_another,
    "image formatted": the_image_is_formatted_anew,
    "image wiped": the_image_has_no_filesystem_any_more,
    "image grown": the_image_has_grown,
    "image shrunk": the_image_has_shrunk,
}


@needs_root
@pytest.mark.parametrize("loss", LOSSES)
def test_after_a_loss_every_block_in_use_is_read(make_job: Make, loss: str) -> None:
    job = make_job()
    base = job.backup()
    job.write()
    reason = LOSSES[loss](job, base["snapshot"])
    done = job.backup("--incremental")
    assert done["tier"] in ("used", "whole")
    assert not done["part"]
    assert reason in done["tier_reason"], done["tier_reason"]
    job.assert_right()


@needs_root
def test_after_a_loss_changes_are_tracked_again(make_job: Make) -> None:
    job = make_job()
    base = job.backup()
    the_copy_is_deleted(job, base["snapshot"])
    second = job.backup()
    assert second["tier"] == "used"
    job.write()
    third = job.backup()
    assert (third["tier"], third["base"], third["tier_reason"]) == ("changed", second["snapshot"], "")
    assert 0 < third["bytes_changed"] <= MIB
    assert job.copies() == {third["snapshot"]}
    assert [path.name for path in job.checkpoints.iterdir()] == [job.checkpoint_of(third["snapshot"]).name]
    job.assert_right()


@needs_root
def test_another_image_with_the_same_uuid_is_read_as_what_it_is(make_job: Make) -> None:
    job = make_job()
    uuid = "11111111-2222-3333-4444-555555555555"
    job.make(job.image, "-U", uuid)
    job.backup()
    other = job.image.with_name("other.img")
    job.make(other, "-U", uuid, seed=2)
    other.rename(job.image)
    done = job.backup()
    assert done["bytes_changed"] == done["bytes_used"]
    job.assert_right()


# -- the repository


@needs_root
@either
def test_a_base_that_was_deleted_is_not_built_on(make_job: Make, tool: str) -> None:
    job = make_job(tool)
    first = job.backup()
    job.write()
    forget(job.depot, job.backup()["archive"])
    job.write(at=MIB)
    done = job.backup()
    assert (done["tier"], done["base"]) == ("used", None)
    assert f"no tracker remembers snapshot {first['snapshot']}" in done["tier_reason"]
    job.assert_right()
    for each in (first, done):
        forget(job.depot, each["archive"])
    alone = job.backup("--incremental")
    assert (alone["tier"], alone["part"]) == ("used", False)
    assert "no earlier snapshot" in alone["tier_reason"]
    job.assert_right()


@needs_root
@either
def test_a_part_whose_base_was_deleted_is_refused_and_not_built_on(make_job: Make, tool: str, tmp_path: Path) -> None:
    job = make_job(tool)
    base = job.backup()
    job.write()
    part = job.backup("--incremental")
    assert (part["part"], part["base"]) == (True, base["snapshot"])
    job.assert_right(part["snapshot"])
    forget(job.depot, base["archive"])
    for words in (["restore", part["snapshot"], tmp_path / "back.img"], ["verify", part["snapshot"]]):
        job.ferry(*words).refused(1, f"needs snapshot {base['snapshot']}, which is gone")
    job.ferry("merge", part["snapshot"]).refused(1, base["snapshot"])
    assert not (tmp_path / "back.img").exists()
    done = job.backup("--incremental")
    assert (done["tier"], done["part"]) == ("used", False)
    assert f"needs snapshot {base['snapshot']}, which is gone" in done["tier_reason"]
    job.assert_right(done["snapshot"])


def lose_a_chunk(job: Job) -> None:
    """Take a chunk of the image away, and have borg repair what is left."""
    start = (job.place + 5 * MIB) // MIB * MIB
    chunk = job.image.read_bytes()[start : start + MIB]
    # Without encryption a chunk's id is the SHA-256 of its content.
    job.depot.stock("debug", "delete-obj", job.depot.path, hashlib.sha256(chunk).hexdigest())
    job.depot.stock("check", "--repair")


def plain_depot(series: str, path: Path) -> Depot:
    """Make a repository of a series of borg without encryption."""
    if reason := missing(series):
        pytest.skip(reason)
    env = {
        "PATH": f"{Path(BORGS[series]).parent}:{os.environ['PATH']}",
        "BLOCKFERRY_BORG": BORGS[series],
        "BORG_CHECK_I_KNOW_WHAT_I_AM_DOING": "YES",
    }
    depot = Depot("borg", path, env)
    depot.stock("init", "--encryption=none")
    assert f" {series}." in depot.stock("--version")
    return depot


def check_down_the_ladder(job: Job, reason: str, *options: str) -> None:
    """Assert that a backup builds on nothing, says why, and is right."""
    done = job.backup(*options)
    assert (done["tier"], done["part"], done["base"]) == ("used", False, None)
    assert reason in done["tier_reason"]
    job.assert_right(done["snapshot"])


@needs_root
@pytest.mark.parametrize("series", [pytest.param("1.2", marks=pytest.mark.thorough), "1.4"])
def test_a_base_that_was_repaired_is_not_built_on(make_job: Make, series: str, tmp_path: Path) -> None:
    job = make_job()
    job.depot = plain_depot(series, tmp_path / "plain")
    job.backup()
    lose_a_chunk(job)
    job.write(at=MIB)
    check_down_the_ladder(job, "repaired", "--sample", "0")


@needs_root
def test_a_base_of_which_restic_lost_a_pack_is_not_built_on(make_job: Make) -> None:
    job = make_job("restic", 18 * MIB)
    base = job.backup(RESTIC_PACK_SIZE="4")
    pack_of_a_segment(job.depot, base["archive"]).unlink()
    job.depot.stock("repair", "index")
    job.write(at=MIB)
    check_down_the_ladder(job, "no longer has", "--sample", "0")


@needs_root
@pytest.mark.parametrize("incremental", [False, True])
def test_where_the_sample_cannot_be_read_every_block_is(make_job: Make, incremental: bool, tmp_path: Path) -> None:
    job = make_job()
    job.depot = plain_depot("1.2", tmp_path / "plain")
    job.backup()
    lose_a_chunk(job)
    job.write(at=MIB)
    check_down_the_ladder(job, "lost", "--sample", "1000", *(["--incremental"] if incremental else []))


@needs_root
def test_a_part_on_a_base_that_was_repaired_is_never_restored_wrong(make_job: Make, tmp_path: Path) -> None:
    """What is lost is said when it is read, and no further part is built on it, even where no sample is taken."""
    job = make_job()
    job.depot = plain_depot("1.2", tmp_path / "plain")
    job.backup()
    job.write(at=MIB)
    part = job.backup("--incremental")
    assert part["part"]
    lose_a_chunk(job)
    job.write(at=2 * MIB)
    whole = job.backup("--sample", "0", "--incremental")
    assert (whole["part"], whole["tier"]) == (False, "used")
    assert "repaired" in whole["tier_reason"]
    job.assert_right()
    job.ferry("verify", part["snapshot"]).refused(1, "are lost")
    job.ferry("restore", part["snapshot"], tmp_path / "back.img").refused(1, "are lost")
    assert not (tmp_path / "back.img").exists()


@needs_root
@pytest.mark.thorough
def test_two_repositories_have_a_checkpoint_each(make_job: Make, shared: Path, tmp_path: Path) -> None:
    job = make_job()
    depots = [job.depot, make_depot(shared, "restic", tmp_path)]
    last: dict[str, dict[str, Any]] = {}
    for number in range(5):
        depot = depots[number % 2]
        done = job.backup(depot=depot)
        if number > 1:
            job.assert_right(depot=depot)
        assert done["base"] == last.get(depot.tool, {}).get("snapshot")
        assert done["tier"] == ("changed" if number > 1 else "used")
        last[depot.tool] = done
        assert job.copies() == {each["snapshot"] for each in last.values()}
        job.write(at=number * MIB)


# -- what the user says


@needs_root
def test_a_snapshot_of_another_volume_or_of_none_is_refused(make_job: Make) -> None:
    job = make_job()
    mine = job.backup()
    other = job.backup("--name", "other")
    both_copies = {mine["snapshot"], other["snapshot"]}
    assert job.copies() == both_copies
    words = ["backup", job.image, "--since"]
    job.ferry(*words, other["snapshot"]).refused(2, other["snapshot"], "is of other", "same volume")
    job.ferry(*words, "0123456789ab").refused(1, "no such snapshot")
    os.truncate(job.image, 25 * MIB)
    job.ferry(*words, mine["snapshot"]).refused(2, mine["snapshot"], "bytes")
    assert job.copies() == both_copies
    assert len(job.depot.archives()) == 2


@needs_root
@either
def test_a_clock_that_was_set_back_confuses_nobody(make_job: Make, tool: str) -> None:
    job = make_job(tool)
    first = job.backup()
    job.write()
    second = job.backup("--incremental", CLOCK="-86400")
    assert (second["tier"], second["base"], second["part"]) == ("changed", first["snapshot"], True)
    job.assert_right(second["snapshot"])
    job.write(at=5 * MIB)
    third = job.backup()
    assert (third["tier"], third["base"]) == ("changed", second["snapshot"])
    assert f"no tracker remembers snapshot {first['snapshot']}" in third["tier_reason"]
    job.assert_right(third["snapshot"])
    listed = job.ferry("snapshots", "--json").json()["snapshots"]
    assert [each["id"] for each in listed] == [each["snapshot"] for each in (second, first, third)]


# -- two at once, and none to the end


@needs_root
def test_of_two_backups_at_once_one_waits_for_another_time(make_job: Make, tmp_path: Path) -> None:
    job = make_job()
    base = job.backup()
    job.write()
    go = tmp_path / "go"
    with job.start(WAIT=str(go)) as first:
        try:
            wait_for(tmp_path / "go.here", first)
            job.write(at=5 * MIB)  # behind its checkpoint, before the volume is made to hold still
            job.ferry("backup", job.image).refused(75, "another backup of this volume")
        finally:
            go.touch()
        out, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    done = json.loads(out)
    assert (done["tier"], done["base"]) == ("changed", base["snapshot"])
    job.assert_right()
    assert job.copies() == {done["snapshot"]}
    again = job.backup()
    assert (again["tier"], again["base"]) == ("changed", done["snapshot"])
    assert again["bytes_changed"] > 0  # what was written in between is in both
    job.assert_right()


@needs_root
def test_the_checkpoint_of_a_backup_that_was_killed_is_released_by_the_next(make_job: Make) -> None:
    job = make_job()
    base = job.backup()
    job.write()
    for _ in range(2):
        with job.start(KILL="1") as victim:
            victim.communicate(timeout=60)
        assert victim.returncode == -signal.SIGKILL
        assert len(job.copies()) == 2  # the last one's is gone
        assert base["snapshot"] in job.copies()
    job.write(at=5 * MIB)
    done = job.backup()
    assert (done["tier"], done["base"]) == ("changed", base["snapshot"])
    assert job.copies() == {done["snapshot"]}
    assert len(job.depot.archives()) == 2
    job.assert_right()


@needs_root
def test_a_backup_that_fails_keeps_the_checkpoint_of_its_base(make_job: Make) -> None:
    job = make_job()
    base = job.backup()
    job.write()
    hidden = job.depot.path.with_name("hidden")
    job.depot.path.rename(hidden)
    assert job.ferry("backup", job.image).code == 1
    hidden.rename(job.depot.path)
    assert job.copies() == {base["snapshot"]}
    done = job.backup()
    assert (done["tier"], done["base"]) == ("changed", base["snapshot"])
    job.assert_right()


# -- a tracker that lies


@needs_root
def test_a_lie_is_caught_and_the_tracker_not_asked_again(make_job: Make) -> None:
    job = make_job()
    job.backup()
    job.write(at=0, length=8 * MIB)
    archives = job.depot.archives()
    lie = job.ferry("backup", job.image, LIE=f"0 {24 * MIB}")
    lie.refused(1, str(job.image), "tracker reflink", "said not to have changed", "Nothing was stored")
    assert job.depot.archives() == archives
    assert job.copies() == set()
    assert list(job.checkpoints.iterdir()) == []
    done = job.backup(LIE=f"0 {24 * MIB}")
    assert done["tier"] == "used"
    assert "no tracker remembers" in done["tier_reason"]
    job.assert_right()


@needs_root
@pytest.mark.parametrize(("tool", "incremental"), [("borg", True), ("restic", False)])
def test_verify_finds_a_lie_that_the_sample_did_not(make_job: Make, tool: str, incremental: bool) -> None:
    job = make_job(tool)
    job.backup()
    job.write(at=5 * MIB, length=100)
    options = ["--sample", "0", *(["--incremental"] if incremental else [])]
    done = job.backup(*options, LIE=f"0 {24 * MIB}")
    assert (done["tier"], done["bytes_compared"]) == ("changed", 0)
    job.ferry("verify", done["snapshot"], "--against", job.image).refused(1, "1 pieces differ")
    job.backup("--since", "none")
    job.assert_right()


class Quiet:
    """No progress to show."""

    @contextlib.contextmanager
    def task(self, _name: str, _total: int) -> Iterator[Callable[[int], None]]:
        yield lambda _count: None


class Simulated:
    """Backups of a disk in memory, of which a tracker remembers three snapshots."""

    def __init__(self, directory: Path, pieces: int, unit: int) -> None:
        self.disk = Disk(directory / "disk", pieces * unit)
        self.manager = self.disk.manager()
        self.repository = MemoryRepository(frozenset({"reuse", "merge"}), unit)

    def backup(self, **choice: Any) -> Result:
        return back_up(
            self.manager,
            self.disk.volume,
            self.repository,  # type: ignore[arg-type]
            freeze=FreezeOptions(),
            choice=Choice(**choice),
            progress=Quiet(),  # type: ignore[arg-type]
        )

    def is_right(self, done: Result) -> bool:
        """Compare what a snapshot restores to with what the disk was."""
        found = bytearray(len(self.disk.content))
        trace(self.repository, done.snapshot).open(self.repository).read_into(0, memoryview(found))
        return found == self.disk.frozen_state


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in memory, for what is synchronized many times."""
    directory = Path("/dev/shm") / f"blockferry-losses-{os.getpid()}"
    directory.mkdir()
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(directory / "state"))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize(("pieces", "wrong", "sample"), [(20, 1, 4), (12, 2, 6)])
def test_backups_catch_lies_as_often_as_the_formula_says(
    memory: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, wrong: int, sample: int
) -> None:
    unit = 4 * BLOCK
    monkeypatch.setattr(difference, "PIECE", unit)
    chance = random.Random(pieces)
    rounds, caught = 120, 0
    simulated = Simulated(memory, pieces, unit)
    disk = simulated.disk
    after_a_lie_was_caught = False
    for _ in range(rounds):
        disk.tracker.hides = None
        base = simulated.backup(since="latest" if after_a_lie_was_caught else "none")
        assert base.record.tier is Tier.USED
        assert simulated.is_right(base)
        first = chance.randrange(pieces - wrong + 1) * unit
        disk.tracker.hides = (first, wrong * unit)
        for number in range(wrong):  # one byte of each piece
            disk.write(first + number * unit + chance.randrange(unit), chance.randbytes(1))
        before = bytes(disk.content)
        try:
            done = simulated.backup(sample=sample)
        except TrackerError as error:
            caught += 1
            after_a_lie_was_caught = True
            assert "said not to have changed" in error.message
            assert [each.id for each in simulated.repository.snapshots()] == [base.snapshot.id]
        else:
            after_a_lie_was_caught = False
            assert done.record.tier is Tier.CHANGED
            assert simulated.is_right(done) == (before == simulated.repository.extract(base.snapshot))
        simulated.repository.delete(simulated.repository.snapshots())
    formula = 1 - ((pieces - wrong) / pieces) ** sample
    assert abs(caught - rounds * formula) < 5 * math.sqrt(rounds * formula * (1 - formula))


def leaves(fields: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """Yield where the values in nested dictionaries are, with the dictionaries themselves."""
    if path:
        yield path
    if isinstance(fields, dict):
        for name in fields:
            yield from leaves(fields[name], *path, name)


def edited(stored: bytes, path: tuple[str, ...], value: Any) -> bytes:
    """Return JSON with another value at one place, or, for Ellipsis, without it."""
    fields = inner = json.loads(stored)
    for name in path[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(fields).encode()


def test_whatever_a_checkpoints_file_says_the_next_backup_is_right(memory: Path) -> None:
    """Every value of it is removed, and replaced by another of each type; then it is cut and overwritten."""
    simulated = Simulated(memory, 4, 4 * BLOCK)
    simulated.backup()

    def only() -> Path:
        (path,) = (memory / "state" / "checkpoints").glob("*.json")
        return path

    places = [*leaves(json.loads(only().read_bytes()))]
    assert ("checkpoint", "state", "generation") in places
    harms: list[Callable[[bytes], bytes]] = [
        lambda stored, path=path, value=value: edited(stored, path, value)
        for path in places
        for value in (..., None, 0, 1 << 70, 0.5, "x", [], ["x"], {}, {"x": 1}, True)
    ]
    harms += [lambda stored, end=end: stored[:end] for end in range(0, 200, 20)]
    harms += [lambda _stored: os.urandom(200), lambda _stored: b"[]", lambda _stored: b'"x"', lambda _stored: b"null"]
    used = 0
    for harm in harms:
        only().write_bytes(harm(only().read_bytes()))
        simulated.disk.write(3 * BLOCK, os.urandom(100))
        done = simulated.backup()
        assert simulated.is_right(done)
        assert done.record.tier_reason or done.record.tier is Tier.CHANGED
        used += done.record.tier is Tier.USED
        for path in set((memory / "state" / "checkpoints").iterdir()):
            if done.snapshot.id not in path.name:
                path.unlink()
        simulated.repository.delete(simulated.repository.snapshots()[:-1])
    assert used > len(harms) * 0.7


@pytest.mark.parametrize(("pieces", "wrong", "sample"), [(20, 1, 4), (12, 2, 6), (100, 1, 16)])
def test_the_sample_finds_what_differs_as_often_as_the_formula_says(
    monkeypatch: pytest.MonkeyPatch, pieces: int, wrong: int, sample: int
) -> None:
    """So many times that one place more or less in the sample would show."""
    monkeypatch.setattr(difference, "PIECE", BLOCK)
    disk = Volume(np.zeros(pieces * BLOCK, np.uint8))
    image = Volume(np.zeros(pieces * BLOCK, np.uint8))
    disk.content[BLOCK // 2 :: BLOCK][:wrong] = 1
    rounds, caught = 10_000, 0
    for _ in range(rounds):
        try:
            difference.compare_sample(disk, image, ExtentSet.whole(disk.size), sample)
        except TrackerError:
            caught += 1
    formula = 1 - ((pieces - wrong) / pieces) ** sample
    assert abs(caught - rounds * formula) < 5 * math.sqrt(rounds * formula * (1 - formula))


def test_changes_since_an_older_snapshot_or_the_nearest_that_is_remembered(memory: Path) -> None:
    simulated = Simulated(memory, 8, 4 * BLOCK)
    made = []
    for number in range(4):
        simulated.disk.write(number * 4 * BLOCK, bytes([number]) * BLOCK)
        made.append(simulated.backup().snapshot.id)
    assert simulated.disk.tracker.released == made[:1]
    for wanted, base, reason in [(2, 2, ""), (1, 2, f"no tracker remembers snapshot {made[1]}"), (3, 3, "")]:
        done = simulated.backup(since=made[wanted])
        made.append(done.snapshot.id)
        assert (done.record.tier, done.record.base) == (Tier.CHANGED, made[base])
        assert reason in done.record.tier_reason
        assert simulated.is_right(done)
