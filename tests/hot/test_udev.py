"""An armed device that shows up is restored: a real udevd, and what `blockferry watch` or systemd's unit does then."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pyudev

from blockferry.errors import UsageError
from blockferry.hot import arming, client, udev
from blockferry.hot.arming import Armed, Match
from blockferry.service import DeclinedError, NobodyThereError, wait_until_free
from commands_support import Depot, Done, blockferry, command, new_depot, run
from udev_support import Disk, disks, properties, rule, udevd, wait_for

pytestmark = pytest.mark.root

MIB = 1 << 20
BYTES = (2 + (os.cpu_count() or 1)) * 8 * MIB
"""More than hydration reads at once, before it minds its rate."""
SIZE = str(BYTES)
WORDS = "all work and no play makes a dull boy\n" * 50_000
PARTITION = "11111111-2222-3333-4444-555555555555"


@dataclasses.dataclass(frozen=True)
class Filled(Depot):
    snapshots: list[str]


@pytest.fixture(scope="module")
def depot(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A repository with a snapshot of a partitioned disk, and a later one of an ext4 filesystem."""
    place = tmp_path_factory.mktemp("depot")
    depot = new_depot("borg", place / "repository")
    parts, volume, content = place / "parts.img", place / "volume.img", place / "content"
    run("truncate", "-s", SIZE, parts)
    run("sfdisk", "--quiet", parts, input=f"label: gpt\nstart=2048, size=8M, uuid={PARTITION}\n")
    content.mkdir()
    (content / "words").write_text(WORDS)
    run("truncate", "-s", SIZE, volume)
    run("mke2fs", "-q", "-t", "ext4", "-d", content, volume)
    snapshots = [depot.ferry("backup", image, "--json").json()["snapshot"] for image in (parts, volume)]
    return Filled(depot.tool, depot.path, depot.env, snapshots)


class Host:
    """A machine whose udev knows what is armed: a state directory of its own, and the rule for it."""

    def __init__(self, depot: Filled, directory: Path, disk: Callable[..., Disk]) -> None:
        self.depot = depot
        self.disk = disk
        self.mnt = directory / "mnt"
        self.mnt.mkdir()
        self.names: list[str] = []

    def ferry(self, *arguments: object, **env: str) -> Done:
        """Run `blockferry` as root of this machine, who has the passphrase."""
        return blockferry(*arguments, env=self.depot.env | env)

    def arm(self, disk: Disk, *options: object, code: int = 0) -> Done:
        """Arm a disk by the command."""
        self.names.append(f"serial-{disk.serial}")
        done = self.ferry("arm", "latest", disk.match, "--repo", self.depot.reference, *options)
        assert done.code == code, done.err
        return done

    def armed_before(self, disk: Disk, *, snapshot: int = -1, rate: int | None = None, mount: str = "") -> None:
        """Have a disk be armed, as the command does it."""
        name, wanted = f"serial-{disk.serial}", self.depot.snapshots[snapshot]
        self.names.append(name)
        arming.arm(Armed(Match.parse(disk.match), name, wanted, self.depot.reference, mount=mount, rate=rate))

    def is_armed(self, disk: Disk) -> bool:
        return arming.load(Match.parse(disk.match)) is not None

    def refused(self, disk: Disk) -> str:
        armed = arming.load(Match.parse(disk.match))
        return armed.refused if armed else ""

    def status(self, disk: Disk) -> dict[str, Any]:
        """Return what the restore's process says; nothing if there is none."""
        try:
            return client.ask(f"serial-{disk.serial}", {"do": "status"})
        except (NobodyThereError, DeclinedError):
            return {}

    def detach(self, disk: Disk) -> None:
        self.ferry("detach", f"serial-{disk.serial}", "--json").json()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Path]:
        """Have `blockferry watch` run; give the file with what it says."""
        words = self.mnt.parent / "watch.log"
        with words.open("wb") as file, notified() as ready:
            environment = os.environ | self.depot.env | {"NOTIFY_SOCKET": ready.getsockname()}
            process = subprocess.Popen(command("watch"), env=environment, stdout=file, stderr=file)
            try:
                assert ready.recv(100) == b"READY=1"
                yield words
            finally:
                process.terminate()
                assert process.wait(30) == 128 + signal.SIGTERM, words.read_text()

    def end(self) -> None:
        """Detach everything."""
        if self.mnt.is_mount():
            run("umount", self.mnt)
        for name in self.names:
            with contextlib.suppress(NobodyThereError):
                client.ask(name, {"do": "detach", "force": True})
                wait_until_free(client.socket_path(name))


@contextlib.contextmanager
def notified() -> Iterator[socket.socket]:
    """Give a socket that hears what systemd would be told."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"{directory}/notify")
        listener.settimeout(60)
        yield listener


@pytest.fixture
def host(depot: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with contextlib.ExitStack() as held:
        held.enter_context(udevd())
        # The path of a socket is of 107 bytes at most.
        runtime = held.enter_context(tempfile.TemporaryDirectory(prefix="blockferry-"))
        monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", runtime)
        monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
        held.enter_context(rule(90, udev.rule(tmp_path / "state")))
        host = Host(depot, tmp_path, held.enter_context(disks(tmp_path)))
        held.callback(host.end)
        yield host


def digest(disk: Disk) -> str:
    return hashlib.sha256(disk.path.read_bytes()).hexdigest()


# -- what shows up -----------------------------------------------------------------------------------------------------


def test_plugging_in_an_armed_disk_is_enough(host: Host, mount: Callable[..., Path]) -> None:
    disk = host.disk(SIZE)
    armed = host.arm(disk, "--mount", host.mnt, "--json").json()
    assert (armed["state"], armed["device"]) == ("waiting", "")
    with host.watching():
        disk.plug_in()
        wait_for(host.mnt.is_mount, "the mount")
        assert (host.mnt / "words").read_text() == WORDS
        (host.mnt / "new").write_text("written while it is restored")
        wait_for(lambda: not host.is_armed(disk), "all of it: a reboot would restore it again")
        assert host.status(disk)["finished"]
        known = properties(disk.device)
        assert known["BLOCKFERRY_ARMED"] == disk.match
        assert known["UDISKS_IGNORE"] == "1"
        host.ferry("detach", f"serial-{disk.serial}").refused(1, "unmount")
        run("umount", host.mnt)
        assert host.ferry("detach", f"serial-{disk.serial}", "--json").json()["finished"]
        disk.unplug()
        disk.plug_in()  # is a disk like any other now
        place = mount(disk.device)
        assert (place / "words").read_text() == WORDS
        assert (place / "new").read_text() == "written while it is restored"


def test_systemd_is_asked_once_each_time_that_a_disk_shows_up(host: Host) -> None:
    disk = host.disk(SIZE)
    host.armed_before(disk)
    monitor = pyudev.Monitor.from_netlink(udev.context(), "udev")
    monitor.filter_by("block")
    monitor.start()

    def asked() -> list[str]:
        events = [event for event in iter(lambda: monitor.poll(1), None) if event.device_node == disk.device]
        armed = [event for event in events if event.properties.get("BLOCKFERRY_ARMED") == disk.match]
        assert armed
        return [wanted for event in armed if (wanted := event.properties.get("SYSTEMD_WANTS"))]

    for _ in range(2):
        disk.plug_in()
        assert asked() == [f"blockferry-restore@{disk.match}.service"]
        run("udevadm", "trigger", "--action=change", "--settle", disk.device)
        assert asked() == []
        disk.unplug()


def test_a_disk_that_is_not_armed_is_left_alone(host: Host) -> None:
    armed, other = host.disk(SIZE), host.disk(SIZE)
    host.armed_before(armed)
    before = digest(other)
    with host.watching():
        other.plug_in()
        armed.plug_in()
        wait_for(lambda: not host.is_armed(armed), "the armed one")
    assert digest(other) == before
    assert not {"BLOCKFERRY_ARMED", "UDISKS_IGNORE", "SYSTEMD_WANTS"} & properties(other.device).keys()


def test_a_disk_that_holds_something_is_refused_once_and_taken_when_it_is_empty(host: Host) -> None:
    disk = host.disk(SIZE)
    run("mke2fs", "-q", "-t", "ext4", disk.path)
    before = digest(disk)
    host.armed_before(disk)
    with host.watching() as words:
        disk.plug_in()
        wait_for(lambda: host.refused(disk), "the refusal")
        (listed,) = host.ferry("armed", "--json").json()["armed"]
        assert "holds ext4" in listed["refused"]
        assert "holds ext4" in host.ferry("status", f"serial-{disk.serial}", "--json").json()["state"]
        run("udevadm", "settle")
        time.sleep(1)  # looking at it made udev send an event, which must not make us look at it again
        assert words.read_text().count("holds ext4") == 1
        assert digest(disk) == before
        run("wipefs", "--all", "--quiet", disk.device)
        wait_for(lambda: not host.is_armed(disk), "the restore")


def test_a_disk_that_is_too_small_is_refused(host: Host) -> None:
    disk = host.disk("8M")
    before = digest(disk)
    host.armed_before(disk)
    with host.watching():
        disk.plug_in()
        wait_for(lambda: host.refused(disk), "the refusal")
    assert f"the image needs {BYTES}" in host.refused(disk)
    assert digest(disk) == before


def test_a_disk_that_is_here_already_is_restored_at_once(host: Host) -> None:
    disk = host.disk(SIZE)
    disk.plug_in()
    said = host.arm(disk, "--json").json()
    assert said["state"] == "begun"
    assert run("blkid", "--probe", "--match-tag", "TYPE", "--output", "value", said["device"]).strip() == "ext4"
    wait_for(lambda: not host.is_armed(disk), "all of it")


def test_a_disk_that_is_here_already_and_holds_something_is_told_at_once(host: Host) -> None:
    disk = host.disk(SIZE)
    run("mke2fs", "-q", "-t", "ext4", disk.path)
    disk.plug_in()
    assert "holds ext4" in host.arm(disk, code=3).out


def test_a_disk_that_cannot_be_mounted_is_restored_all_the_same(host: Host) -> None:
    disk = host.disk(SIZE)
    disk.plug_in()
    run("mount", "-t", "tmpfs", "tmpfs", host.mnt)
    said = host.arm(disk, "--mount", host.mnt, "--json").json()
    assert said["state"] == "begun"
    wait_for(lambda: not host.is_armed(disk), "all of it")
    assert "something is mounted there already" in host.status(disk)["failure"]


def test_a_disarmed_disk_is_left_alone(host: Host) -> None:
    disk, last = host.disk(SIZE), host.disk(SIZE)
    before = digest(disk)
    host.armed_before(disk)
    host.armed_before(last)
    assert host.ferry("disarm", disk.match).code == 0
    with host.watching():
        disk.plug_in()
        last.plug_in()
        wait_for(lambda: not host.is_armed(last), "the other one")
    assert digest(disk) == before
    assert "BLOCKFERRY_ARMED" not in properties(disk.device)
    host.ferry("disarm", disk.match).refused(1, "is not armed")


def test_two_disks_with_one_serial_number_are_refused(host: Host) -> None:
    one = host.disk(SIZE)
    other = host.disk(SIZE, one.serial)
    host.armed_before(one)
    one.plug_in()
    other.plug_in()
    host.ferry("udev", "restore", one.match).refused(1, one.device, other.device)
    assert "several devices" in host.refused(one)


# -- what is never taken for the disk ----------------------------------------------------------------------------------


def add_partition(device: str) -> dict[str, str]:
    """Show the first partition of a disk, also where the kernel knows no partition tables; return what udev knows."""
    if not Path(f"{device}p1").exists():
        run("partx", "--add", "--nr", "1", device)
    run("udevadm", "settle")
    return properties(f"{device}p1")


def test_an_empty_partition_of_an_armed_disk_is_not_restored_onto(host: Host) -> None:
    disk = host.disk(str(BYTES + 8 * MIB))
    run("sfdisk", "--quiet", disk.path, input=f"label: gpt\nstart=2048, size={BYTES >> 9}\n")
    host.armed_before(disk)
    with host.watching():
        disk.plug_in("--partscan")
        wait_for(lambda: host.refused(disk), "the refusal")
        known = add_partition(disk.device)
        assert known["ID_SERIAL_SHORT"] == disk.serial, "this test tests nothing"
        assert "BLOCKFERRY_ARMED" not in known
    assert "gpt" in host.refused(disk)
    assert not host.status(disk)


def test_a_partition_inside_what_is_restored_is_not_restored_onto(host: Host) -> None:
    disk = host.disk(SIZE)
    arming.arm(Armed(Match("partuuid", PARTITION), "inside", host.depot.snapshots[-1], host.depot.reference))
    host.armed_before(disk, snapshot=0, rate=1)
    with host.watching():
        disk.plug_in()
        wait_for(lambda: host.status(disk), "the disk")
        known = add_partition(host.status(disk)["device"])
        assert known["ID_PART_ENTRY_UUID"] == PARTITION, "this test tests nothing"
        assert "BLOCKFERRY_ARMED" not in known
        assert udev.devices_of(Match("partuuid", PARTITION)) == []
    armed = arming.load(Match("partuuid", PARTITION))
    assert armed
    assert not armed.refused


def test_a_serial_number_that_is_a_path_is_not_looked_for(host: Host, tmp_path: Path) -> None:
    disk = host.disk(SIZE, "x/../../evil")
    (tmp_path / "state" / "armed" / "serial:x").mkdir(parents=True)
    (tmp_path / "state" / "evil").touch()
    disk.plug_in()
    assert "BLOCKFERRY_ARMED" not in properties(disk.device)


@pytest.mark.parametrize(
    "match", ["WD-42", "serial:", "uuid:4711", "serial:../../etc/passwd", "serial:a b", "serial:a*", "wwn:" + "0" * 129]
)
def test_a_match_that_cannot_be_one_is_refused(match: str) -> None:
    with pytest.raises(UsageError, match=r"does not say by what|a value is of") as refused:
        Match.parse(match)
    assert repr(match) in refused.value.message
    assert refused.value.remedy


def test_the_commands_refuse_a_match_that_cannot_be_one(tmp_path: Path) -> None:
    blockferry("arm", "latest", "serial:a/b", "--repo", f"borg:{tmp_path}").refused(2, "'serial:a/b'")


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_restore_goes_on_when_the_disk_has_another_name(host: Host) -> None:
    disk, in_its_place = host.disk(SIZE), host.disk(SIZE)
    host.armed_before(disk, rate=1)
    before = disk.plug_in()
    host.ferry("watch", "--once", "--json").json()
    assert host.is_armed(disk), "an unfinished restore stays armed"
    host.detach(disk)
    assert disk.path.read_bytes()[:27] == b"blockferry: half restored, "
    assert run("wipefs", "--no-act", "--noheadings", disk.path) == ""
    disk.unplug()
    in_its_place.plug_in()
    if disk.plug_in() == before:
        pytest.skip("somebody took the loop device before us")
    host.armed_before(disk)
    assert host.ferry("watch", "--once", "--json").json()["target"] == disk.device
    wait_for(lambda: not host.is_armed(disk), "the rest")
    again = host.ferry("arm", "latest", disk.match, "--repo", host.depot.reference)
    again.refused(2, "complete, and not detached")
    assert host.ferry("detach", f"serial-{disk.serial}", "--json").json()["finished"]
    run("e2fsck", "-fn", disk.path)


def test_another_disk_with_the_same_serial_number_is_not_gone_on_with(host: Host) -> None:
    disk = host.disk(SIZE)
    host.armed_before(disk, rate=1)
    before = disk.plug_in()
    host.ferry("watch", "--once", "--json").json()
    host.detach(disk)
    disk.unplug()
    other = host.disk(SIZE, disk.serial)
    run("mke2fs", "-q", "-t", "ext4", other.path)
    content = digest(other)
    same_name = other.plug_in() == before
    refused = host.ferry("udev", "restore", disk.match)
    if same_name:
        refused.refused(1, "is not what this restore began on", "half restored")
    else:
        refused.refused(2, f"onto {before} already")
    assert digest(other) == content


def test_who_detaches_a_restore_does_not_have_it_begun_again(host: Host) -> None:
    disk = host.disk(SIZE)
    host.armed_before(disk, rate=1)
    with host.watching():
        disk.plug_in()
        wait_for(lambda: host.status(disk), "the disk")
        host.detach(disk)
        run("udevadm", "settle")
        time.sleep(1)
        assert not host.status(disk)
        assert host.is_armed(disk), "a reboot would not go on with it"


def test_watch_begins_a_killed_restore_again(host: Host) -> None:
    disk = host.disk(SIZE)
    host.armed_before(disk, rate=1)
    with host.watching():
        disk.plug_in()
        wait_for(lambda: host.status(disk), "the disk")
        first = host.status(disk)
        os.kill(first["process"], signal.SIGKILL)
        wait_for(lambda: not host.status(disk), "its end")
        run("losetup", "--detach", first["device"])
        run("udevadm", "trigger", "--action=change", disk.device)
        wait_for(lambda: host.status(disk), "it to go on")
        assert host.status(disk)["process"] != first["process"]


# -- systemd -----------------------------------------------------------------------------------------------------------


def test_what_the_unit_runs_tells_systemd_and_ends_when_told(host: Host) -> None:
    disk = host.disk(SIZE)
    host.armed_before(disk, mount=str(host.mnt))
    disk.plug_in()
    with notified() as ready:
        environment = os.environ | host.depot.env | {"NOTIFY_SOCKET": ready.getsockname()}
        unit = subprocess.Popen(command("udev", "restore", disk.match), env=environment, stderr=subprocess.DEVNULL)
        assert ready.recv(100) == b"READY=1"
        assert (host.mnt / "words").read_text() == WORDS
        unit.terminate()
        assert unit.wait(60) == 0
    assert not host.mnt.is_mount()


def test_a_repository_that_does_not_answer_may_do_so_later(host: Host) -> None:
    disk = host.disk(SIZE)
    host.armed_before(disk)
    disk.plug_in()
    away = host.depot.path.with_name("away")
    host.depot.path.rename(away)
    try:
        host.ferry("udev", "restore", disk.match).refused(75)
        assert host.refused(disk)
    finally:
        away.rename(host.depot.path)
    host.ferry("udev", "restore", disk.match, BORG_PASSPHRASE="wrong").refused(1, "passphrase")


def test_systemd_and_udev_understand_what_is_installed(tmp_path: Path) -> None:
    rules, unit = blockferry("udev", "install", "--root", tmp_path, "--json").json()["files"]
    assert rules == f"{tmp_path}/etc/udev/rules.d/90-blockferry.rules"
    assert unit == f"{tmp_path}/etc/systemd/system/blockferry-restore@.service"
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    Path(unit).write_text(Path(unit).read_text().replace("=blockferry ", f"={command()[0]} "))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "blockferry" in line] == []
    assert done.returncode == 0, done.stderr


# -- arming ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_restored_is_found_out_when_it_is_armed(host: Host) -> None:
    match = "serial:NOWHERE"
    host.ferry("arm", "nosuch", match, "--repo", host.depot.reference).refused(1, "nosuch")
    wrong = {"BORG_PASSPHRASE": "wrong"}
    host.ferry("arm", "latest", match, "--repo", host.depot.reference, **wrong).refused(1, "passphrase")
    host.ferry("arm", "latest", match, "--repo", host.depot.reference, "--mount", "/nowhere").refused(2, "mkdir")
    secret = host.ferry("arm", "latest", match, "--repo", "restic:rest:https://me:sesame@nas/r").refused(2, "password")
    assert "sesame" not in secret.err
    assert arming.load_all() == []


def test_what_is_armed_is_kept_without_secrets_and_by_what_it_is_anywhere(host: Host, tmp_path: Path) -> None:
    secret = {"BORG_REPO": os.path.relpath(host.depot.path), "BORG_PASSPHRASE": host.depot.env["BORG_PASSPHRASE"]}
    said = host.ferry("arm", "latest", "serial:NOWHERE", "--json", **secret).json()
    assert said["repository"] == host.depot.reference
    assert len(said["snapshot"]) > len("latest")
    (kept,) = [each for each in (tmp_path / "state" / "armed").iterdir() if not each.name.startswith(".")]
    assert kept.name == "serial:NOWHERE"
    assert secret["BORG_PASSPHRASE"] not in kept.read_text()
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    host.ferry("arm", "latest", "wwn:1", "--name", said["name"], "--repo", host.depot.reference).refused(2, "--name")
