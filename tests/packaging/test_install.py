"""The distribution: what is in it, and that it works where nothing else of ours is: a clean environment, pipx."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from commands_support import new_depot, run

ROOT = Path(__file__).parents[2]
SDIST = {
    *("plugin", "adapters", "tests", "docs", "scripts", "benchmarks", "changelog", "packaging"),
    *("pyproject.toml", "tox.ini", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", ".gitignore"),
}
MOST = 3 << 20


@dataclasses.dataclass(frozen=True)
class Distribution:
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Build the sdist from the checkout, and the wheel from nothing but the sdist."""
    place = tmp_path_factory.mktemp("distribution")
    hatchling = [sys.executable, "-m", "hatchling", "build", "--directory", place]
    run(*hatchling, "--target", "sdist", cwd=ROOT)
    (sdist,) = place.glob("*.tar.gz")
    (place / "unpacked").mkdir()
    run("tar", "-xf", sdist, "-C", place / "unpacked")
    (source,) = (place / "unpacked").iterdir()
    run(*hatchling, "--target", "wheel", cwd=source)
    (wheel,) = place.glob("*.whl")
    return Distribution(sdist, wheel)


@pytest.fixture(scope="module")
def environment(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel where nothing else is."""
    place = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", place)
    run(place / "bin" / "pip", "install", "--quiet", distribution.wheel, env=clean())
    return place


def clean() -> dict[str, str]:
    """Return an environment in which no Python finds this checkout."""
    return {name: text for name, text in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}


def test_the_sdist_holds_what_belongs_into_it_and_nothing_else(distribution: Distribution) -> None:
    with tarfile.open(distribution.sdist) as archive:
        members = archive.getmembers()
    names = [member.name.split("/", 1)[1] for member in members]
    assert {name.split("/")[0] for name in names} == SDIST
    assert all(member.isfile() for member in members)
    assert not [name for name in names if "__pycache__" in name or name.startswith("docs/_build")]
    assert not [name for name in names if Path(name).suffix in {".img", ".raw", ".qcow2", ".so", ".pyc", ".deb"}]
    assert distribution.sdist.stat().st_size < MOST
    tracked = (
        set(run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").split())
        if (ROOT / ".git").exists()
        else set()
    )
    assert not tracked or set(names) - tracked == {"PKG-INFO"}


def test_the_wheel_holds_the_packages_and_what_the_system_can_use(distribution: Distribution) -> None:
    names = zipfile.ZipFile(distribution.wheel).namelist()
    data = {name.split(".data/data/")[1] for name in names if ".data/data/" in name}
    tops = {name.split("/")[0] for name in names}
    assert {each for each in tops if "." not in each} == {"blockferry", "blockferry_borg", "blockferry_restic"}
    man = {f"share/man/man1/{path.name}" for path in (ROOT / "packaging" / "man").iterdir()}
    completions = {
        "share/bash-completion/completions/blockferry",
        "share/zsh/site-functions/_blockferry",
        "share/fish/vendor_completions.d/blockferry.fish",
    }
    assert data == man | completions
    packages = ("plugin/blockferry", "adapters/blockferry_borg", "adapters/blockferry_restic")
    sources = {
        path.relative_to(ROOT / top).as_posix() for top in ("plugin", "adapters") for path in sources_of(top, packages)
    }
    assert {
        name for name in names if name.split("/")[0].startswith("blockferry") and "." not in name.split("/")[0]
    } == sources


def sources_of(top: str, packages: tuple[str, ...]) -> list[Path]:
    mine = [ROOT / package for package in packages if package.startswith(top)]
    return [path for each in mine for path in each.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.thorough
@pytest.mark.parametrize("tool", ["borg", "restic"])
def test_a_clean_environment_backs_up_and_restores(tool: str, environment: Path, files: Path, tmp_path: Path) -> None:
    blockferry, depot = environment / "bin" / "blockferry", new_depot(tool, tmp_path / "repository")
    found = json.loads(run(blockferry, "doctor", "--json", env=clean()))["findings"]
    origins = {each["name"]: each["found"] for each in found if each["name"].startswith("plugin ")}
    assert str(environment) in origins["plugin borg"]
    image, target = tmp_path / "disk.img", tmp_path / "back.img"
    run("truncate", "-s", "64M", image)
    run("mke2fs", "-q", "-t", "ext4", "-d", files, image)
    env = clean() | depot.env
    run(blockferry, "backup", image, "--repo", depot.reference, env=env)
    run(blockferry, "restore", "latest", target, "--repo", depot.reference, env=env)
    run("e2fsck", "-fn", target)
    run(blockferry, "verify", "latest", "--against", image, "--repo", depot.reference, env=env)
    run(blockferry, "verify", "latest", "--against", target, "--repo", depot.reference, env=env)


@pytest.mark.thorough
@pytest.mark.parametrize("extra", ["borg", "dask", "redis"])
def test_the_extras_can_be_had(extra: str, distribution: Distribution, environment: Path) -> None:
    report = run(
        *(environment / "bin" / "pip", "install", "--dry-run", "--quiet", "--report", "-"),
        f"blockferry[{extra}] @ {distribution.wheel.as_uri()}",
        env=clean(),
    )
    wanted = {"borg": "borgbackup", "dask": "distributed", "redis": "redis"}[extra]
    assert wanted in {each["metadata"]["name"].lower() for each in json.loads(report)["install"]}


@pytest.mark.thorough
def test_pipx_installs_the_command_and_its_manual(distribution: Distribution, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(tmp_path / "venv" / "bin" / "pip", "install", "--quiet", "pipx", env=clean())
    places = {name: str(tmp_path / name) for name in ("PIPX_HOME", "PIPX_BIN_DIR", "PIPX_MAN_DIR")}
    run(tmp_path / "venv" / "bin" / "pipx", "install", distribution.wheel, env=clean() | places)
    command = tmp_path / "PIPX_BIN_DIR" / "blockferry"
    assert run(command, "--version", env=clean()).startswith("blockferry, version ")
    doctor = subprocess.run([command, "doctor"], env=clean(), capture_output=True, text=True, check=False)
    assert (doctor.returncode, doctor.stderr) == (0, "")
    assert (tmp_path / "PIPX_MAN_DIR" / "man1" / "blockferry.1").exists()
