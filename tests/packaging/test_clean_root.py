"""On a Debian that has nothing a disk comes back; with what scripts/bootstrap gets the demo and the tests work.

A root is made by debootstrap, and taken away afterwards. What was downloaded for it stays in .tools/clean, so that the
next one is made quickly. It has this machine's devices and network, and what is committed of this checkout. Commands
run there with mounts and processes of their own, which end with them whatever happens.

`BLOCKFERRY_TEST_CLEAN="tests/core tests/used"` has fewer tests run there than all but those in guests.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands_support import PASSPHRASE, new_depot, run
from conftest import Attach
from pages_support import Page, with_places

CHECKOUT = Path(__file__).parents[2]
ARGUMENTS = ["-m", "not vm", *shlex.split(os.environ.get("BLOCKFERRY_TEST_CLEAN", ""))]
NETWORK = ("etc/resolv.conf", "etc/hosts", "usr/local/share/ca-certificates")
ENTER = r"""
set -eu
root=$1 kept=$2
shift 2
mount --bind "$root" "$root"  # a root is a mount
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount --bind "$kept/archives" "$root/var/cache/apt/archives"
mount --bind "$kept/pip" "$root/root/.cache/pip"
# Not by chroot, in which udevadm does nothing.
cd "$root"
pivot_root . mnt
umount --lazy /mnt
cd /root/blockferry

# The kernel keeps those of a test that was killed.
detach_loop_devices() {
    losetup --list --noheadings --output NAME,BACK-MAJ:MIN | while read -r device filesystem; do
        [ "$filesystem" != "$(mountpoint -d /tmp)" ] || losetup --detach "$device"
    done
}
trap detach_loop_devices EXIT
trap 'exit 143' TERM
env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@" &
wait $!
"""

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(3 * 3600)]


class CleanRoot:
    """A minimal Debian in a directory, with a clone of this checkout."""

    def __init__(self, suite: str, path: Path) -> None:
        self.path = path
        self.kept = CHECKOUT / ".tools" / "clean" / suite
        for name in ("archives/partial", "pip"):
            (self.kept / name).mkdir(parents=True, exist_ok=True)
        mirror, sources = sources_of(suite)
        run("debootstrap", "--variant=minbase", f"--cache-dir={self.kept / 'archives'}", suite, path, mirror)
        (path / "etc/apt/sources.list").write_text(sources)
        (path / "etc/apt/apt.conf.d/network").write_text(how_apt_downloads() + 'APT::Get::Assume-Yes "true";\n')
        for each in NETWORK:
            if Path("/", each).exists():
                run("cp", "-rLT", Path("/", each), path / each)
        (path / "root/.cache/pip").mkdir(parents=True)
        run("git", "clone", "--quiet", CHECKOUT, path / "root/blockferry")

    def run(self, *command: str) -> str:
        """Run a command in the checkout there; an AssertionError with all that it printed if it fails."""
        apart = ("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=TERM")
        return run(*apart, "--", "bash", "-c", ENTER, "enter", self.path, self.kept, *command)


def sources_of(suite: str) -> tuple[str, str]:
    """Return a Debian suite's mirror, and its sources.list: this machine's with the other name."""
    mine = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    wanted = ("--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages", "Origin: Debian", "Component: main")
    known = [line.split() for line in run("apt-get", "indextargets", *wanted).splitlines()]
    mirrors = [uri for uri, release in known if release == mine]
    if not mirrors:
        pytest.skip("apt names no mirror of Debian: run apt-get update, on Debian")
    return mirrors[0], "".join(f"deb {uri} {release.replace(mine, suite)} main\n" for uri, release in known)


def how_apt_downloads() -> str:
    """Return this machine's settings for that: proxies, what is believed of a mirror."""
    settings = run("apt-config", "dump").splitlines(keepends=True)
    return "".join(line for line in settings if line.startswith("Acquire::") and "::IndexTargets" not in line)


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def clean_root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanRoot]:
    if not shutil.which("debootstrap"):
        pytest.skip("needs debootstrap: run scripts/bootstrap --test")
    path = tmp_path_factory.mktemp(request.param) / "root"
    try:
        yield CleanRoot(request.param, path)
    finally:
        shutil.rmtree(path)


def test_a_disk_comes_back_in_a_rescue_system(
    clean_root: CleanRoot, files: Path, attach: Attach, tmp_path: Path
) -> None:
    """By the lines of docs/howto-bare-metal.md, and sfdisk, which live images have: nothing was bootstrapped there."""
    clean_root.run("sh", "-c", "apt-get -qq update && apt-get -qq install fdisk")
    run(sys.executable, "-m", "hatchling", "build", "-d", clean_root.path / "root", "-t", "wheel", cwd=CHECKOUT)
    disk = disk_of(files, tmp_path / "disk.img")
    depot = new_depot("borg", clean_root.path / "root/volumes")
    assert depot.ferry("backup", disk).code == 0
    page = Page("howto-bare-metal.md")
    look, in_time, at_once, done = (
        block
        for below in ("In the rescue system", "If there is time", "If there is none")
        for block in page.blocks(below=below)
    )
    complete = "until blockferry status sdb --json | grep -q '\"complete\"'; do sleep 1; done\n"
    for script in (page.block("text", "In the rescue system") + look, in_time, at_once + complete + done):
        run("truncate", "-s", "80M", new := tmp_path / "new.img")
        device = attach(new)
        places = {"/dev/sdb": device, "borg:ssh://nas/./volumes": "borg:/root/volumes"}
        inside = with_places(f"cd /root\n{script}", {each: places[each] for each in places if each in script})
        shown = clean_root.run("env", f"BORG_PASSPHRASE={PASSPHRASE}", "sh", "-euxc", inside)
        if device in inside:
            run("e2fsck", "-fn", f"{new}?offset={1 << 20}")
            assert run("debugfs", "-R", "cat /text", f"{new}?offset={1 << 20}") == (files / "text").read_text()
        new.unlink()
    assert "\ntext\n" in shown


def disk_of(files: Path, path: Path) -> Path:
    """Make a disk with a partition with files on it."""
    run("truncate", "-s", "80M", path)
    run("sfdisk", "--quiet", path, input="label: gpt\nstart=2048, size=64M\n")
    run("truncate", "-s", "64M", path.with_suffix(".part"))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", files, path.with_suffix(".part"))
    run("dd", f"if={path.with_suffix('.part')}", f"of={path}", "bs=1M", "seek=1", "conv=notrunc", "status=none")
    return path


def test_the_demo_works_where_only_bootstrap_was_run(clean_root: CleanRoot) -> None:
    clean_root.run("scripts/bootstrap")
    shown = clean_root.run("scripts/demo")
    assert shown.count("e2fsck finds it clean") == shown.count("xfs_repair finds it clean") == 2


def test_the_tests_pass_where_only_bootstrap_was_run(clean_root: CleanRoot) -> None:
    clean_root.run("scripts/bootstrap", "--test")
    assert " passed" in clean_root.run("scripts/test", *ARGUMENTS)
