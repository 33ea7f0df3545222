"""GETFSMAP: what the kernel says of filesystems that are mounted, frozen and lived in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from blockferry.used import fsmap
from blockferry.volume import Volume
from volumes_support import ask, copy_used, fingerprint, live_in, make_image, run

MIB = 1 << 20
pytestmark = pytest.mark.root

VARIANTS = {
    "ext4": ("mkfs.ext4", 96, ""),
    "ext4, 1 KiB blocks": ("mkfs.ext4", 96, "-b 1024"),
    "ext4, clusters of 64 KiB": ("mkfs.ext4", 96, "-O bigalloc -C 65536"),
    "ext4 without journal": ("mkfs.ext4", 96, "-O ^has_journal"),
    "ext4 without checksums and groups of groups": ("mkfs.ext4", 300, "-O ^metadata_csum,^flex_bg,uninit_bg"),
    "ext3": ("mkfs.ext3", 96, ""),
    "ext2": ("mkfs.ext2", 96, ""),
    "xfs": ("mkfs.xfs", 96, ""),
    "xfs, reverse mapping": ("mkfs.xfs", 96, "-m rmapbt=1"),
    "xfs, 1 KiB blocks": ("mkfs.xfs", 96, "-b size=1024"),
    "xfs, 64 KiB blocks": ("mkfs.xfs", 520, "-b size=65536"),
}


def freeze(place):
    run("fsfreeze", "--freeze", place)


def thaw(place):
    run("fsfreeze", "--unfreeze", place)


def check(image):
    """Check a filesystem that was not unmounted: first it recovers its journal, as a mount would."""
    if run("blkid", "-p", "-s", "TYPE", "-o", "value", image).strip() == "xfs":
        run("xfs_repair", "-n", image)
    else:
        run("e2fsck", "-f", "-n", image)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_used_blocks_of_a_frozen_filesystem_are_all_that_it_needs(variant, tmp_path, attach, mount):
    tool, mib, options = VARIANTS[variant]
    image = make_image(tmp_path / "disk.img", mib * MIB)
    run(tool, "-q", *options.split(), image)
    device = attach(image)
    place = mount(device)
    live_in(place, 1)
    live_in(place, 2, files=200)
    content = fingerprint(place)
    restored = tmp_path / "restored.img"
    freeze(place)
    try:
        for path in (device, image):
            volume = Volume.discover(path)
            used, reasons = ask(fsmap, volume)
            assert used is not None, reasons
            assert (used.method, reasons) == ("getfsmap", [])
            assert used.extents.total < 0.9 * volume.size
        copy_used(volume, used.extents, restored)
    finally:
        thaw(place)
    again = mount(restored, "nouuid" if tool == "mkfs.xfs" else "rw")
    assert fingerprint(again) == content
    run("umount", again)
    check(restored)


@pytest.mark.parametrize("tool", ["mkfs.ext4", "mkfs.xfs"])
def test_what_was_only_in_memory_has_blocks(tool, tmp_path, mount):
    """Nothing writes: after the reader's own flush, the disk holds what was written a moment ago."""
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run(tool, "-q", image)
    place = mount(image)
    (place / "file").write_bytes(os.urandom(20 * MIB))
    content = fingerprint(place)
    volume = Volume.discover(image)
    used, _ = ask(fsmap, volume)
    restored = copy_used(volume, used.extents, tmp_path / "restored.img")
    assert fingerprint(mount(restored, "nouuid" if tool == "mkfs.xfs" else "rw")) == content


def test_a_device_is_read_as_it_is_and_not_as_an_earlier_reader_saw_it(tmp_path, attach, mount):
    """XFS writes past the device's page cache, and a cached block would be backed up as it was."""
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run("mkfs.xfs", "-q", image)
    device = attach(image)
    place = mount(device)
    (place / "file").write_bytes(b"old" * MIB)
    run("sync", "-f", place)
    volume = Volume.discover(device)
    held = os.open(device, os.O_RDONLY)
    try:
        while os.read(held, MIB):
            pass
        with (place / "file").open("r+b") as file:
            file.write(b"new" * MIB)
        freeze(place)
        try:
            used, _ = ask(fsmap, volume)
            restored = copy_used(volume, used.extents, tmp_path / "restored.img")
        finally:
            thaw(place)
    finally:
        os.close(held)
    assert (mount(restored, "nouuid") / "file").read_bytes() == b"new" * MIB


@pytest.mark.parametrize("tool", ["mkfs.ext4", "mkfs.xfs"])
def test_a_read_only_mount_is_answered_for(tool, tmp_path, mount):
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run(tool, "-q", image)
    mount(image, "ro")
    used, reasons = ask(fsmap, Volume.discover(image))
    assert used is not None, reasons


@pytest.mark.parametrize(("tool", "option"), [("mkfs.ext4", "noload"), ("mkfs.xfs", "norecovery")])
def test_a_mount_without_recovery_is_left_to_readers_of_the_journal(tool, option, tmp_path, mount):
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run(tool, "-q", image)
    mount(image, "ro", option)
    used, (reason,) = ask(fsmap, Volume.discover(image))
    assert used is None
    assert "without replaying its journal" in reason


def test_the_records_of_an_external_log_are_passed_over(tmp_path, attach, mount):
    log = attach(make_image(tmp_path / "log.img", 64 * MIB))
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run("mkfs.xfs", "-q", "-l", f"logdev={log}", image)
    place = mount(image, f"logdev={log}")
    live_in(place, 3)
    content = fingerprint(place)
    volume = Volume.discover(image)
    freeze(place)
    try:
        used, reasons = ask(fsmap, volume)
        assert used is not None, reasons
        restored = copy_used(volume, used.extents, tmp_path / "restored.img")
    finally:
        thaw(place)
    run("umount", place)
    assert fingerprint(mount(restored, f"logdev={log}", "nouuid")) == content


def test_a_hidden_mount_point_is_not_mistaken_for_what_hides_it(tmp_path, mount):
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run("mkfs.ext4", "-q", image)
    place = mount(image)
    run("mount", "-t", "tmpfs", "none", place)
    try:
        used, (reason,) = ask(fsmap, Volume.discover(image))
    finally:
        run("umount", place)
    assert used is None
    assert "hidden" in reason


def test_what_lies_behind_the_filesystem_is_in_use(tmp_path, mount):
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run("mkfs.ext4", "-q", image, "80M")
    mount(image)
    used, _ = ask(fsmap, Volume.discover(image))
    assert used.extents.covers(80 * MIB, 96 * MIB)


def test_without_a_mount_or_with_btrfs_there_is_no_answer(tmp_path, mount):
    image = make_image(tmp_path / "disk.img", 128 * MIB)
    run("mkfs.ext4", "-q", image)
    assert ask(fsmap, Volume.discover(image)) == (None, [])
    run("mkfs.btrfs", "-q", "-f", image)
    mount(image)
    assert ask(fsmap, Volume.discover(image)) == (None, [])


@pytest.mark.parametrize("tool", ["mkfs.ext4", "mkfs.xfs"])
@pytest.mark.parametrize(("mode", "answer"), [(0o755, None), (0o000, "None ['getfsmap: ")])
def test_without_any_privilege_there_is_the_same_answer_or_the_reason_why_not(tool, mode, answer, tmp_path, mount):
    image = make_image(tmp_path / "disk.img", 96 * MIB)
    run(tool, "-q", image)
    place = mount(image)
    live_in(place, 4, files=50)
    expected, _ = ask(fsmap, Volume.discover(image))
    place.chmod(mode)
    lines = [
        "import sys; from volumes_support import ask",
        "from blockferry.used import fsmap; from blockferry.volume import Volume",
        "print(*ask(fsmap, Volume.discover(sys.argv[1])))",
    ]
    unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(
        [*unprivileged, str(image)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(answer or f"{expected} []"), done.stdout
