"""Filesystems frozen for a backup, and thawed whatever becomes of it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockferry.errors import UnstableVolumeError, VolumeError
from blockferry.freeze import suspension
from blockferry.freeze.watchdog import FIFREEZE, FITHAW
from blockferry.hookspecs import FreezeOptions
from blockferry.snapshot import Stability
from conftest import Attach, Mount
from freeze_support import hold, keep_open, make_image, read

pytestmark = pytest.mark.root

LONG = FreezeOptions(fsfreeze_seconds=60)


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def volume(request: pytest.FixtureRequest, tmp_path: Path, attach: Attach, mount: Mount) -> tuple[str, Path]:
    """A device and where it is mounted."""
    return mounted_volume(request.param, tmp_path, attach, mount)


@pytest.fixture
def ext4(tmp_path: Path, attach: Attach, mount: Mount) -> tuple[str, Path]:
    return mounted_volume("ext4", tmp_path, attach, mount)


def mounted_volume(filesystem: str, tmp_path: Path, attach: Attach, mount: Mount) -> tuple[str, Path]:
    device = attach(make_image(tmp_path / "disk.img", filesystem, {"ext4": 32}.get(filesystem, 400) << 20))
    return device, mount(device)


def is_frozen(place: Path) -> bool:
    """Tell whether a filesystem is frozen: one that is refuses to be frozen again."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FIFREEZE, 0)
        fcntl.ioctl(descriptor, FITHAW, 0)
    except OSError as error:
        return error.errno == errno.EBUSY
    else:
        return False
    finally:
        os.close(descriptor)


def thawed_within(place: Path, seconds: float) -> bool:
    """Tell whether a filesystem thaws in that time."""
    deadline = time.monotonic() + seconds
    while is_frozen(place):
        if time.monotonic() > deadline:
            subprocess.run(["fsfreeze", "--unfreeze", str(place)], check=True)
            return False
        time.sleep(0.01)
    return True


def test_writers_wait_and_the_device_holds_the_filesystem_whole(volume: tuple[str, Path]) -> None:
    device, place = volume
    for number in range(100):
        (place / f"file-{number}").write_bytes(b"x" * 5000)
    with hold(device, LONG) as frozen:
        assert frozen.stability is Stability.FROZEN
        assert frozen.method == f"fsfreeze of {place}"
        first = read(frozen)
        writer = subprocess.Popen([sys.executable, "-S", "-c", f"open({str(place / 'late')!r}, 'wb').write(b'x')"])
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(timeout=0.5)
        frozen.check()
        assert read(frozen) == first
    assert writer.wait(timeout=10) == 0


def test_a_second_backup_does_not_read_what_the_first_left_in_the_page_cache(volume: tuple[str, Path]) -> None:
    device, place = volume
    data = place / "data"
    data.write_bytes(b"OLD!" * 250_000)
    keeper = os.open(device, os.O_RDONLY)
    try:
        with hold(device, LONG) as frozen:
            assert b"OLD!" * 1000 in read(frozen)
        with data.open("r+b") as file:
            file.write(b"NEW!" * 250_000)
        with hold(device, LONG) as frozen:
            assert b"NEW!" * 1000 in read(frozen)
    finally:
        os.close(keeper)


def test_an_error_in_the_backup_thaws(ext4: tuple[str, Path]) -> None:
    device, place = ext4
    with pytest.raises(ZeroDivisionError), hold(device, LONG):
        raise ZeroDivisionError
    assert thawed_within(place, 2)


HOLDER = """
import sys, time
from freeze_support import hold
from blockferry.hookspecs import FreezeOptions
with hold(sys.argv[1], FreezeOptions(fsfreeze_seconds=60)):
    print("frozen", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killing_the_backup_thaws_within_a_second(ext4: tuple[str, Path], number: signal.Signals) -> None:
    device, place = ext4
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    backup = subprocess.Popen(
        [sys.executable, "-c", HOLDER, device], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert backup.stdout is not None
    with backup.stdout:
        assert backup.stdout.readline() == b"frozen\n"
        assert is_frozen(place)
        backup.send_signal(number)
        assert thawed_within(place, 1)
    assert backup.wait(timeout=10) != 0


def watchdog_of(process: int) -> int:
    """Return the watchdog that a process started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return next(int(child) for child in children if b"watchdog" in Path(f"/proc/{child}/cmdline").read_bytes())


def test_killing_the_watchdog_fails_the_backup_and_thaws(ext4: tuple[str, Path]) -> None:
    device, place = ext4
    with hold(device, LONG) as frozen:
        os.kill(watchdog_of(os.getpid()), signal.SIGKILL)
        with pytest.raises(VolumeError, match="thawed"):
            for _ in range(100):
                frozen.check()
                time.sleep(0.02)
    assert thawed_within(place, 2)


def test_the_watchdog_outlives_what_a_terminal_or_a_service_manager_sends_to_all(ext4: tuple[str, Path]) -> None:
    device, place = ext4
    with hold(device, LONG) as frozen:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(watchdog_of(os.getpid()), number)
        time.sleep(0.1)
        assert is_frozen(place)
        frozen.check()


def test_when_the_time_is_over_writers_go_on_and_the_backup_fails(ext4: tuple[str, Path]) -> None:
    device, place = ext4
    with hold(device, FreezeOptions(fsfreeze_seconds=0.5)) as frozen:
        frozen.check()
        assert thawed_within(place, 2)
        with pytest.raises(VolumeError, match=r"0\.5 s for which it may be frozen were over") as raised:
            frozen.check()
        assert "--fsfreeze" in raised.value.remedy


def test_threads_that_check_at_once_do_not_take_each_others_answers(
    ext4: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, _place = ext4
    monkeypatch.setattr(suspension, "_ASK_SECONDS", 0.0)  # every check is one that asks

    with hold(device, FreezeOptions(fsfreeze_seconds=20)) as frozen, ThreadPoolExecutor(8) as readers:

        def check_often() -> None:
            for _ in range(50):
                frozen.check()

        for reader in [readers.submit(check_often) for _ in range(8)]:
            reader.result()


def test_somebody_else_thawing_fails_the_backup(ext4: tuple[str, Path]) -> None:
    device, place = ext4
    with hold(device, LONG) as frozen:
        frozen.check()
        subprocess.run(["fsfreeze", "--unfreeze", str(place)], check=True)
        with pytest.raises(VolumeError, match="thawed it"):
            for _ in range(100):
                frozen.check()
                time.sleep(0.02)
    assert thawed_within(place, 2)


def test_what_somebody_else_froze_is_left_frozen(ext4: tuple[str, Path]) -> None:
    device, place = ext4
    subprocess.run(["fsfreeze", "--freeze", str(place)], check=True)
    try:
        with pytest.raises(UnstableVolumeError, match=f"{place} cannot be frozen: Device or resource busy"):
            hold(device, LONG).__enter__()
        assert is_frozen(place)
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(place)], check=True)


def test_an_image_is_frozen_by_way_of_its_mount(tmp_path: Path, mount: Mount) -> None:
    store = mount(make_image(tmp_path / "store.img", "ext4", 64 << 20))  # one without reflinks
    image = make_image(store / "guest.img", "ext4", 16 << 20)
    place = mount(image)
    with hold(image, LONG) as frozen:
        assert frozen.stability is Stability.FROZEN
        assert frozen.method == f"fsfreeze of {place}"
        assert is_frozen(place)


def test_a_filesystem_mounted_twice_is_frozen_once(ext4: tuple[str, Path], mount: Mount) -> None:
    device, place = ext4
    second = mount(device)
    with hold(device, LONG) as frozen:
        assert frozen.method in (f"fsfreeze of {place}", f"fsfreeze of {second}")
    assert thawed_within(place, 2)


def test_a_raw_writer_beside_the_filesystem_is_not_stopped_by_freezing(ext4: tuple[str, Path]) -> None:
    device, _place = ext4
    writer = keep_open(device)
    try:
        with pytest.raises(UnstableVolumeError, match=r"not enough: process \d+"):
            hold(device, LONG).__enter__()
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("variable", ["BLOCKFERRY_STATE_DIR", "BORG_REPO", "RESTIC_CACHE_DIR", "XDG_CACHE_HOME"])
def test_what_the_backup_writes_to_is_never_frozen(
    ext4: tuple[str, Path], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, place = ext4
    monkeypatch.setenv(variable, str(place / "not" / "there" / "yet"))
    with pytest.raises(UnstableVolumeError, match=rf"{re.escape(str(place))} cannot be frozen: .* lies on it"):
        hold(device, LONG).__enter__()
    assert thawed_within(place, 2)
