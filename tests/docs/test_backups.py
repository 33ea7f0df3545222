"""The pages about trackers, parts, sets and groups: all that they have run is run, on one volume a page."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.extents import ExtentSet
from blockferry.fiemap import file_extents
from blockferry.manager import plugin_manager, repository_named
from changed_support import why_no_bpftrace
from changes_support import filesystem, write
from commands_support import Depot, blockferry, new_depot, run
from conftest import Attach, Mount
from pages_support import Page, run_shell, with_places
from sets_support import SharedVolume, common_record, make_set
from udev_support import wait_for

MIB = 1 << 20
APART = ["unshare", "--mount", "--propagation=private"]

pytestmark = pytest.mark.root


@pytest.fixture
def depot(host: Path, monkeypatch: pytest.MonkeyPatch) -> Depot:
    """A repository whose passphrase is in the environment."""
    made = new_depot("borg", host / "repository")
    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    return made


def in_etc(script: str) -> str:
    """Return a script that finds, and leaves, nothing where units are; to be run APART."""
    return f"for each in /etc/systemd/system /etc/tmpfiles.d; do mount -t tmpfs tmpfs $each; done\n{script}"


@pytest.mark.thorough
def test_only_what_changed(host: Path, depot: Depot, files: Path) -> None:
    track, part, of_a_set, prune = Page("changes.md").blocks()
    with filesystem("xfs", host) as store:
        image = store / "vm.img"
        run("truncate", "-s", "48M", image)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", files, image)
        places = {"/srv/vm.img": image, "borg:/srv/borg": depot.reference}
        assert "0 bytes changed since" in run_shell(track, places)
        write(image, 20 * MIB, os.urandom(MIB))
        run_shell(part, places)
        taken = depot.ferry("snapshots", "--json").json()["snapshots"]
        assert [each["tier"] for each in taken] == ["used", "changed", "changed", "changed"]
        assert [each["part"] for each in taken] == [False, False, True, False]
    repository = {"borg:/srv/borg": depot.reference}
    made = stored_set(depot.reference)
    run_shell(of_a_set, repository | {"3f9c0a11b2d4": made})
    left = depot.ferry("snapshots", "--json").json()["snapshots"]
    assert made not in [each["id"] for each in left]
    assert len(left) == len(taken) + 1
    run_shell(prune, repository)


def stored_set(reference: str) -> str:
    with contextlib.closing(repository_named(plugin_manager(), reference)) as repository:
        used, volume = ExtentSet.whole(1 << 20), SharedVolume(bytes(1 << 20))
        record = common_record(1 << 20, repository.unit(1 << 20))
        return make_set(repository, volume, used, [used], {}, record).snapshot.id


@pytest.mark.thorough
def test_tracking_by_bpftrace(host: Path, depot: Depot, files: Path, attach: Attach) -> None:
    if reason := why_no_bpftrace():
        pytest.skip(reason)
    track, from_boot_on = Page("tracking-bpf.md").blocks()
    image = host / "disk.img"
    run("truncate", "-s", "48M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", files, image)
    device = attach(image)
    try:
        run_shell(track, {"/dev/vg/home": device, "borg:/srv/borg": depot.reference})
    finally:
        blockferry("track", "stop", device)
    taken = depot.ferry("snapshots", "--json").json()["snapshots"]
    assert [each["tier"] for each in taken] == ["used", "changed"]
    run_shell(in_etc(from_boot_on), {}, prefix=APART)
    unit = (host / "systemctl.log").read_text().split()[-1]
    template = unit.removeprefix("blockferry-track@").removesuffix(".service")
    assert run("systemd-escape", "--unescape", "--path", template) == "/dev/vg/home\n"


@pytest.fixture
def data(host: Path, attach: Attach, mount: Mount) -> Iterator[tuple[str, Path]]:
    """A device, and where its filesystem is mounted: mail, and what a web server has."""
    image = host / "data.img"
    run("truncate", "-s", "64M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    device = attach(image)
    place = mount(device)
    mail = [f"mail/ann/{each}" for each in ("letter.odt", "archive/2019.lock", "inbox.lock")]
    for name in (*mail, "www/index.html", "htpasswd"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(os.urandom(300_000))
    os.sync()
    yield device, place


@pytest.mark.thorough
def test_groups_there_and_back(host: Path, depot: Depot, data: tuple[str, Path]) -> None:
    device, place = data
    define, groups, restore = Page("groups-define.md"), Page("groups.md"), Page("groups-restore.md")
    configured = {"/mnt/data": place, "borg:ssh://nas/./volumes": depot.reference}
    (host / "config.yaml").write_text(with_places(define.block("yaml"), configured))
    shown = run_shell(in_etc(define.block()), {}, prefix=APART)
    assert "mail" in shown
    assert "www" in shown
    said = run_shell(groups.block(), {"borg:/srv/borg": depot.reference})
    assert "mail: 6 entries below" in said
    assert "www: snapshot" in said
    assert blockferry("backup", "mail").code == 0  # latest
    listed, back, repair, look, *_without_blockferry = restore.blocks()
    repository = {"borg:/srv/backup/borg": depot.reference}
    assert "mail/ann/archive/2019.lock" in run_shell(listed, repository)
    run_shell(back, repository | {"/var/tmp/back": host / "back", "/var/tmp/some": host / "some"})
    letter = (place / "mail/ann/letter.odt").read_bytes()
    assert (host / "back/mail/ann/letter.odt").read_bytes() == letter
    assert {path.name for path in (host / "some").rglob("*") if path.is_file()} == {"letter.odt", "2019.lock"}
    look_into(look, host / "look", repository)
    with (place / "mail/ann/letter.odt").open("rb") as file:
        start = int(file_extents(file.fileno()).addresses[0])
    with open(device, "r+b") as disk:
        disk.seek(start)
        disk.write(os.urandom(3 * 4096))
    unmount, _end, repair = repair.partition("\n")
    run_shell(unmount, {"/mnt/data": place})
    wait_for(lambda: not is_held(device), "others to be done with the device")
    run_shell(repair, repository | {"/dev/vg/data": device})
    run("mount", device, place)
    assert (place / "mail/ann/letter.odt").read_bytes() == letter


def is_held(device: str) -> bool:
    """Tell whether somebody has a device: udevd looks at each that was written to, a test apart may still see it."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError:
        return True
    return False


def look_into(script: str, at: Path, places: dict[str, object]) -> None:
    """Run what shows the files of a group until it is ended, as the page says."""
    at.mkdir()
    with subprocess.Popen(["sh", "-euc", with_places(script, places | {"/mnt": at})]) as showing:
        try:
            wait_for(at.is_mount, "the files to be shown")
            assert (at / "mail/ann/letter.odt").exists()
        finally:
            run("umount", at)
    assert showing.returncode == 0
