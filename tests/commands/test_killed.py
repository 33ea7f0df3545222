"""Killed at a random point: nothing that looks complete, nothing mounted, and the next backup works."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from commands_support import Depot, blockferry, command, restic_first, run

ROUNDS = int(os.environ.get("BLOCKFERRY_TEST_KILLS", "1"))


def stop(running: subprocess.Popen) -> list[int]:
    """Stop a process, so that it starts no other; return it and all that descend from it, ended or not."""
    kill(running.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    found, seen = [running.pid], 0
    while seen < len(found):
        with contextlib.suppress(OSError):  # it ended meanwhile
            for task in Path(f"/proc/{found[seen]}/task").iterdir():
                found += [int(each) for each in (task / "children").read_text().split()]
        seen += 1
    return found


def name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def mounts(volume: str) -> list[str]:
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if volume in line]


@pytest.mark.parametrize(
    ("depot", "victim"),
    [
        pytest.param(
            tool,
            victim,
            marks=[] if (tool, victim) in {("borg", "tool"), ("restic", "blockferry")} else pytest.mark.thorough,
        )
        for tool in ("borg", "restic")
        for victim in ("blockferry", "tool", "terminate", "interrupt")
    ],
    indirect=["depot"],
)
def test_whoever_is_killed_nothing_looks_complete(depot: Depot, tmp_path, victim):
    image = tmp_path / f"noise-{os.getpid()}-{victim}.img"
    image.write_bytes(os.urandom(96 << 20))
    chance = random.Random(f"{depot.tool} {victim}")
    begun = time.monotonic()
    assert depot.ferry("backup", image).code == 0
    usual = time.monotonic() - begun
    for archive in depot.archives():
        depot.stock("delete", f"::{archive}") if depot.tool == "borg" else depot.stock("forget", "--prune", archive)
    for _ in range(ROUNDS):
        running = subprocess.Popen(
            command("backup", image, "--repo", depot.reference),
            env=os.environ | depot.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(chance.uniform(0.1, usual))
        family = stop(running)
        if victim == "tool":
            marked = [each for each in family[1:] if "worker" in name(each) or "restic backup" in name(each)]
            for each in marked:
                kill(each, signal.SIGKILL)
        else:
            sent = {"blockferry": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[victim]
            kill(running.pid, sent)
        kill(running.pid, signal.SIGCONT)
        out, err = running.communicate(timeout=60)
        assert "Traceback" not in err, err
        wait_until_gone(family)
        assert mounts(image.name) == []
        if depot.tool == "restic":
            depot.stock("unlock")  # a restic that was killed leaves its lock, as it does without us
        complete = depot.ferry("snapshots", "--json").json()["snapshots"]
        # Either the kill came too late, and then the snapshot is whole, or there is none.
        assert len(complete) == (1 if running.returncode == 0 or complete else 0)
        for each in complete:
            assert depot.ferry("verify", each["id"], "--against", image).code == 0, (out, err)
            depot.stock("delete", f"::{each['archive']}") if depot.tool == "borg" else depot.stock(
                "forget", each["archive"]
            )
    assert depot.ferry("backup", image).code == 0
    assert depot.ferry("verify", "latest", "--against", image).code == 0
    depot.check()


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until_gone(family: list[int]) -> None:
    """Every process that belonged to the backup ends soon, whoever was killed.

    Until somebody has asked for its exit status, restic and borg take the owner of a lock to be alive.
    """
    deadline = time.monotonic() + 20
    while alive := [each for each in family if Path(f"/proc/{each}").exists()]:
        assert time.monotonic() < deadline, [name(each) for each in alive]
        time.sleep(0.05)


@restic_first
def test_a_killed_restore_leaves_no_target_that_looks_complete(depot: Depot, tmp_path):
    image, target = tmp_path / "noise.img", tmp_path / "back.img"
    image.write_bytes(os.urandom(96 << 20))
    assert depot.ferry("backup", image).code == 0
    chance = random.Random(5)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        running = subprocess.Popen(
            command("restore", "latest", target, "--repo", depot.reference),
            env=os.environ | depot.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(0.2, 0.9))
        family = stop(running)
        running.send_signal(number)
        running.send_signal(signal.SIGCONT)
        running.wait()
        wait_until_gone(family)
        if target.exists():
            run("cmp", image, target)
            target.unlink()
    assert depot.ferry("restore", "latest", target).code == 0
    run("cmp", image, target)
    assert blockferry("used", target).code == 0
