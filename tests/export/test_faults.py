"""Exports that break off: the job must not take what is left for the volume, and nothing hinders the next one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from commands_support import Depot, command, run
from export_support import MIB, Host, job

pytestmark = pytest.mark.root

Attach = Callable[..., str]


@pytest.mark.parametrize("depot", ["borg", pytest.param("restic", marks=pytest.mark.thorough)], indirect=True)
def test_a_job_whose_export_is_killed_fails_and_so_does_its_release_and_the_next_one_works(
    depot: Depot, host: Host, volume: Path
) -> None:
    said = host.export(volume, image=True)
    shown = Path(said["volumes"][0]["content"])
    descriptor = os.open(shown, os.O_RDONLY)
    assert os.read(descriptor, MIB)
    host.kill()
    with pytest.raises(OSError):
        os.read(descriptor, MIB)
    with contextlib.suppress(OSError):
        os.close(descriptor)
    with pytest.raises(OSError):
        list(host.at.iterdir())
    assert job(depot, host.at, "torn").code != 0
    host.ferry("release").refused(1, "killed")
    assert list(host.at.iterdir()) == []
    assert host.ferry("release").code == 0
    host.export(volume)
    host.kill()
    host.export(volume)  # clears away by itself
    assert job(depot, host.at, "whole").code == 0
    assert host.release()["failure"] == ""


def test_a_volume_that_stops_holding_still_can_be_read_no_more_and_its_release_fails(host: Host, volume: Path) -> None:
    host.export(volume, image=True)
    shown = host.at / "vm.img.img"
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(volume)!r}, 'r+b')"])
    deadline = time.monotonic() + 20
    with shown.open("rb") as file:
        while time.monotonic() < deadline:
            try:
                file.seek(0)
                file.read(4096)
            except OSError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it could be read all the time")
    host.ferry("release").refused(1, "opened the image for writing")
    assert writer.wait(timeout=60) == 0
    assert list(host.at.iterdir()) == []


def test_a_volume_in_use_that_only_fsfreeze_could_hold_is_refused(
    host: Host, tmp_path: Path, mount: Callable[..., Path]
) -> None:
    image = tmp_path / "used.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    mount(image, "loop")
    host.ferry("export", image).refused(1, "nothing can make it hold still", "--allow-live")
    assert list(host.at.iterdir()) == []
    assert host.is_idle()
    said = host.ferry("export", image, "--allow-live", "--json").json()
    assert said["volumes"][0]["stability"] == "live"
    host.release()


def test_an_export_that_nobody_releases_ends_by_itself_and_its_release_says_so(host: Host, volume: Path) -> None:
    host.ferry("export", volume, "--max-age", "1s")
    deadline = time.monotonic() + 20
    while host.processes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(host.at.iterdir()) == []
    host.ferry("release").refused(1, "nobody released it within")
    assert host.ferry("release").code == 0


def test_another_job_neither_ends_an_export_nor_takes_its_place_while_its_own_job_runs(
    host: Host, volume: Path
) -> None:
    script = f"{' '.join(command('export', volume))} && read _; {' '.join(command('release'))}"
    first = subprocess.Popen(
        ["setsid", "sh", "-c", script], env=os.environ | host.env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (host.at / "vm.img.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    host.ferry("export", volume).refused(75, "another job")
    host.ferry("release").refused(1, "which still runs")
    assert (host.at / "vm.img.json").exists()
    host.kill()
    host.ferry("export", volume).refused(75, "another job")  # what the job reads next must not be another instant's
    first.communicate(b"\n")
    assert first.returncode == 1
    assert list(host.at.iterdir()) == []


@pytest.mark.thorough
def test_what_a_job_that_was_killed_has_left_is_replaced_unless_somebody_reads_it(host: Host, volume: Path) -> None:
    script = f"{' '.join(command('export', volume))} && kill -9 $$"
    subprocess.run(
        ["setsid", "--wait", "sh", "-c", script], env=os.environ | host.env, check=False, capture_output=True
    )
    first = (host.at / "vm.img.json").read_bytes()
    with (host.at / "vm.img.map").open("rb"):
        host.ferry("export", volume).refused(75, "another job")
    host.export(volume, at=host.directory / "elsewhere")
    assert list(host.at.iterdir()) == []
    assert (host.directory / "elsewhere" / "vm.img.json").read_bytes() != first
    assert len(host.processes()) == 1
    assert host.ferry("release", "vm.img").code == 0
    assert host.is_idle()


@pytest.mark.parametrize("holding", ["file", "mount"])
def test_a_directory_that_holds_something_is_refused_and_left_alone(
    host: Host, volume: Path, tmp_path: Path, holding: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with contextlib.ExitStack() as held:
        if holding == "mount":
            run("mount", "-t", "tmpfs", "none", place)
            held.callback(run, "umount", place)
        else:
            (place / "precious").touch()
        host.ferry("export", volume, "--at", place).refused(1, "--at")
    assert holding == "mount" or (place / "precious").exists()


def test_names_are_looked_up_and_mistakes_are_told_before_anything_is_held(host: Host, volume: Path) -> None:
    host.configure(f"volumes: {{disk: {{path: {volume}}}}}")
    host.ferry("export", "dosk").refused(2, "did you mean disk")
    host.ferry("export", volume, "disk").refused(2, "two of them")
    host.ferry("export", "disk", "--max-age", "soon").refused(2, "not a time")
    host.ferry("export", f"{volume}.not").refused(1, "not")
    assert host.is_idle()
