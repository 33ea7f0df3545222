"""The files on the pages about configuration are read as the pages say, and the commands there work on them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands_support import blockferry, run
from config_support import SECRET, restic_repository
from pages_support import Page, run_shell, with_places


def file_of(page: Page, place: Path, name: str, replaced: Mapping[str, object]) -> Path:
    """Write the page's file, with places of this host in it."""
    (place / name).write_text(with_places(page.block("yaml"), replaced))
    return place / name


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm.img"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    run("mke2fs", "-q", "-F", "-t", "ext4", path)
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text(SECRET)
    return restic_repository(tmp_path / "repository")


def test_our_own_file_is_understood(tmp_path: Path) -> None:
    page = Page("configuration.md")
    file = file_of(page, tmp_path, "config.yaml", {"borgmatic:/etc/borgmatic/config.yaml#nas": "borg:/x"})
    said = run_shell(page.block(), {}, env={"BLOCKFERRY_CONFIG": str(file)})
    assert "2 volumes, 1 groups, and nothing is wrong" in said


@pytest.mark.parametrize("how", ["read", pytest.param("run", marks=pytest.mark.thorough)])
def test_borgmatics_file_has_volumes(how: str, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    borgmatic = Path(sys.executable).with_name("borgmatic")
    if not borgmatic.exists():
        pytest.skip("no borgmatic: scripts/bootstrap --test installs it")
    monkeypatch.setenv("BLOCKFERRY_BORGMATIC", str(borgmatic))
    (tmp_path / "key").write_text(SECRET)
    replaced = {
        "ssh://nas/./volumes": tmp_path / "repository",
        "/root/passphrase": tmp_path / "key",
        "/dev/vg/vm": image,
    }
    page = Page("borgmatic.md")
    file = file_of(page, tmp_path, "config.yaml", replaced)
    shown = blockferry("--config", file, "config", "show", "--json").json()
    assert shown["repository"] == f"borgmatic:{file}"
    assert (list(shown["volumes"]), list(shown["groups"])) == (["vm"], ["mail"])
    if how == "run":
        monkeypatch.setenv("BORG_PASSPHRASE", SECRET)
        run("borg", "init", "--encryption", "repokey-blake2", tmp_path / "repository")
        monkeypatch.delenv("BORG_PASSPHRASE")
        list_them, back_up = page.blocks()
        run_shell(back_up + list_them, {"/etc/borgmatic/config.yaml": file})


def test_a_profile_is_backed_up_to(tmp_path: Path, image: Path, repository: Path) -> None:
    (tmp_path / "nas.env").write_text("RESTIC_COMPRESSION=max\n")
    replaced = {
        "sftp:nas:/srv/volumes": repository,
        "/etc/resticprofile/key": tmp_path / "key",
        "/etc/resticprofile/nas.env": tmp_path / "nas.env",
        "systemctl stop shop": f"touch {tmp_path}/stopped",
        "systemctl start shop": f"rm {tmp_path}/stopped; touch {tmp_path}/started",
    }
    page = Page("resticprofile.md")
    file = file_of(page, tmp_path, "profiles.yaml", replaced)
    run_shell(page.block(), {"/dev/vg/vm": image, "/etc/resticprofile/profiles.yaml": file})
    assert [(tmp_path / name).exists() for name in ("stopped", "started")] == [False, True]


def test_a_location_is_backed_up(tmp_path: Path, image: Path, repository: Path) -> None:
    (tmp_path / ".autorestic.env").write_text(f"AUTORESTIC_NAS_RESTIC_PASSWORD='{SECRET}'\n")
    replaced = {
        "type: rest": "type: local",
        "https://nas:8000/volumes": repository,
        "/dev/vg/vm": image,
        "systemctl stop shop": f"touch {tmp_path}/stopped",
        "systemctl start shop": f"rm {tmp_path}/stopped; touch {tmp_path}/started",
    }
    page = Page("autorestic.md")
    file = file_of(page, tmp_path, ".autorestic.yml", replaced)
    run_shell(page.block(), {"/etc/.autorestic.yml": file})
    assert [(tmp_path / name).exists() for name in ("stopped", "started")] == [False, True]
