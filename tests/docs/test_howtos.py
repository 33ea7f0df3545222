"""Every block of shell in the how-tos and the quick start does what the page says, on real disks and repositories."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from changed_support import why_no_bpftrace
from changes_support import filesystem
from commands_support import blockferry, run
from pages_support import Page, run_shell, with_places

MIB = 1 << 20

Attach = Callable[..., str]

pytestmark = pytest.mark.root


def do(name: str, host: Path, places: Mapping[str, object]) -> str:
    """Run all that a page says, as one script; return what it printed."""
    page = Page(name)
    configured = page.block("yaml") if "```yaml" in page.text else ""
    script = "".join(page.blocks())
    assert [example for example in places if example not in configured + script] == []
    (host / "config.yaml").write_text(with_places(configured, _named(places, configured)))
    return run_shell(script, _named(places, script))


def _named(places: Mapping[str, object], text: str) -> dict[str, object]:
    return {example: real for example, real in places.items() if example in text}


def ext4(path: Path, files: Path, size: str = "64M") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    run("truncate", "-s", size, path)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", files, path)
    return path


def test_the_quick_start(host: Path, files: Path, attach: Attach) -> None:
    (host / "root" / "borg-passphrase").write_text("secret")
    target = host / "back.img"
    places = {
        "/dev/vg0/home": attach(ext4(host / "disk.img", files)),
        "/dev/vg0/home-restored": target,
        "/srv/backup/borg": host / "srv" / "backup" / "borg",
        "/root/": f"{host}/root/",
    }
    assert "in use: is read" in do("quickstart.md", host, places)
    run("e2fsck", "-fn", target)


def test_the_readme(host: Path, files: Path, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_no_bpftrace():
        pytest.skip(reason)
    monkeypatch.setenv("BORG_PASSPHRASE", "secret")
    disk, empty = attach(ext4(host / "disk.img", files)), host / "new.img"
    run("truncate", "-s", "64M", empty)
    places = {
        "/dev/vg0/home": disk,
        "/dev/vg0/home-restored": host / "back.img",
        "/dev/sdb": attach(empty),
        "/srv/backup/disks": host / "srv" / "backup" / "disks",
    }
    try:
        assert "in use: is read" in do("README.md", host, places)
    finally:
        blockferry("track", "stop", disk)
    run("e2fsck", "-fn", host / "back.img")
    (restore,) = blockferry("status", "--json").json()["restores"]
    run("e2fsck", "-fn", restore["device"])
    blockferry("detach", restore["name"], "--force", "--forget")  # before its loop device goes


def test_the_quick_start_fits_a_screen() -> None:
    assert len(Page("quickstart.md").text.splitlines()) <= 60


def test_one_disk(host: Path, files: Path, attach: Attach, mount: Callable[..., Path]) -> None:
    disk, empty = attach(ext4(host / "disk.img", files)), host / "new.img"
    run("truncate", "-s", "70M", empty)
    mount(disk)
    places = {
        "/dev/sdb1": disk,
        "/dev/sdc1": attach(empty),
        "/srv/backup/borg": host / "srv" / "backup" / "borg",
        "/root/": f"{host}/root/",
        "/mnt": host / "mnt",
        "/var/tmp": host,
    }
    printed = do("howto-disk.md", host, places)
    assert "in use: is read" in printed
    assert "\ntext\n" in printed
    assert (host / "root" / "data.svg").exists()


@pytest.mark.thorough
def test_a_host_of_virtual_machines(host: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTIC_PASSWORD", "secret")
    with filesystem("xfs", host / "store") as store:
        for name in ("web", "mail"):
            ext4(store / f"{name}.img", files, "48M")
        places = {
            "/srv/vm": store,
            "/srv/backup/restic": host / "srv" / "backup" / "restic",
            "/root/restic-password": host / "root" / "restic-password",
        }
        (host / "root" / "restic-password").write_text("secret")
        printed = do("howto-vm-host.md", host, places)
        assert printed.count("of web: ") == printed.count("of mail: ") == 1
        run("e2fsck", "-fn", store / "web-restored.img")
        for each in blockferry("status", "--json").json()["restores"]:
            blockferry("detach", each["name"], "--force", "--forget")


@pytest.mark.thorough
def test_a_database_directory(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BORG_PASSPHRASE", "secret")
    repository = host / "srv" / "backup" / "borg"
    run("borg", "init", "--encryption=repokey-blake2", repository)
    with filesystem("xfs", host / "disk") as var:
        database = var / "lib" / "postgresql"
        database.mkdir(parents=True)
        (database / "base").write_bytes(os.urandom(3 * MIB))
        (database / "postmaster.pid").write_text("1")
        before = (database / "base").read_bytes()
        do("howto-database.md", host, {"/var": var, "/srv/backup/borg": repository})
        assert sorted(path.name for path in database.iterdir()) == ["base"]
        assert (database / "base").read_bytes() == before
    assert (host / "systemctl.log").read_text().split() == ["stop", "postgresql", "start", "postgresql"] * 2


@pytest.mark.thorough
def test_bare_metal(host: Path, files: Path, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, disk = host / "srv" / "backup" / "borg", host / "disk.img"
    (host / "root" / "borg-passphrase").write_text("secret")
    monkeypatch.setenv("BORG_PASSPHRASE", "secret")
    run("borg", "init", "--encryption=repokey-blake2", repository)
    monkeypatch.delenv("BORG_PASSPHRASE")
    run("truncate", "-s", "80M", disk)
    run("sfdisk", "--quiet", disk, input="label: gpt\nstart=2048, size=64M\n")
    partition = ext4(host / "partition.img", files)
    run("dd", f"if={partition}", f"of={disk}", "bs=1M", "seek=1", "conv=notrunc", "status=none")
    new = host / "new.img"
    run("truncate", "-s", "100M", new)
    target = attach(new)
    places = {
        "/dev/sda": attach(disk, "--read-only"),
        "/dev/sdb --repo": f"{target} --force --repo",
        "/dev/sdb --name": f"{target} --force --name",
        "gpt-bak-std /dev/sdb": f"gpt-bak-std {target}",
        "borg:ssh://nas/./volumes": f"borg:{repository}",
        "/root/": f"{host}/root/",
        "/mnt": host / "mnt",
        "udev install": f"udev install --root {host}/etc-of-another",
        "--mount /srv": f"--mount {host}/srv",
    }
    printed = do("howto-bare-metal.md", host, places)
    assert "\ntext\n" in printed
    assert "serial:WD-WX12A345" in printed
