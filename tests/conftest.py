"""What tests of every area share: a home of their own for all tools, loop devices, mounts."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands_support import Depot, new_depot

Attach = Callable[..., str]
Mount = Callable[..., Path]


def pytest_configure() -> None:
    """Have signals that we are to ignore, by nohup or in a shell's background, reach what tests start.

    What is ignored is inherited; a handler is not.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not {"BLOCKFERRY_TEST_THOROUGH", "BLOCKFERRY_TEST_GUEST", "BLOCKFERRY_VM"} & os.environ.keys():
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # What takes minutes on one processor begins first, and the others take the rest.
    items.sort(key=lambda item: item.get_closest_marker("vm") is None)
    if os.geteuid() == 0:
        return
    no_root = pytest.mark.skip(reason="needs root for loop devices and mounts: run scripts/test with sudo")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(no_root)


@pytest.fixture(scope="session", autouse=True)
def home_of_the_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep borg, restic and blockferry away from the user's own repositories, caches, keys, state and configuration."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("BORG_", "RESTIC_", "BLOCKFERRY_")):
                patch.delenv(name)
        patch.setenv("BORG_BASE_DIR", str(home / "borg"))
        patch.setenv("RESTIC_CACHE_DIR", str(home / "restic"))
        patch.setenv("BLOCKFERRY_STATE_DIR", str(home / "state"))
        (home / "config.yaml").touch()
        patch.setenv("BLOCKFERRY_CONFIG", str(home / "config.yaml"))
        yield home


@pytest.fixture(params=["borg", "restic"])
def depot(request: pytest.FixtureRequest, tmp_path: Path) -> Depot:
    return new_depot(request.param, tmp_path / "repository")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory tree with files of many sizes and kinds."""
    top = tmp_path_factory.mktemp("files")
    chance = random.Random(7)
    for number in range(150):
        path = top / f"d{number % 12}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(chance.choice([0, 13, 4096, 70_000, 300_000])))
        os.utime(path, ns=(0, chance.randrange(10**18)))
    (top / "text").write_text("all work and no play makes a dull boy\n" * 50_000)
    (top / "link").symlink_to("text")
    os.link(top / "text", top / "hard")
    with (top / "sparse").open("wb") as sparse:
        sparse.seek(20 << 20)
        sparse.write(b"the end")
    return top


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Return a function that shows an image as a loop device, `attach(image, "--read-only")`, until the test ends."""
    with contextlib.ExitStack() as attached:

        def attach_image(image: Path, *options: str) -> str:
            command = ["losetup", "--find", "--show", *options, str(image)]
            device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            attached.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return device

        yield attach_image


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts a device or image until the test ends: `mount(image, "ro")` returns the place."""
    with contextlib.ExitStack() as mounted:

        def mount_volume(volume: Path | str, *options: str) -> Path:
            place = tmp_path / f"mounted-{len(list(tmp_path.glob('mounted-*')))}"
            place.mkdir()
            chosen = ["-o", ",".join(options)] if options else []
            subprocess.run(["mount", *chosen, str(volume), str(place)], check=True)
            mounted.callback(_unmount, place)
            return place

        yield mount_volume


def _unmount(place: Path) -> None:
    """Unmount unless the test did so itself.

    Mount namespaces that other tests make have copies of all mounts, and so keep this test's loop devices, and what
    these lie on, for as long as they last.
    """
    give_up = time.monotonic() + 60
    while place.is_mount() and subprocess.run(["umount", str(place)], check=time.monotonic() > give_up).returncode:
        time.sleep(0.5)
