"""What a user can get wrong, and what a disk or repository can do: one or two lines, the right code, nothing lost."""

import filecmp
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from commands_support import Depot, Done, blockferry, command, locked, new_depot, restic_first, run


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["used", "/nonexistent/disk.img"], 1, ["/nonexistent/disk.img", "no such file"]),
        (["used", "/dev/null"], 1, ["neither a block device nor an image file"]),
        (["used", "/tmp"], 1, ["neither a block device nor an image file"]),
        (["used"], 2, ["volume"]),
        (["flurb"], 2, ["flurb"]),
        (["used", "--flurb", "x"], 2, ["--flurb"]),
        (["snapshots"], 2, ["--repo"]),
        (["snapshots", "--repo", "tape:/dev/st0"], 2, ["tape:/dev/st0", "borg:"]),
        (["snapshots", "--repo", "/srv/backup"], 2, ["/srv/backup", "borg:"]),
        (["snapshots", "--repo", "borg:/nonexistent/repo"], 1, ["/nonexistent/repo"]),
        (["snapshots", "--repo", "restic:/nonexistent/repo"], 1, ["/nonexistent/repo"]),
    ],
)
def test_wrong_words(arguments, code, words):
    blockferry(*arguments, env={"RESTIC_PASSWORD": "x", "BORG_PASSPHRASE": "x"}).refused(code, *words)


def test_both_tools_in_the_environment_are_one_too_many():
    blockferry("snapshots", env={"BORG_REPO": "/a", "RESTIC_REPOSITORY": "/b"}).refused(2, "both")


AS_NOBODY = """
import os, sys
from blockferry.cli.main import run
assert run(sys.argv[1:]) == 0  # imports all that it takes: the program may lie in a private home
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.root
def test_no_permission(image, tmp_path):
    image.chmod(0o600)
    run("chmod", "a+x", *[each for each in [tmp_path, *tmp_path.parents] if str(each) != "/"])
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, "used", str(image)],
        env=os.environ | {"BLOCKFERRY_STATE_DIR": "/nonexistent", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "Permission denied" in done.stderr


def test_a_wrong_or_missing_passphrase(depot: Depot, image):
    secret = next(iter(depot.env))
    depot.ferry("backup", image, **{secret: "guessed"}).refused(1, "passphrase" if depot.tool == "borg" else "password")
    blockferry("snapshots", "--repo", depot.reference).refused(1)
    assert depot.archives() == []


def test_a_locked_repository_is_for_later(depot: Depot, image):
    with locked(depot):
        depot.ferry("backup", image).refused(75, "lock")
    assert depot.ferry("backup", image).code == 0


def test_a_snapshot_that_is_not_there(depot: Depot, image, tmp_path):
    depot.ferry("restore", "latest", tmp_path / "x").refused(1, "no snapshot")
    depot.ferry("backup", image)
    depot.ferry("backup", image)
    depot.ferry("restore", "zzz", tmp_path / "x").refused(1, "zzz", "no such snapshot")
    depot.ferry("restore", "", tmp_path / "x").refused(1, "no such snapshot")
    assert not (tmp_path / "x").exists()


def test_archives_of_others_are_neither_listed_nor_restored(depot: Depot, image, tmp_path):
    depot.stock(*(["create", "::mine", image] if depot.tool == "borg" else ["backup", image]))
    depot.ferry("snapshots", "--json").json()
    assert depot.ferry("snapshots", "--json").json()["snapshots"] == []
    name = depot.archives()[0]
    depot.ferry("restore", name[:8], tmp_path / "x").refused(1, "no snapshot")


def test_a_target_that_is_too_small(depot: Depot, image, attach, tmp_path):
    depot.ferry("backup", image)
    if os.geteuid():
        pytest.skip("needs root for a loop device")
    small = tmp_path / "small.img"
    run("truncate", "-s", "100M", small)
    depot.ferry("restore", "latest", attach(small), "--force").refused(1, "has 104857600 bytes", "large enough")
    with small.open("rb") as file:
        assert not any(file.read(1 << 20))


@pytest.mark.root
def test_a_target_that_is_mounted(depot: Depot, image, mount, attach, tmp_path):
    depot.ferry("backup", image)
    other = tmp_path / "other.img"
    run("truncate", "-s", "300M", other)
    run("mkfs.ext4", "-q", other)
    device = attach(other)
    place = mount(device)
    depot.ferry("restore", "latest", device, "--force").refused(1, "mounted", str(place))
    depot.ferry("restore", "latest", other, "--force").refused(1, "in use", device)
    run("umount", place)
    run("e2fsck", "-fn", other)


def test_a_target_that_holds_a_filesystem(depot: Depot, image, tmp_path):
    depot.ferry("backup", image)
    other = tmp_path / "other.img"
    run("truncate", "-s", "300M", other)
    run("mkfs.xfs", "-q", other)
    before = other.read_bytes()
    depot.ferry("restore", "latest", other).refused(1, "xfs", "--force")
    assert other.read_bytes() == before


def test_a_target_directory_that_is_not_there(depot: Depot, image, tmp_path):
    depot.ferry("backup", image)
    depot.ferry("restore", "latest", tmp_path / "no" / "such" / "file").refused(1, "no such file")
    depot.ferry("restore", "latest", tmp_path).refused(1, "directory")


def test_a_damaged_archive_is_named_and_leaves_no_target(depot: Depot, image, tmp_path):
    depot.ferry("backup", image)
    packs = [each for each in (depot.path / "data").rglob("*") if each.is_file()]
    largest = max(packs, key=lambda each: each.stat().st_size)
    largest.chmod(0o600)
    with largest.open("r+b") as file:
        for position in range(10_000, largest.stat().st_size, largest.stat().st_size // 50):
            file.seek(position)
            file.write(b"\xaa" * 64)
    target = tmp_path / "x.img"
    depot.ferry("verify", "latest").refused(1)
    depot.ferry("restore", "latest", target).refused(1)
    assert not target.exists()


@pytest.mark.root
@pytest.mark.parametrize("tool", ["borg", pytest.param("restic", marks=pytest.mark.thorough)])
def test_a_full_repository_disk(tool, image, mount, tmp_path):
    small = tmp_path / "small.img"
    run("truncate", "-s", "48M", small)
    run("mkfs.ext4", "-q", "-m0", small)
    place = mount(small, "loop")
    noisy = tmp_path / "noisy.img"
    noisy.write_bytes(os.urandom(80 << 20))
    depot = new_depot(tool, place / "repository")
    depot.ferry("backup", noisy).refused(1, "full" if tool == "restic" else "space", "room")
    assert depot.ferry("snapshots", "--json").json()["snapshots"] == []
    run("rm", "-f", *place.glob("ballast*"))
    little = tmp_path / "little.img"
    little.write_bytes(os.urandom(1 << 20))
    if tool == "restic":
        depot.stock("prune", "--max-unused=0")
    else:
        depot.stock("compact")
    assert depot.ferry("backup", little).code == 0


def test_a_volume_that_shrinks_while_it_is_read(depot: Depot, tmp_path):
    image = tmp_path / "shrinking.img"
    image.write_bytes(os.urandom(96 << 20))
    backup = subprocess.Popen(
        command("backup", image, "--repo", depot.reference),
        env=os.environ | depot.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: lease_of(backup.pid, image) == "ACTIVE")
    held = bytes_read_by(backup.pid)
    wait_until(lambda: bytes_read_by(backup.pid) > held + (16 << 20))
    backup.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, backup.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert lease_of(backup.pid, image) == "ACTIVE", "the backup was over before it could be stopped"
    cutter = threading.Thread(target=os.truncate, args=(image, 1 << 20))
    cutter.start()
    wait_until(lambda: lease_of(backup.pid, image) == "BREAKING")
    backup.send_signal(signal.SIGCONT)
    out, err = backup.communicate(timeout=120)
    cutter.join()
    Done(backup.returncode, out, err).refused(1, "opened the image for writing")
    assert depot.archives() == []
    assert depot.ferry("snapshots", "--json").json()["snapshots"] == []


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "that never happened"
        time.sleep(0.002)


def lease_of(pid: int, path: Path) -> str:
    """Return the state of the lease (proc_locks(5)) that a process has on a file, "" if it has none."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    inode = f":{path.stat().st_ino}"
    return next(
        (line[2] for line in lines if line[1] == "LEASE" and line[4] == str(pid) and line[5].endswith(inode)), ""
    )


def bytes_read_by(pid: int) -> int:
    """Return what all reads of a process have brought so far (proc_pid_io(5))."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def test_a_second_backup_of_one_volume_at_the_same_time_is_for_later(depot: Depot, tmp_path):
    image = tmp_path / "big.img"
    image.write_bytes(os.urandom(200 << 20))
    first = subprocess.Popen(
        command("backup", image, "--repo", depot.reference), env=os.environ | depot.env, stdout=subprocess.DEVNULL
    )
    codes = set()
    while first.poll() is None:
        codes.add(depot.ferry("backup", image).code)
    assert first.returncode in {0, 75}
    assert codes <= {0, 75}
    assert 75 in codes | {first.returncode}


@restic_first
def test_random_bytes_in_a_filesystem_image_lose_nothing(depot: Depot, image, tmp_path):
    chance = random.Random(3)
    whole = image.read_bytes()
    for attempt in range(3):
        broken = bytearray(whole)
        for _ in range(200):
            broken[chance.randrange(0, 300_000)] = chance.randrange(256)
        damaged, back = tmp_path / f"broken{attempt}.img", tmp_path / f"back{attempt}.img"
        damaged.write_bytes(broken)
        stored = depot.ferry("backup", damaged, "--json").json()
        if stored["tier"] == "whole":
            assert stored["tier_reason"]
            depot.ferry("restore", stored["snapshot"], back)
            assert filecmp.cmp(damaged, back, shallow=False)
