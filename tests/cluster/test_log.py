"""Before-image logs: what was appended is read, whatever happened to the log, or the log is refused."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.cluster.log import LogLayer
from blockferry.cluster.log_writer import LogWriter, make_room
from blockferry.errors import LogError
from blockferry.exception_store import image_places
from blockferry.extents import ExtentSet

CHUNK = 512
"""An area has 32 pairs."""
CHUNKS = 150
SIZE = (CHUNKS - 1) * CHUNK + 100
"""The last chunk of the volume is a short one."""

Model = dict[int, bytes]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory: nobody cuts this machine's power, and a disk would take its time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def image(number: int, seed: int = 0, chunk: int = CHUNK, size: int = SIZE) -> bytes:
    return random.Random(number + 1000 * seed).randbytes(min(chunk, size - number * chunk))


def append(writer: LogWriter, numbers: list[int], seed: int = 0) -> Model:
    """Append images; return what has to be read of them."""
    model = {number: image(number, seed, writer.chunk, writer.size) for number in numbers}
    writer.append(np.array(numbers, np.int64), [memoryview(each) for each in model.values()])
    return model


def write(path: Path, numbers: list[int], seed: int = 0, chunk: int = CHUNK, size: int = SIZE) -> Model:
    """Make a log of one batch."""
    with LogWriter(path, chunk=chunk, size=size) as writer:
        return append(writer, numbers, seed)


def flat(model: Model, chunk: int = CHUNK, size: int = SIZE) -> bytes:
    """Return the volume with what was logged, and zeros."""
    volume = bytearray(size)
    for number, content in model.items():
        volume[number * chunk : number * chunk + len(content)] = content
    return bytes(volume)


def content(layer: LogLayer) -> Model:
    """Return all that a log says."""
    found = {}
    for number in layer.chunks.tolist():
        buffer = bytearray(min(layer.chunk, layer.size - number * layer.chunk))
        layer.read_into(number * layer.chunk, memoryview(buffer))
        found[number] = bytes(buffer)
    return found


def read(path: Path, size: int = SIZE) -> Model:
    with LogLayer(path, size) as layer:
        return content(layer)


# -- what was appended -------------------------------------------------------------------------------------------------


def test_aligned_images_pass_the_page_cache_by_and_are_read_all_the_same(tmp_path: Path) -> None:
    """Past the end of an area too, whose images are written in one run with it, and beside batches that are not."""
    chunk, count = 4096, 600
    model: Model = {}
    numbers = list(range(count))
    random.Random(2).shuffle(numbers)
    with LogWriter(tmp_path / "log", chunk=chunk, size=count * chunk) as writer:
        for begin in range(0, count, 50):
            some = numbers[begin : begin + 50]
            images = [memoryview(mmap.mmap(-1, chunk)) for _ in some]
            for number, each in zip(some, images, strict=True):
                each[:] = model[number] = image(number, chunk=chunk, size=count * chunk)
            aligned = images if begin % 150 else [memoryview(bytes(each)) for each in images]
            writer.append(np.array(some, np.int64), aligned)
    assert read(tmp_path / "log", count * chunk) == model


@given(data=st.data())
def test_a_log_reads_as_what_was_appended_and_zeros(data: st.DataObject) -> None:
    chunk = data.draw(st.sampled_from([512, 1024]))
    size = data.draw(st.integers(1, 150 * chunk))
    count = -(-size // chunk)
    left = data.draw(st.permutations(range(count)))
    model: Model = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "log"
        writer = LogWriter(path, chunk=chunk, size=size)
        while left and data.draw(st.booleans(), "goes on"):
            batch = data.draw(st.sampled_from([1, 2, 31, 32, 33, 64, 65]))
            model |= append(writer, left[:batch])
            left = left[batch:]
        writer.close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_size == int(image_places(len(model), len(model) + 1, chunk)[0]) * chunk
        with LogLayer(path, size) as layer:
            assert layer.extents == ExtentSet.from_pairs((n * chunk, len(each)) for n, each in model.items())
            expected = flat(model, chunk, size)
            start, end = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
            for first, last in ((0, size), (start, end)):
                buffer = bytearray(b"\xff" * (last - first))
                layer.read_into(first, memoryview(buffer))
                assert bytes(buffer) == expected[first:last]
            streamed = {offset: bytes(piece) for offset, piece in layer.stream(layer.extents, 3 * chunk)}
            assert b"".join(streamed.values()) == b"".join(each for _n, each in sorted(model.items()))


def test_a_log_of_many_areas_is_read_whole(place: Path) -> None:
    size = 5000 * CHUNK
    numbers = random.Random(1).sample(range(5000), 3000)
    with LogWriter(place / "log", chunk=CHUNK, size=size) as writer:
        model = append(writer, numbers[:2500]) | append(writer, numbers[2500:])
    assert read(place / "log", size) == model


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64])
def test_the_next_area_is_there_before_the_last_pair_of_one(place: Path, count: int) -> None:
    with LogWriter(place / "log", chunk=CHUNK, size=SIZE) as writer:
        model = append(writer, list(range(count)))
        assert read(place / "log") == model
        model |= append(writer, [100])
    assert read(place / "log") == model


def test_a_batch_is_two_writes_and_one_wait_for_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LogWriter(place / "log", chunk=CHUNK, size=SIZE) as writer:
        calls = noted(monkeypatch)
        append(writer, list(range(0, 140, 2)))  # over two ends of areas
        assert calls == ["pwritev", "pwritev", "fdatasync"]


def test_neighbours_in_a_log_are_read_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(place / "log", [40, *range(5, 25), 3])
    with LogLayer(place / "log", SIZE) as layer:
        calls = noted(monkeypatch)
        buffer = bytearray(20 * CHUNK - 50)
        layer.read_into(5 * CHUNK + 20, memoryview(buffer))
        assert calls == ["preadv"]
    assert bytes(buffer) == flat(model)[5 * CHUNK + 20 : 25 * CHUNK - 30]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of each call of the system that reads, writes or waits."""
    calls: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        call = getattr(os, name)
        return lambda *words: (calls.append(name), call(*words))[1]

    for name in ("pwrite", "pwritev", "preadv", "pread", "fdatasync", "fsync", "ftruncate"):
        monkeypatch.setattr(os, name, note(name))
    return calls


def test_threads_read_at_once(place: Path) -> None:
    model = write(place / "log", random.Random(2).sample(range(CHUNKS), 90))
    expected = flat(model)
    with LogLayer(place / "log", SIZE) as layer:

        def read_some(seed: int) -> bool:
            chance = random.Random(seed)
            for _ in range(200):
                start = chance.randrange(SIZE)
                buffer = bytearray(min(chance.randrange(1, 20 * CHUNK), SIZE - start))
                layer.read_into(start, memoryview(buffer))
                assert bytes(buffer) == expected[start : start + len(buffer)]
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read_some, range(8)))


def test_a_layer_closes_the_descriptor_that_it_was_given(place: Path) -> None:
    model = write(place / "log", [3, 7])
    descriptor = os.open(place / "log", os.O_RDONLY)
    layer = LogLayer(descriptor, SIZE)
    assert content(layer) == model
    layer.close()
    layer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    (place / "none").touch()
    descriptor = os.open(place / "none", os.O_RDONLY)
    with pytest.raises(LogError):
        LogLayer(descriptor, SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "lengths"),
    [
        ([5], [CHUNK]),  # is in the log
        ([6, 6], [CHUNK, CHUNK]),
        ([-1], [CHUNK]),
        ([CHUNKS], [CHUNK]),
        ([CHUNKS - 1], [CHUNK]),  # is a short one
        ([6], [CHUNK - 1]),
        ([6], [CHUNK, CHUNK]),
    ],
)
def test_a_batch_that_cannot_be_meant_is_refused_and_the_log_goes_on(
    place: Path, numbers: list[int], lengths: list[int]
) -> None:
    with LogWriter(place / "log", chunk=CHUNK, size=SIZE) as writer:
        model = append(writer, [5])
        with pytest.raises(ValueError, match="chunk"):
            writer.append(np.array(numbers, np.int64), [memoryview(bytes(length)) for length in lengths])
        writer.append(np.empty(0, np.int64), [])
        model |= append(writer, [6, CHUNKS - 1])
        with pytest.raises(ValueError, match="logged twice"):
            append(writer, [6])
    assert read(place / "log") == model


def test_a_log_is_made_only_under_a_name_that_is_free(place: Path) -> None:
    model = write(place / "log", [5])
    with pytest.raises(LogError, match="File exists"):
        LogWriter(place / "log", chunk=CHUNK, size=SIZE)
    with pytest.raises(LogError, match="No such file"):
        LogWriter(place / "nowhere" / "log", chunk=CHUNK, size=SIZE)
    for chunk in (0, 256, 1000, 32 << 20):
        with pytest.raises(ValueError, match="chunks of"):
            LogWriter(place / "other", chunk=chunk, size=SIZE)
    assert os.listdir(place) == ["log"]
    assert read(place / "log") == model


def pair(index: int, old: int, new: int) -> tuple[int, bytes]:
    return CHUNK + index * 16, struct.pack("<2Q", old, new)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((0, b"snAp"), "does not begin"),
        ((4, bytes(4)), "void"),
        ((4, struct.pack("<I", 2)), "void"),
        ((8, struct.pack("<I", 2)), "does not begin"),
        ((12, struct.pack("<I", 0)), "chunks of 0 bytes"),
        ((12, struct.pack("<I", 3)), "chunks of 1536 bytes"),
        ((12, struct.pack("<I", 2)), "do not have"),  # finds its pairs in an image
        ((12, struct.pack("<I", 1 << 15)), "no end"),  # has no room for an area
        ((12, struct.pack("<I", 1 << 16)), "chunks of"),
        ((12, struct.pack("<I", 2**31)), "chunks of"),
        (pair(1, CHUNKS, 3), "do not have"),
        (pair(1, 2**63, 3), "do not have"),
        (pair(1, 2**64 - 1, 3), "do not have"),
        (pair(1, 6, 43), "do not have"),
        (pair(1, 6, 2**63), "do not have"),
        (pair(1, 6, 2**64 - 1), "do not have"),
        (pair(1, 6, 1), "own areas"),
        (pair(1, 6, 34), "own areas"),
        (pair(1, 0, 3), "twice"),
        (pair(1, 6, 2), "twice"),
    ],
)
def test_a_log_that_was_tampered_with_is_refused(place: Path, change: tuple[int, bytes], reason: str) -> None:
    write(place / "log", list(range(39)))  # 39 images, 2 areas and a header: 42 chunks
    with (place / "log").open("r+b") as file:
        file.seek(change[0])
        file.write(change[1])
    with pytest.raises(LogError, match=reason):
        LogLayer(place / "log", SIZE)


def test_a_log_of_a_smaller_volume_than_it_names_is_refused(place: Path) -> None:
    write(place / "log", [0, 5])
    with pytest.raises(LogError, match="do not have"):
        LogLayer(place / "log", 5 * CHUNK)


def test_a_log_without_an_end_is_refused(place: Path) -> None:
    write(place / "log", list(range(32)))
    os.truncate(place / "log", 34 * CHUNK)  # without the second area
    with pytest.raises(LogError, match="no end"):
        LogLayer(place / "log", SIZE)


def test_what_is_no_file_with_a_log_is_refused(place: Path) -> None:
    (place / "empty").touch()
    for name, reason in (("empty", "cut short"), ("none", "No such file"), (".", "Is a directory")):
        with pytest.raises(LogError, match=reason):
            LogLayer(place / name, SIZE)


@given(changes=st.lists(st.tuples(st.integers(0, 2 * CHUNK - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_whatever_is_in_a_table_a_log_is_read_or_refused_in_words(changes: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "log"
        write(path, list(range(0, 60, 2)))
        damaged = bytearray(path.read_bytes())
        for place, value in changes:
            damaged[place] = value
        path.write_bytes(damaged)
        try:
            with LogLayer(path, SIZE) as layer:
                assert layer.extents.end <= SIZE
                content(layer)
        except LogError as error:
            assert str(path) in error.message
            assert error.remedy


def test_a_log_of_the_kernel_with_holes_is_read(place: Path) -> None:
    model = write(place / "log", [5, 6, 7])
    with (place / "log").open("r+b") as file:
        file.seek(pair(1, 0, 0)[0])
        file.write(pair(1, 7, 4)[1] + bytes(16))  # chunk 6 was given a place, and never got its pair
    del model[6]
    assert read(place / "log") == model


# -- what happens meanwhile --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def kill_after(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """Let so many bytes more be written."""
    real = os.pwritev

    def some(descriptor: int, pieces: list[memoryview], offset: int) -> int:
        nonlocal left
        whole = b"".join(pieces)
        os.pwrite(descriptor, whole[:left], offset)
        if left < len(whole):
            raise Killed
        left -= len(whole)
        return len(whole)

    monkeypatch.setattr(os, "pwritev", some if left >= 0 else real)


# In the images, and among the pairs after four of them, or after four and an area.
LEFT = sorted({*range(0, 6 * CHUNK, 67), *(end * CHUNK + byte for end in (4, 5) for byte in range(0, 70, 3))})


# Before the end of an area, at one, and over one.
@pytest.mark.parametrize("before", [3, 28, 30, 31, 32])
def test_a_writer_killed_at_any_byte_leaves_a_log_that_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    path = place / "log"
    batch = [140, 90, 141, 80]
    for left in LEFT:
        path.unlink(missing_ok=True)
        writer = LogWriter(path, chunk=CHUNK, size=SIZE)
        model = append(writer, list(range(before)))
        with monkeypatch.context() as patch:
            kill_after(patch, left)
            try:
                append(writer, batch)
            except Killed:
                with pytest.raises(LogError, match="takes no more"):
                    append(writer, [120])
            else:
                assert left >= 4 * CHUNK
                writer.close()
                break
        writer.close()
        found = read(path)
        assert found == model | {number: image(number) for number in found if number >= before}
    else:
        pytest.fail("was never done")


@pytest.mark.parametrize("count", [5, 31, 32, 33])
def test_a_log_that_is_cut_at_any_byte_is_refused(place: Path, count: int) -> None:
    write(place / "log", list(range(count)))
    whole = (place / "log").read_bytes()
    for length in range(0, len(whole), 7):
        (place / "cut").write_bytes(whole[:length])
        with pytest.raises(LogError):
            LogLayer(place / "cut", SIZE)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("before", [3, 30])
def test_a_log_is_as_before_whichever_call_fails(
    place: Path, monkeypatch: pytest.MonkeyPatch, before: int, lasting: bool
) -> None:
    path = place / "log"
    for number in range(3):
        path.unlink(missing_ok=True)
        writer = LogWriter(path, chunk=CHUNK, size=SIZE)
        model = append(writer, list(range(before)))
        start = path.read_bytes()
        with monkeypatch.context() as patch:
            fail(patch, number, lasting)
            with pytest.raises(LogError, match="cannot be written: Input/output error"):
                append(writer, [100, 101, 102, 103])
        with pytest.raises(LogError, match="takes no more"):
            append(writer, [104])
        writer.close()
        found = read(path)
        if not lasting:
            assert found == model
            assert path.read_bytes() == start
        assert found == model | {number: image(number) for number in found if number >= before}


def fail(monkeypatch: pytest.MonkeyPatch, number: int, lasting: bool) -> None:
    """Have one call that writes fail, and all after it if that lasts."""
    calls = 0

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*words: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > number and (lasting or calls == number + 1):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*words)

        return call

    for name in ("pwritev", "fdatasync", "ftruncate"):
        monkeypatch.setattr(os, name, failing(name))


@pytest.mark.root
def test_a_full_disk_is_said_and_the_log_stays_as_it_was(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=True)
    try:
        path, size = tmp_path / "log", 4096 * 400
        with LogWriter(path, chunk=4096, size=size) as writer:
            model = append(writer, list(range(50)))
            length = path.stat().st_size
            with pytest.raises(LogError, match="No space left on device") as caught:
                append(writer, list(range(100, 130)))
            assert "Make room" in caught.value.remedy
            assert path.stat().st_size == length
            assert read(path, size) == model
            with pytest.raises(LogError, match="takes no more"):
                append(writer, [200])
        assert read(path, size) == model
        (tmp_path / "filler").write_bytes(bytes(256 * 1024 - 4096 * 53))
        with pytest.raises(LogError, match="cannot be made: No space left"):
            LogWriter(tmp_path / "second", chunk=4096, size=size)
        assert sorted(os.listdir(tmp_path)) == ["filler", "log"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_log_is_made_over_room_and_over_an_older_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    make_room(path, 40 * 4096)
    with pytest.raises(LogError):
        LogLayer(path, 100 * 4096)
    for turn in range(3):
        with LogWriter(path, chunk=4096, size=100 * 4096, over=True) as writer:
            chunks = np.arange(turn, 100, 7)
            writer.append(chunks, [memoryview(bytes([turn + 1]) * 4096) for _ in chunks])
        with LogLayer(path, 100 * 4096) as layer:
            assert layer.chunks.tolist() == chunks.tolist()
            read = bytearray(4096)
            layer.read_into(turn * 4096, memoryview(read))
            assert read == bytes([turn + 1]) * 4096
        assert path.stat().st_size == 40 * 4096
    make_room(path, 10 * 4096)
    assert path.stat().st_size == 10 * 4096
    with pytest.raises(LogError):
        LogLayer(path, 100 * 4096)
