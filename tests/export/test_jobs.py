"""Real borg and real restic, run on an export as a user's job runs them: what they read, and what comes back.

It comes back by the commands of docs/inside-your-job.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands_support import Depot, new_depot, restic_first, run
from export_support import MIB, SEGMENT, Host, job
from pages_support import Page, run_shell

pytestmark = pytest.mark.root

PAGE = Page("inside-your-job.md")
TARGET = "/dev/sdX"


@pytest.fixture
def host(host: Host, volume: Path) -> Host:
    host.configure(f"volumes: {{home: {{path: {volume}}}}}")
    return host


def change(volume: Path, megabyte: int) -> None:
    """Write to 1 % of the volume, in one place that is in use."""
    with volume.open("r+b") as file:
        file.seek(megabyte * MIB)
        file.write(os.urandom(MIB))


def assert_same_files(image: Path, volume: Path) -> None:
    """Compare what both filesystems hold."""
    run("e2fsck", "-fn", image)
    for number in range(12):
        words = ["debugfs", "-R", f'cat "file {number}"']
        one, other = (
            subprocess.run([*words, each], check=True, capture_output=True).stdout for each in (image, volume)
        )
        assert one == other, number
        assert len(one) == 4 * MIB


def blocks() -> list[str]:
    """Return the shell blocks of the page that bring a volume back."""
    return PAGE.blocks(below="Getting it back")


def run_page(script: str, depot: Depot, host: Host, places: dict[str, object]) -> str:
    """Run blocks of the page with its example places replaced by real ones; return what they printed."""
    own = {"var/lib/blockferry/export": str(host.at).lstrip("/"), f"/srv/backup/{depot.tool}": depot.path}
    return run_shell(script, own | places, env=depot.env | host.env)


@restic_first
def test_the_second_run_reads_only_segments_that_changed_and_all_comes_back(
    depot: Depot, host: Host, volume: Path, tmp_path: Path
) -> None:
    host.export("home")
    assert job(depot, host.at, "first").code == 0
    assert 48 * MIB < host.release()["bytes_read"] < 72 * MIB
    change(volume, 40)
    said = host.export("home")
    assert job(depot, host.at, "second").code == 0
    assert host.release()["bytes_read"] == said["volumes"][0]["bytes_new"] == SEGMENT
    assert host.ferry("release", "--json").json()["released"] == []

    variables, from_borg, from_restic, assemble, _image, with_blockferry, _attach = blocks()
    places: dict[str, object] = {TARGET: tmp_path / "restored.img", "/var/tmp/volume": tmp_path / "scratch"}
    if depot.tool == "borg":
        script = variables + from_borg
        places["the-name-of-the-archive"] = "second"
    else:
        script = variables + from_restic
    run_page(script + assemble, depot, host, places)
    assert_same_files(tmp_path / "restored.img", volume)
    change(tmp_path / "restored.img", 40)
    run_page(script + with_blockferry, depot, host, places)
    assert_same_files(tmp_path / "restored.img", volume)


def test_an_image_is_read_as_far_as_it_is_in_use_and_not_at_all_when_nothing_changed(
    host: Host, volume: Path, tmp_path: Path
) -> None:
    depot = new_depot("borg", tmp_path / "repository")
    read = []
    for name in ("first", "second"):
        host.export("home", image=True)
        assert job(depot, host.at, name, "--sparse", "--chunker-params", "fixed,1048576").code == 0
        read.append(host.release()["bytes_read"])
    assert 48 * MIB < read[0] < 72 * MIB
    assert read[1] == 0
    variables, from_borg, _restic, _assemble, image, _blockferry, attach = blocks()
    archive = from_borg.partition("mkdir")[0]
    places = {TARGET: tmp_path / "restored.img", "the-name-of-the-archive": "second"}
    run_page(variables + archive + image, depot, host, places)
    assert_same_files(tmp_path / "restored.img", volume)
    if subprocess.run(["borg", "mount", "--help"], capture_output=True, check=False).returncode:
        return
    places["/mnt/archive"] = tmp_path / "archive"
    try:
        run_page(variables + archive + attach, depot, host, places)
    finally:
        host.ferry("detach", "restored.img")
        run("umount", "--lazy", tmp_path / "archive")


@pytest.mark.thorough
def test_a_job_that_failed_costs_nothing_but_its_own_work(depot: Depot, host: Host, volume: Path) -> None:
    host.export("home")
    assert job(depot, host.at, "first").code == 0
    host.release()
    change(volume, 40)
    host.export("home")  # of which no job reads anything
    host.release()
    change(volume, 20)
    host.export("home")
    assert job(depot, host.at, "third").code == 0
    assert host.release()["bytes_read"] == 2 * SEGMENT


@pytest.mark.parametrize("tool", ["borgmatic", "resticprofile", "autorestic"])
def test_the_page_shows_what_is_to_be_pasted(host: Host, volume: Path, tool: str) -> None:
    said = host.ferry("config", "generate", tool, "home").out
    said = said.replace(f" --config {host.env['BLOCKFERRY_CONFIG']}", "").replace(
        str(host.at), "/var/lib/blockferry/export"
    )
    said = said.replace(str(Path(sys.executable).with_name("blockferry")), "/usr/bin/blockferry")
    said = said.replace(str(volume), "/dev/vg/home")
    shown = PAGE.blocks("yaml")
    assert "".join(line for line in said.splitlines(keepends=True) if not line.startswith("#")) in shown
