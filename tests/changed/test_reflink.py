"""The reflink tracker on real XFS and btrfs: what it says changed, compared byte for byte with what did."""

from __future__ import annotations

import mmap
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockferry import fiemap, kernel
from blockferry.changed import reflink
from blockferry.extents import ExtentSet
from blockferry.hookspecs import Checkpoint
from blockferry.volume import Volume
from changes_support import BLOCK, MIB, Tracked, differing, filesystem, write
from commands_support import run
from conftest import Attach
from freeze_support import hold

pytestmark = pytest.mark.root
SIZE = 16 * MIB
FOLIO = 2 * MIB
"""XFS writes back at most so much where a map has touched one byte: the page cache knows what is dirty by folio."""


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A filesystem with reflinks."""
    with filesystem(request.param, tmp_path_factory.mktemp("store")) as place:
        yield place


@pytest.fixture
def directory(store: Path) -> Iterator[Path]:
    path = store / "images"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def tracked(directory: Path) -> Tracked:
    return new_image(directory)


def new_image(directory: Path) -> Tracked:
    """Make an image with data, holes, and space that was allocated and never written."""
    image = directory / "disk.img"
    image.write_bytes(random.Random(3).randbytes(SIZE))
    with image.open("r+b") as file:
        kernel.fallocate(file.fileno(), kernel.PUNCH_HOLE_KEEP_SIZE, 4 * MIB, 2 * MIB)
        kernel.fallocate(file.fileno(), kernel.PUNCH_HOLE_KEEP_SIZE, 8 * MIB, 2 * MIB)
        os.posix_fallocate(file.fileno(), 8 * MIB, 2 * MIB)
    return Tracked(image)


def blocks(*pairs: tuple[int, int]) -> ExtentSet:
    """Return the filesystem's blocks that some bytes touch."""
    return ExtentSet.from_pairs(pairs).align(BLOCK, SIZE).clip(0, SIZE)


def assert_covers(tracked: Tracked, since: Checkpoint, answer: ExtentSet) -> ExtentSet:
    """Assert that every block that differs from the kept copy is in an answer; return those."""
    truth = differing(Path(since.state["copy"]).read_bytes(), tracked.path.read_bytes())
    assert not truth.difference(answer)
    return truth


def test_the_answer_is_the_blocks_that_were_written_and_no_others(tracked: Tracked) -> None:
    """To the block, on both filesystems: btrfs splits its extents where one is written to."""
    since = tracked.checkpoint()
    assert tracked.changed(since) == ExtentSet.empty()
    chance = random.Random(9)
    written = [(chance.randrange(SIZE - 70_000), chance.choice([1, 512, 4096, 65_536])) for _ in range(60)]
    for offset, length in written:
        write(tracked.path, offset, chance.randbytes(length))
    answer = tracked.changed(since)
    assert answer == blocks(*written)
    truth = assert_covers(tracked, since, answer)
    assert truth.total > answer.total * 0.9


def test_what_was_written_twice_or_with_the_same_bytes_counts(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    for data in (b"one", b"other"):
        write(tracked.path, MIB, data)
        os.sync()
    write(tracked.path, 3 * MIB, tracked.path.read_bytes()[3 * MIB : 3 * MIB + BLOCK])
    assert tracked.changed(since) == blocks((MIB, 5), (3 * MIB, BLOCK))


places = st.integers(0, SIZE - 1)
lengths = st.sampled_from([1, 511, 4096, 4097, 100_000, 2 * MIB])
operations = st.sampled_from(["write", "write", "punch", "zero", "allocate", "map", "truncate"])


def test_whatever_was_done_to_an_image_no_block_is_missing(tracked: Tracked) -> None:
    """Each example goes on with the image that the last one left."""
    seen = 0

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps=st.lists(st.tuples(operations, places, lengths), min_size=1, max_size=6), seed=st.integers(0, 1 << 32))
    def holds(steps: list[tuple[str, int, int]], seed: int) -> None:
        nonlocal seen
        chance = random.Random(seed)
        since = tracked.checkpoint()
        try:
            touched = [do(tracked.path, step, place, length, chance) for step, place, length in steps]
            answer = tracked.changed(since)
            seen += assert_covers(tracked, since, answer).total
            assert not answer.difference(blocks(*touched))
        finally:
            reflink.blockferry_release_checkpoint(since)

    holds()
    assert seen > 100 * BLOCK


def do(image: Path, step: str, place: int, length: int, chance: random.Random) -> tuple[int, int]:
    """Do something to an image of which the size stays; return the bytes that it is done to."""
    length = min(length, SIZE - place)
    with image.open("r+b") as file:
        number = file.fileno()
        if step == "write":
            os.pwrite(number, chance.randbytes(length), place)
        elif step == "map":
            with mmap.mmap(number, SIZE) as mapped:
                mapped[place : place + length] = chance.randbytes(length)
            return place - place % FOLIO, length + 2 * FOLIO
        elif step == "truncate":
            os.truncate(number, place)
            os.truncate(number, SIZE)
            return place, SIZE - place
        elif step == "allocate":
            os.posix_fallocate(number, place, length)
        else:
            mode = {"punch": kernel.PUNCH_HOLE_KEEP_SIZE, "zero": kernel.ZERO_RANGE_KEEP_SIZE}[step]
            kernel.fallocate(number, mode, place, length)
    return place, length


def test_holes_that_were_punched_have_changed(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    with tracked.path.open("r+b") as file:
        kernel.fallocate(file.fileno(), kernel.PUNCH_HOLE_KEEP_SIZE, MIB + 100, 3 * BLOCK)
    answer = tracked.changed(since)
    assert_covers(tracked, since, answer)
    assert answer == blocks((MIB + 100, 3 * BLOCK))


def test_what_was_allocated_before_has_changed_once_it_is_written(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    write(tracked.path, 9 * MIB + 10, b"now")
    answer = tracked.changed(since)
    assert answer == blocks((9 * MIB + 10, 3)) == assert_covers(tracked, since, answer)


def test_what_is_allocated_and_not_written_is_as_the_hole_that_it_was(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    with tracked.path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 4 * MIB, 2 * MIB)
    assert tracked.changed(since) == ExtentSet.empty()
    write(tracked.path, 5 * MIB, b"now")
    answer = tracked.changed(since)
    assert answer == blocks((5 * MIB, 3)) == assert_covers(tracked, since, answer)


def test_what_a_map_holds_and_nobody_wrote_back_yet_has_changed(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    with tracked.path.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapped:
        mapped[7 * MIB : 7 * MIB + 5] = b"dirty"
        answer = tracked.changed(since)
        assert assert_covers(tracked, since, answer) == blocks((7 * MIB, 5))
        assert answer.total <= FOLIO
        mapped[2 * MIB : 2 * MIB + 5] = b"again"
        with hold(tracked.path) as frozen:
            mapped[13 * MIB : 13 * MIB + 5] = b"later"
            assert frozen.method.startswith("reflink copy")
            answer = tracked.changed(since, frozen.volume)
    assert assert_covers(tracked, since, answer.union(blocks((13 * MIB, 5)))).total == 3 * BLOCK
    assert not answer.clip(12 * MIB, SIZE)
    assert answer.total <= 2 * FOLIO


def test_an_end_that_was_cut_off_and_put_back_has_changed(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    os.truncate(tracked.path, 12 * MIB + 5)
    os.truncate(tracked.path, SIZE)
    answer = tracked.changed(since)
    assert answer == blocks((12 * MIB + 5, 4 * MIB - 5)) == assert_covers(tracked, since, answer)


def test_all_of_an_image_that_took_anothers_place_has_changed(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    other = tracked.path.with_name("other.img")
    shutil.copyfile(tracked.path, other)  # the same bytes: nobody can know that without reading them
    other.rename(tracked.path)
    holes = ExtentSet.from_pairs([(4 * MIB, 2 * MIB), (8 * MIB, 2 * MIB)])
    assert not holes.complement(SIZE).difference(tracked.changed(since))


def test_an_image_that_is_a_reflink_of_the_copy_has_not_changed(tracked: Tracked) -> None:
    """It was restored from it: what is shared is equal, whichever file it is."""
    since = tracked.checkpoint()
    write(tracked.path, 0, b"lost")
    tracked.path.unlink()
    run("cp", "--reflink=always", since.state["copy"], tracked.path)
    assert tracked.changed(since) == ExtentSet.empty() == assert_covers(tracked, since, ExtentSet.empty())


def test_what_a_defragmentation_moved_is_never_missing(tracked: Tracked, store: Path) -> None:
    for place in range(0, 4 * MIB, 64 << 10):  # in pieces, so that there is something to do
        write(tracked.path, place, os.urandom(BLOCK))
        os.sync() if place % MIB == 0 else None
    since = tracked.checkpoint()
    write(tracked.path, 11 * MIB, b"changed")
    xfs = "xfs" in store.name
    run(*(["xfs_fsr", "-v"] if xfs else ["btrfs", "filesystem", "defragment", "-f"]), tracked.path)
    answer = tracked.changed(since)
    assert assert_covers(tracked, since, answer) == blocks((11 * MIB, 7))
    run(*(["xfs_fsr"] if xfs else ["btrfs", "filesystem", "defragment", "-f"]), since.state["copy"])
    write(tracked.path, 13 * MIB, b"changed")
    answer, _reasons = tracked.ask(since, None)
    assert answer is None or assert_covers(tracked, since, answer.extents) == blocks((11 * MIB, 7), (13 * MIB, 7))


def test_more_extents_than_one_call_returns(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fiemap, "_EXTENTS", 3)
    since = tracked.checkpoint()
    written = [(place, 1) for place in range(0, SIZE, 100_000)]
    for offset, _length in written:
        write(tracked.path, offset, b"#")
    answer = tracked.changed(since)
    assert answer == blocks(*written)
    assert_covers(tracked, since, answer)


def test_the_window_of_an_image_has_its_own_offsets(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    for place in (MIB - BLOCK, MIB, 3 * MIB - BLOCK, 3 * MIB):
        write(tracked.path, place, b"#")
    window = tracked.volume.window(MIB, 2 * MIB)
    assert tracked.changed(since, window) == blocks((0, 1), (2 * MIB - BLOCK, 1))


def test_an_image_is_found_through_a_symbolic_link(tracked: Tracked, tmp_path: Path) -> None:
    link = tmp_path / "link.img"
    link.symlink_to(tracked.path)
    by_link = Tracked(link)
    since = by_link.checkpoint()
    assert Path(since.state["copy"]).parent == tracked.path.parent
    assert list(tmp_path.iterdir()) == [link]
    write(link, 3 * MIB, b"changed")
    with hold(link) as frozen:
        assert by_link.changed(since, frozen.volume) == blocks((3 * MIB, 7))


# -- the kept copy


def test_a_copy_that_is_gone_is_declined(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    Path(since.state["copy"]).unlink()
    reason = tracked.declined(since)
    assert since.state["copy"] in reason
    assert "No such file" in reason


def swap(copy: Path, image: Path) -> None:
    copy.unlink()
    run("cp", "--reflink=always", image, copy)


def swap_for_a_copy_of_another_snapshot(copy: Path, image: Path) -> None:
    other = Path(Tracked(image).checkpoint("another").state["copy"])
    other.rename(copy)


def remove_the_mark(copy: Path, _image: Path) -> None:
    os.removexattr(copy, "user.blockferry.snapshot")


def copy_over_it(copy: Path, image: Path) -> None:
    run("cp", "--reflink=always", image, copy)
    assert os.getxattr(copy, "user.blockferry.snapshot")


def empty_it(copy: Path, _image: Path) -> None:
    os.truncate(copy, 0)


def write_to_it(copy: Path, _image: Path) -> None:
    write(copy, 5 * MIB, b"#")


@pytest.mark.parametrize(
    "harm",
    [swap, swap_for_a_copy_of_another_snapshot, remove_the_mark, copy_over_it, empty_it, write_to_it],
)
def test_a_copy_that_is_not_what_it_was_is_declined(tracked: Tracked, harm) -> None:
    since = tracked.checkpoint()
    write(tracked.path, 3 * MIB, b"changed")
    assert tracked.changed(since) == blocks((3 * MIB, 7))
    harm(Path(since.state["copy"]), tracked.path)
    assert since.state["copy"] in tracked.declined(since)


def test_a_copy_stays_what_it_was_whoever_reads_it(tracked: Tracked, store: Path) -> None:
    since = tracked.checkpoint()
    write(tracked.path, 3 * MIB, b"changed")
    Path(since.state["copy"]).read_bytes()
    os.sync()
    run("mount", "-o", "remount,ro", store)
    run("mount", "-o", "remount,rw", store)
    assert tracked.changed(since) == blocks((3 * MIB, 7))


def test_a_copy_on_another_filesystem_is_declined(tracked: Tracked, tmp_path: Path) -> None:
    since = tracked.checkpoint()
    copy = Path(since.state["copy"])
    moved = tmp_path / "moved"
    run("cp", "--preserve=all", copy, moved)
    copy.unlink()
    copy.symlink_to(moved)
    assert since.state["copy"] in tracked.declined(since)


def test_release_removes_the_copy_and_nothing_else(tracked: Tracked) -> None:
    image = tracked.path.read_bytes()
    first, second = tracked.checkpoint("first"), tracked.checkpoint("second")
    beside = {path.name for path in tracked.path.parent.iterdir()}
    assert beside == {"disk.img", ".disk.img.blockferry-first", ".disk.img.blockferry-second"}
    reflink.blockferry_release_checkpoint(first)
    reflink.blockferry_release_checkpoint(first)
    assert {path.name for path in tracked.path.parent.iterdir()} == {"disk.img", ".disk.img.blockferry-second"}
    assert tracked.changed(second) == ExtentSet.empty()
    assert tracked.path.read_bytes() == image


def test_release_leaves_alone_what_is_not_the_copy(tracked: Tracked) -> None:
    since = tracked.checkpoint()
    copy = Path(since.state["copy"])
    os.removexattr(copy, "user.blockferry.snapshot")
    reflink.blockferry_release_checkpoint(since)
    copy.unlink()
    copy.symlink_to(tracked.path)
    reflink.blockferry_release_checkpoint(since)
    assert copy.is_symlink()
    others = [
        Checkpoint("reflink", since.snapshot, {"copy": str(tracked.path)}),
        Checkpoint("reflink", since.snapshot, {"copy": "/nowhere"}),
        Checkpoint("reflink", since.snapshot, {}),
        Checkpoint("bpf", since.snapshot, since.state),
    ]
    for other in others:
        reflink.blockferry_release_checkpoint(other)
    assert tracked.path.exists()


def test_the_copy_is_its_owners_alone_and_takes_no_room(tracked: Tracked, store: Path) -> None:
    os.sync()
    free = os.statvfs(store).f_bavail
    copy = Path(tracked.checkpoint().state["copy"])
    os.sync()
    assert copy.stat().st_mode & 0o077 == 0
    assert (free - os.statvfs(store).f_bavail) * os.statvfs(store).f_bsize < 2 * MIB
    assert copy.read_bytes() == tracked.path.read_bytes()


def test_a_name_that_is_taken_is_left_alone(tracked: Tracked) -> None:
    taken = tracked.path.with_name(".disk.img.blockferry-mine")
    taken.write_text("somebody's")
    reasons: list[str] = []
    assert reflink.blockferry_checkpoint(tracked.volume, "mine", "", reasons.append) is None
    assert "File exists" in reasons[0]
    assert taken.read_text() == "somebody's"


def test_where_nothing_may_be_written_the_reason_is_told(tracked: Tracked, store: Path) -> None:
    run("mount", "-o", "remount,ro", store)
    try:
        reasons: list[str] = []
        assert reflink.blockferry_checkpoint(tracked.volume, "x", "", reasons.append) is None
    finally:
        run("mount", "-o", "remount,rw", store)
    assert "Read-only file system" in reasons[0]


# -- kinds of files


def test_what_btrfs_compressed_has_changed(tmp_path: Path) -> None:
    """The addresses of compressed extents say nothing of what lies where in them."""
    with filesystem("btrfs", tmp_path, "compress-force=zstd") as store:
        image = store / "disk.img"
        image.write_bytes(b"all work and no play " * (SIZE // 21 + 1))
        os.truncate(image, SIZE)
        tracked = Tracked(image)
        since = tracked.checkpoint()
        write(image, 3 * MIB, os.urandom(70_000))
        answer = tracked.changed(since)
        assert answer == ExtentSet.whole(SIZE)
        assert_covers(tracked, since, answer)


def test_a_btrfs_image_without_copy_on_write_is_tracked(tmp_path: Path) -> None:
    with filesystem("btrfs", tmp_path) as store:
        image = store / "disk.img"
        image.touch()
        run("chattr", "+C", image)
        image.write_bytes(os.urandom(SIZE))
        tracked = Tracked(image)
        since = tracked.checkpoint()
        for data in (b"one", b"another"):  # the second one in place: the first has made it its own
            write(image, 3 * MIB, data)
            os.sync()
        answer = tracked.changed(since)
        assert answer == blocks((3 * MIB, 7)) == assert_covers(tracked, since, answer)


def test_a_filesystem_without_reflinks_is_passed_over_in_silence(tmp_path: Path) -> None:
    with filesystem("ext4", tmp_path, size=64 * MIB) as store:
        image = store / "disk.img"
        image.write_bytes(os.urandom(MIB))
        reasons: list[str] = []
        assert reflink.blockferry_checkpoint(Tracked(image).volume, "x", "", reasons.append) is None
        assert reasons == []
        assert [path.name for path in store.iterdir() if path.is_file()] == ["disk.img"]


def test_a_device_is_somebody_elses(tmp_path: Path, attach: Attach) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB))
    reasons: list[str] = []
    assert reflink.blockferry_checkpoint(Volume.discover(attach(image)), "x", "", reasons.append) is None
    assert reasons == []
