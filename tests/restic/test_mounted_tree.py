"""A tree that is mounted through FUSE: what its reader sees, and that no way to end leaves the mount behind."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from blockferry.fuse import mounted

PROGRAM = Path(__file__).with_name("mounting.py")


@pytest.fixture(scope="module")
def mounting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mounting", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


def is_mounted(name: str) -> bool:
    return f"/{name}/tree " in Path("/proc/self/mountinfo").read_text()


def test_a_reader_sees_the_tree(mounting: ModuleType, name: str) -> None:
    with mounted(mounting.OneFile(), name=name) as path:
        assert path.parent.name == name
        assert path.parent.stat().st_mode & 0o077 == 0
        assert [entry.name for entry in path.iterdir()] == ["file"]
        facts = (path / "file").stat()
        assert (facts.st_size, facts.st_ino, facts.st_uid, facts.st_nlink) == (mounting.SIZE, 1 << 40, 0, 1)
        assert facts.st_mtime_ns == facts.st_ctime_ns == 1_700_000_000_123_456_789
        assert (path / "file").read_bytes() == mounting.content(0, mounting.SIZE)
        with (path / "file").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 1000, mounting.SIZE - 10) == mounting.content(mounting.SIZE - 10, 10)
            assert os.lseek(file.fileno(), 5, os.SEEK_HOLE) == mounting.HOLE
            assert os.lseek(file.fileno(), 5, os.SEEK_DATA) == 5
            with pytest.raises(OSError, match="No such device or address"):
                os.lseek(file.fileno(), mounting.HOLE, os.SEEK_DATA)
        for attempt, number in (
            (lambda: (path / "other").stat(), errno.ENOENT),
            (lambda: (path / "new").touch(), errno.EROFS),
            (lambda: os.listxattr(path / "file"), errno.EOPNOTSUPP),
        ):
            with pytest.raises(OSError, match=r"\[Errno") as caught:
                attempt()
            assert caught.value.errno == number
    assert not is_mounted(name)
    assert not path.parent.exists()


def test_another_program_may_work_in_it(mounting: ModuleType, name: str) -> None:
    with mounted(mounting.OneFile(), name=name) as path:
        done = subprocess.run(
            ["env", f"--chdir={path}", "wc", "-c", "file"], capture_output=True, text=True, check=True
        )
    assert done.stdout == f"{mounting.SIZE} file\n"


@pytest.mark.root
def test_it_is_taken_away_although_somebody_holds_a_file_open(mounting: ModuleType, name: str) -> None:
    with contextlib.ExitStack() as held:
        with mounted(mounting.OneFile(), name=name) as path:
            file = held.enter_context((path / "file").open("rb", buffering=0))
        assert not is_mounted(name)
        with pytest.raises(OSError, match="not connected"):
            file.read(1)


def test_two_of_one_name_live_side_by_side(mounting: ModuleType, name: str) -> None:
    with mounted(mounting.OneFile(), name=name) as first, mounted(mounting.OneFile(), name=name) as second:
        assert (first.parent.name, second.parent.name) == (name, f"{name}-2")
    with mounted(mounting.OneFile(), name=name) as again:
        assert again == first


@contextlib.contextmanager
def mounting_process(name: str, *user: str, runtime: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if runtime is not None:
        environment["XDG_RUNTIME_DIR"] = str(runtime)
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), name, *user], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert "['file']" in process.stdout.readline()
            assert is_mounted(name)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_it_does_not_outlive_its_process(name: str, number: signal.Signals) -> None:
    with mounting_process(name) as process:
        process.send_signal(number)
        process.wait(20)
    gone_soon(name)


@pytest.mark.root
def test_it_does_not_outlive_the_process_of_an_ordinary_user(name: str, tmp_path: Path) -> None:
    if Path("/usr/bin/fusermount3").stat().st_mode & 0o4000 == 0:
        pytest.skip("fusermount3 is not set-user-ID: ordinary users cannot mount")
    if not Path("/etc/mtab").exists():
        pytest.skip("ordinary users unmount only what /etc/mtab lists: ln -s ../proc/self/mounts /etc/mtab")
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    os.chown(runtime, 65534, 65534)
    for parent in runtime.parents[:-1]:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    with mounting_process(name, "65534", runtime=runtime) as process:
        process.kill()
        process.wait()
    gone_soon(name)


def gone_soon(name: str) -> None:
    deadline = time.monotonic() + 20
    while is_mounted(name):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_killed_process_left_is_cleared_away_by_the_next(mounting: ModuleType, name: str) -> None:
    with mounting_process(name) as process:
        process.kill()
        process.wait()
    with mounted(mounting.OneFile(), name=f"{name}-next") as path:
        assert not (path.parent.parent / name).exists()
