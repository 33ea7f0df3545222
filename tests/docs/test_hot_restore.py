"""The pages about hot restore: their sessions say what they show, and all else that they have run is run."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from commands_support import Depot, blockferry, new_depot, run
from conftest import Attach
from pages_support import Page, blocks_of, run_shell, with_places
from udev_support import RULES, disks, udevd, wait_for

pytestmark = pytest.mark.root

JOURNAL = 'journalctl() { command journalctl "$@" || test ! -d /run/systemd/system; }\n'
"""Without systemd there is none to look into."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Depot:
    """A repository that has a volume with a filesystem."""
    place = tmp_path_factory.mktemp("filled")
    depot = new_depot("borg", place / "repository")
    run("truncate", "-s", "48M", place / "volume.img")
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", files, place / "volume.img")
    assert depot.ferry("backup", place / "volume.img").code == 0
    return depot


@pytest.fixture
def depot(filled: Depot, host: Path, monkeypatch: pytest.MonkeyPatch) -> Depot:
    monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", str(host / "run"))
    for name, value in filled.env.items():
        monkeypatch.setenv(name, value)
    return filled


@pytest.fixture
def disk(host: Path, attach: Attach) -> Iterator[Path]:
    """An empty disk, by a name that no other has here."""
    run("truncate", "-s", "64M", host / "empty.img")
    link = host / "sdb"
    link.symlink_to(attach(host / "empty.img"))
    yield link
    subprocess.run(["umount", "--lazy", "--quiet", str(host / "mnt")], check=False)
    blockferry("detach", "sdb", "--force", "--forget")


def play(session: str, places: dict[str, object]) -> None:
    """Run a session's commands, and see that they print what it shows; a device that one prints the next has."""
    for part in re.split(r"^# ", session, flags=re.MULTILINE)[1:]:
        command, _end, shown = part.partition("\n")
        printed = run_shell(command, {example: real for example, real in places.items() if example in command})
        examples = {os.path.realpath(real): example for example, real in places.items()}
        assert masked(printed, examples) == masked(shown, {})
        places |= dict(zip(devices(shown), devices(printed), strict=True))


def devices(text: str) -> list[str]:
    return re.findall(r"is at (/dev/\S+),", text)


def masked(text: str, places: Mapping[str, str]) -> str:
    """Return a text without what is another one each time."""
    text = with_places(text, {each: places[each] for each in places if each in text})
    text = re.sub(r"/dev/(loop\d+|mapper/[\w-]+)", "DEVICE", text)
    return re.sub(r"\b[0-9a-f]{12}\b|\d+\.\d+", "...", text)


def test_a_disk_that_died(host: Path, depot: Depot, disk: Path) -> None:
    begin, end = Page("hot-restore.md").blocks("console")
    places: dict[str, object] = {"/dev/sdb": disk, "borg:ssh://nas/./volumes": depot.reference, "/mnt": host / "mnt"}
    play(begin, places)
    assert (host / "mnt" / "text").exists()
    wait_for(lambda: blockferry("status", "sdb", "--json").json()["finished"], "all to be there")
    play(end, places)
    assert (host / "mnt" / "text").exists()


def test_only_looking(host: Path, depot: Depot) -> None:
    places = {"/var/tmp": host, "restic:/srv/restic": depot.reference, "/mnt": host / "mnt"}
    play(Page("hot-restore-hosts.md").block("console"), places)
    assert (host / "mnt" / "text").exists()


def test_another_host_has_certificates_and_copies_the_disk(host: Path, depot: Depot, disk: Path) -> None:
    page = Page("hot-restore-hosts.md")
    authority, server, client, *_as_a_device, copy = page.blocks()  # those are run where there is NBD: tests/vm
    tls, place = host / "tls", f"127.0.0.1:{free_port()}"
    run_shell(authority + server + client, {"/etc/blockferry/tls": tls, "10.0.0.5": "127.0.0.1"})
    (session,) = [block for block in blocks_of(page.name) if block.language == "text"]
    places = {
        "/dev/sdb": disk,
        "borg:ssh://nas/./volumes": depot.reference,
        "10.0.0.5:10809": place,
        "/etc/blockferry/tls": tls,
    }
    for words in session.command_lines():
        line = shlex.join(words)
        done = blockferry(*shlex.split(with_places(line, {each: places[each] for each in places if each in line})))
        assert done.code == 0, done.err
    assert done.out == f"mail: can be read at nbds://{place}\n"
    here = f"cd {host}\n"
    run_shell(here + copy, {"10.0.0.5:10809": place})
    run("e2fsck", "-fn", host / "disk.img")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_disk_that_restores_itself(host: Path, depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no systemd, by what keeps running there."""
    install, secret, look, arm, disarm, see, watch, try_it = Page("hot-restore-udev.md").blocks()
    (passphrase,) = depot.env.values()
    monkeypatch.delenv("BORG_PASSPHRASE")
    etc = {"/etc/blockferry": host / "etc"}
    with udevd(), disks(host) as make:
        etc_of_udev = "for each in /etc/udev/rules.d /etc/systemd/system; do mount -t tmpfs tmpfs $each; done\n"
        run_shell(etc_of_udev + install, {}, prefix=["unshare", "--mount", "--propagation=private"])
        run_shell(secret, etc | {"...": passphrase})
        new = make("64M")
        assert f"ID_SERIAL_SHORT={new.serial}\n" in run_shell(look, {"/dev/sdb": new.plug_in()})
        serial = {"serial:WD-WX12A345": "serial:NOT-HERE"}
        own = {"borg:ssh://nas/./volumes": depot.reference, "/srv": host / "srv"}
        said = run_shell(arm + disarm, etc | serial | own)
        assert "serial:NOT-HERE" in said
        assert blockferry("armed", "--json").json()["armed"] == []
        with subprocess.Popen(["sh", "-euc", f"exec {watch}"], env=os.environ | depot.env) as watching:
            try:
                plug_in(f"{try_it}{JOURNAL}{see}", host, depot)
            finally:
                watching.terminate()


def plug_in(script: str, host: Path, depot: Depot) -> None:
    spare, rules = host / "spare.img", RULES / f"59-{os.getpid()}-spare.rules"
    places = {
        "/var/tmp/spare.img": spare,
        "/etc/udev/rules.d/59-spare.rules": rules,
        "SPARE": f"SPARE-{os.getpid()}",
        "borg:/srv/borg": depot.reference,
        "/mnt": host / "mnt",
    }
    try:
        assert "text" in run_shell(script, places, env=depot.env)
    finally:
        rules.unlink(missing_ok=True)
        subprocess.run(["umount", "--lazy", "--quiet", str(host / "mnt")], check=False)
        for each in blockferry("status", "--json").json()["restores"]:
            blockferry("detach", each["name"], "--force", "--forget")
        for line in run("losetup", "--associated", spare).splitlines():
            run("losetup", "--detach", line.partition(":")[0])
