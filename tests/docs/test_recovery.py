"""The shell commands of docs/recovery.md bring volumes back from real repositories, without blockferry."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockferry.extents import ExtentSet
from blockferry.manager import plugin_manager, repository_named
from commands_support import new_depot
from pages_support import ROOT, Page, run_shell
from sets_support import SharedVolume, common_record, make_set

PAGE = Page("recovery.md")
BLOCKFERRY = str(Path(sys.executable).with_name("blockferry"))
MIB = 1 << 20
SIZE = 64 * MIB

Attach = Callable[..., str]

pytestmark = pytest.mark.root


def blocks(heading: str) -> list[str]:
    """Return the shell blocks below a heading of the page, in order."""
    return PAGE.blocks(below=heading)


def blockferry(*arguments: str) -> dict[str, object]:
    done = subprocess.run([BLOCKFERRY, *arguments, "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of ext4 with files, and with junk in its free space that no restore has to bring back."""
    directory = tmp_path_factory.mktemp("volume")
    files = directory / "files"
    files.mkdir()
    for number in range(40):
        (files / f"file {number}").write_bytes(os.urandom(number * 20_000))
    image = directory / "volume.img"
    image.write_bytes(os.urandom(MIB) * (SIZE // MIB))
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(files), str(image)], check=True)
    return image


@pytest.fixture
def worn_device(tmp_path: Path, attach: Attach) -> Path:
    """A block device, larger than the volume, that is full of something else."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"old!" * ((SIZE + 8 * MIB) // 4))
    return Path(attach(disk))


def assert_restored(target: Path, volume: Path) -> None:
    """Compare every byte in use, and let e2fsck have its say."""
    extents = blockferry("used", str(volume))["extents"]
    assert isinstance(extents, list)
    assert extents
    with target.open("rb") as restored, volume.open("rb") as original:
        for start, length in extents:
            restored.seek(start)
            original.seek(start)
            assert restored.read(length) == original.read(length), f"bytes from {start} on differ"
    subprocess.run(["e2fsck", "-fn", str(target)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def borg_archive(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    repository = tmp_path_factory.mktemp("borg") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BORG_PASSPHRASE", "secret")
        subprocess.run(["borg", "init", "--encryption=repokey-blake2", str(repository)], check=True)
        return repository, str(blockferry("backup", str(volume), "--repo", f"borg:{repository}")["archive"])


@pytest.fixture
def borg_places(borg_archive: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("BORG_PASSPHRASE", "secret")
    return {"/srv/backup/borg": borg_archive[0], "the-name-of-the-archive": borg_archive[1]}


def test_borg_extract_writes_the_volume_over_a_used_device(
    volume: Path, worn_device: Path, borg_places: dict[str, object]
) -> None:
    variables, record, write, *_others = blocks("From borg")
    printed = run_shell(variables + record + write, borg_places | {"/dev/sdX": worn_device})
    assert json.loads(printed)["size"] == SIZE
    assert_restored(worn_device, volume)


def test_borg_extract_writes_the_volume_to_a_sparse_file(
    volume: Path, tmp_path: Path, borg_places: dict[str, object]
) -> None:
    variables, _record, _write, write_sparse, *_others = blocks("From borg")
    target = tmp_path / "restored.img"
    run_shell(variables + write_sparse, borg_places | {"/dev/sdX": target})
    assert_restored(target, volume)
    assert target.stat().st_size == SIZE
    assert target.stat().st_blocks * 512 < SIZE * 3 // 4


def test_borg_mount_shows_single_files_of_the_volume(tmp_path: Path, borg_places: dict[str, object]) -> None:
    variables, _record, _write, _write_sparse, look = blocks("From borg")
    if subprocess.run(["borg", "mount", "--help"], capture_output=True, check=False).returncode:
        pytest.skip("this borg cannot mount: install python3-pyfuse3, or run scripts/bootstrap --test as root")
    archive, mounted = tmp_path / "archive", tmp_path / "mounted"
    look = look.replace("umount /mnt/volume", "ls /mnt/volume\numount /mnt/volume", 1)
    places = borg_places | {"/mnt/archive": archive, "/mnt/volume": mounted}
    try:
        printed = run_shell(variables + look, places)
    finally:
        for place in (mounted, archive):
            if place.is_mount():
                subprocess.run(["umount", "--lazy", str(place)], check=True)
    assert "file 7\n" in printed


@pytest.mark.thorough
def test_borg_2_extract_writes_the_volume_over_a_used_device(
    volume: Path, worn_device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    borg_2 = ROOT / ".tools" / "borg-2" / "bin"
    if not (borg_2 / "borg").exists():
        pytest.skip("no borg 2 in .tools: run scripts/bootstrap --test")
    repository = tmp_path / "repository"
    monkeypatch.setenv("PATH", f"{borg_2}:{os.environ['PATH']}")
    monkeypatch.setenv("BORG_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("BORG_PASSPHRASE", "secret")
    create = ["borg", "-r", str(repository), "repo-create", "--encryption=aes256-ocb"]
    subprocess.run(create, check=True, capture_output=True)
    archive = blockferry("backup", str(volume), "--repo", f"borg:{repository}")["archive"]
    variables, write = blocks("From borg 2")
    places = {"/srv/backup/borg2": repository, "the-name-of-the-archive": archive, "/dev/sdX": worn_device}
    assert json.loads(run_shell(variables + write, places))["size"] == SIZE
    assert_restored(worn_device, volume)


@pytest.fixture(scope="module")
def restic_repository(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("restic") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESTIC_PASSWORD", "secret")
        subprocess.run(["restic", "init", "--quiet", "--repo", str(repository)], check=True)
        blockferry("backup", str(volume), "--repo", f"restic:{repository}")
    return repository


@pytest.mark.parametrize("target_is", ["device", "new file", "old file"])
def test_restic_restore_and_a_loop_put_the_volume_together(
    target_is: str,
    volume: Path,
    worn_device: Path,
    restic_repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RESTIC_PASSWORD", "secret")
    target = worn_device if target_is == "device" else tmp_path / "restored.img"
    if target_is == "old file":
        target.write_bytes(b"old!" * (SIZE // 4 + 99))
    places = {"/srv/backup/restic": restic_repository, "/dev/sdX": target, "/var/tmp/volume": tmp_path / "scratch"}
    run_shell("".join(blocks("From restic")), places)
    assert_restored(target, volume)
    assert target_is == "device" or target.stat().st_size == SIZE


def test_the_page_names_the_filesystem_afterwards(volume: Path) -> None:
    (look,) = blocks("Afterwards")
    assert 'TYPE="ext4"' in run_shell(f"TARGET={volume}\n{look}", {})


@pytest.mark.parametrize("tool", ["borg", pytest.param("restic", marks=pytest.mark.thorough)])
def test_parts_are_put_over_what_they_lie_on(
    tool: str, worn_device: Path, tmp_path: Path, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts, the second of which overwrites some of the first, once with zeros."""
    monkeypatch.setenv("BORG_PASSPHRASE", "secret")
    monkeypatch.setenv("RESTIC_PASSWORD", "secret")
    repository, host = tmp_path / "repository", tmp_path / "host.img"
    init = {"borg": ["borg", "init", "-e", "repokey-blake2"], "restic": ["restic", "init", "--quiet", "--repo"]}[tool]
    subprocess.run([*init, str(repository)], check=True, capture_output=True)
    with host.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(host)], check=True)
    image = mount(host) / "volume.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    files = tmp_path / "files"
    files.mkdir()
    (files / "file").write_bytes(os.urandom(30 * MIB))
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(files), str(image)], check=True)
    archives = []
    for changed in [], [(3 * MIB, os.urandom(9 * MIB))], [(5 * MIB, os.urandom(100)), (9 * MIB, bytes(2 * MIB))]:
        mounted = mount(image, "loop")
        with (mounted / "file").open("r+b") as file:
            for offset, content in changed:
                file.seek(offset)
                file.write(content)
        subprocess.run(["umount", str(mounted)], check=True)
        done = blockferry("backup", str(image), "--incremental", "--repo", f"{tool}:{repository}")
        assert done["part"] == bool(changed)
        archives.append(done["archive"])
    of_borg = blocks("From borg")[0] + blocks("From borg")[2]
    of_restic = "".join(blocks("From restic"))
    whole = {"borg": of_borg, "restic": of_restic}[tool]
    from_restic, from_borg = blocks("A part")
    apply = {"borg": from_borg, "restic": from_restic}[tool]
    names = {"borg": "the-name-of-the-archive", "restic": "SNAPSHOT=latest"}
    first = {"borg": archives[0], "restic": f"SNAPSHOT={archives[0]}"}[tool]
    places = {f"/srv/backup/{tool}": repository, names[tool]: first, "/dev/sdX": worn_device}
    scratch = tmp_path / "scratch"
    run_shell(whole, places | ({"/var/tmp/volume": scratch} if tool == "restic" else {}))
    variable = {"borg": "BORG_REPO", "restic": "RESTIC_REPOSITORY"}[tool]
    for part in archives[1:]:
        run_shell(f"export {variable}={repository}\nPART={part}\nTARGET={worn_device}\nSCRATCH={scratch}\n{apply}", {})
    assert_restored(worn_device, image)


@pytest.mark.parametrize(
    ("tool", "target_is"),
    [
        ("borg", "device"),
        ("restic", "new file"),
        pytest.param("borg", "new file", marks=pytest.mark.thorough),
        pytest.param("restic", "device", marks=pytest.mark.thorough),
    ],
)
def test_a_log_is_put_over_the_shares_of_its_set(
    tool: str, target_is: str, worn_device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shares that meet in the middle of a block, and writes in both of them and in free space."""
    depot = new_depot(tool, tmp_path / "repository")
    for name, value in depot.env.items():
        monkeypatch.setenv(name, value)
    volume = SharedVolume(os.urandom(9 * MIB + 512))
    size = len(volume.instant)
    used = ExtentSet.from_pairs([(0, 3 * MIB), (3 * MIB + 4096, 5 * MIB)])
    shares = [ExtentSet.from_pairs([(0, 5 * MIB + 512)]), ExtentSet.from_pairs([(5 * MIB + 512, 5 * MIB)])]
    writes = {1: [(MIB, os.urandom(70_000)), (6 * MIB, bytes(100)), (9 * MIB, b"free")], 2: [(5 * MIB, bytes(900))]}
    with contextlib.closing(repository_named(plugin_manager(), depot.reference)) as repository:
        made = make_set(repository, volume, used, shares, writes, common_record(size, repository.unit(size)))
    target = worn_device if target_is == "device" else tmp_path / "restored.img"
    monkeypatch.setenv({"borg": "BORG_REPO", "restic": "RESTIC_REPOSITORY"}[tool], str(depot.path))
    prepare, from_borg, from_restic = blocks("A set")
    places = {"the-id-of-the-set": made.snapshot.id, "/dev/sdX": target, "/var/tmp/volume": tmp_path / "scratch"}
    run_shell(prepare + {"borg": from_borg, "restic": from_restic}[tool], places)
    with target.open("rb") as file:
        made.assert_is(file.read(size))
    assert not (tmp_path / "scratch").exists()


def test_every_command_on_the_page_is_run_here() -> None:
    headings = ("From borg", "From borg 2", "From restic", "A part", "A set", "Afterwards")
    assert {heading: len(blocks(heading)) for heading in headings} == {
        "From borg": 5,
        "From borg 2": 2,
        "From restic": 4,
        "A part": 2,
        "A set": 3,
        "Afterwards": 1,
    }
    assert len(PAGE.blocks()) == 17
