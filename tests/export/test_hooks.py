"""What `config generate` prints, run by real borgmatic, and in the order in which two others run their hooks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from commands_support import PASSPHRASE, Depot, Done, new_depot
from config_support import real_autorestic, real_resticprofile
from export_support import MIB, SEGMENT, Host, job

pytestmark = pytest.mark.root


def pasted(host: Host, tool: str, *names: str) -> dict[str, Any]:
    """Return what the snippet for a tool says."""
    return YAML(typ="safe").load(host.ferry("config", "generate", tool, *names).out)


@pytest.fixture
def configured(host: Host, volume: Path) -> Host:
    host.configure(f"volumes: {{home: {{path: {volume}}}}}")
    return host


class Borgmatic:
    """Real borgmatic, with the snippet in its configuration."""

    def __init__(self, host: Host, depot: Depot) -> None:
        beside = Path(sys.executable).with_name("borgmatic")
        found = beside if beside.exists() else shutil.which("borgmatic", path=os.environ.get("BORGMATIC_PATH", ""))
        if not found:
            pytest.skip("borgmatic is not installed: pip install 'borgmatic>=2.1'")
        self.host, self.depot, self.program = host, depot, str(found)
        self.file = host.directory / "borgmatic.yaml"
        said = pasted(host, "borgmatic", "home") | {
            "repositories": [{"path": str(depot.path), "label": "depot"}],
            "local_path": shutil.which("borg"),
            "borg_base_directory": os.environ["BORG_BASE_DIR"],
            "user_runtime_directory": str(host.directory),
        }
        with self.file.open("w") as file:
            YAML().dump(said, file)

    def run(self, *words: str) -> Done:
        done = subprocess.run(
            [self.program, "--config", str(self.file), *words],
            env=os.environ | self.depot.env | self.host.env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def borgmatic(configured: Host, tmp_path: Path) -> Borgmatic:
    return Borgmatic(configured, new_depot("borg", tmp_path / "repository"))


def test_borgmatic_takes_the_snippet_and_backs_up_what_it_exports(borgmatic: Borgmatic, volume: Path) -> None:
    host = borgmatic.host
    assert borgmatic.run("config", "validate").code == 0
    dry = borgmatic.run("create", "--dry-run")
    assert dry.code == 0, dry.out + dry.err
    done = borgmatic.run("create")
    assert done.code == 0, done.out + done.err
    (archive,) = borgmatic.depot.archives()
    listed = borgmatic.depot.stock("list", "--short", f"::{archive}").splitlines()
    assert f"{str(host.at).lstrip('/')}/home.json" in listed
    assert sum(".segments/000000/" in path for path in listed) > 8
    assert list(host.at.iterdir()) == []
    assert host.is_idle()


def test_borgmatic_makes_no_archive_where_nothing_can_be_exported(borgmatic: Borgmatic, volume: Path) -> None:
    volume.rename(volume.with_name("gone.img"))
    assert borgmatic.run("create").code == 1
    assert borgmatic.depot.archives() == []


@pytest.mark.thorough
def test_borgmatic_skips_a_job_whose_volume_is_another_ones_now(borgmatic: Borgmatic, volume: Path) -> None:
    borgmatic.host.export(volume, at=borgmatic.host.directory / "elsewhere")
    done = borgmatic.run("create")
    assert done.code == 0, done.out + done.err
    assert borgmatic.depot.archives() == []
    assert len(borgmatic.host.processes()) == 1


class Driver:
    """The hooks of a tool, run as its documentation says: each by a shell, a job's first failure ends the rest."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def run(self, commands: Sequence[str]) -> int:
        """Run commands until one fails; return its exit code."""
        for each in commands:
            done = subprocess.run(["sh", "-c", each], env=os.environ | self.host.env, capture_output=True, check=False)
            if done.returncode:
                return done.returncode
        return 0

    def resticprofile(self, said: Mapping[str, Any], depot: Depot) -> list[int]:
        """run-before, the backup if that went well, run-finally in any case; return the exit codes."""
        backup = said["default"]["backup"]
        codes = [self.run(backup["run-before"])]
        if codes == [0]:
            codes += [job(depot, Path(source), "job").code for source in backup["source"]]
        return [*codes, self.run(backup["run-finally"])]

    def autorestic(self, location: Mapping[str, Any], depot: Depot) -> list[int]:
        """prevalidate, which ends it all if it fails; the check of `from`, the backup, success or failure."""
        hooks = location["hooks"]
        code = self.run(hooks["prevalidate"])
        if code:
            return [code]
        assert all(Path(each).is_dir() for each in location["from"])
        code = max(job(depot, Path(each), "job").code for each in location["from"])
        return [0, code, self.run(hooks["failure" if code else "success"])]


def test_resticprofile_and_autorestic_back_up_what_the_snippets_export(configured: Host, tmp_path: Path) -> None:
    depot, driver = new_depot("restic", tmp_path / "repository"), Driver(configured)
    assert driver.resticprofile(pasted(configured, "resticprofile", "home"), depot) == [0, 0, 0]
    location = pasted(configured, "autorestic", "home")["locations"]["home"]
    assert driver.autorestic(location, depot) == [0, 0, 0]
    assert len(depot.archives()) == 2
    for archive in depot.archives():
        assert "/home.json" in depot.stock("ls", archive)
    assert list(configured.at.iterdir()) == []


@pytest.mark.thorough
def test_hooks_of_a_job_that_cannot_export_leave_another_ones_export_alone(
    configured: Host, volume: Path, tmp_path: Path
) -> None:
    depot, driver = new_depot("restic", tmp_path / "repository"), Driver(configured)
    said = pasted(configured, "resticprofile", "home")
    before = json.loads(configured.ferry("status", "--json").out)["exports"]
    assert before == []
    words = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:]); sys.stdin.read()"]
    other = subprocess.Popen(
        ["setsid", *words, "sh", "-c", said["default"]["backup"]["run-before"][0]],
        env=os.environ | configured.env,
        stdin=subprocess.PIPE,
    )
    while not (configured.at / "home.json").exists():
        assert other.poll() is None
    assert driver.resticprofile(said, depot) == [75, 1]
    (shown,) = json.loads(configured.ferry("status", "--json").out)["exports"]
    assert (shown["state"], shown["volumes"][0]["bytes_used"] > MIB) == ("exported", True)
    other.communicate()
    assert driver.resticprofile(said, depot) == [0, 0, 0]


@pytest.mark.parametrize("tool", ["borgmatic", "resticprofile", "autorestic"])
def test_a_snippet_names_the_directory_and_the_options_wherever_they_are_needed(configured: Host, tool: str) -> None:
    place = configured.directory / "a place"
    text = configured.ferry("config", "generate", tool, "home", "--at", place, "--as", "image").out
    assert place.is_dir()
    export, *releases = [line.strip("- ") for line in text.splitlines() if f"--at '{place}' home" in line]
    assert " export --as image " in export
    assert all(" release " in each for each in releases)
    assert len(releases) == (2 if tool == "autorestic" else 1)
    configured.ferry("config", "generate", tool, "hmoe").refused(2, "did you mean home")


@pytest.fixture(scope="module")
def resticprofile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one resticprofile that a registry of packages has: the first, in Python, with hooks before and after."""
    place = tmp_path_factory.mktemp("resticprofile") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    words = [place / "bin" / "pip", "install", "--quiet", "resticprofile==0.5.2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"resticprofile cannot be had: {done.stderr[-200:]}")
    return place / "bin" / "resticprofile"


@pytest.mark.thorough
def test_a_real_resticprofile_runs_the_job_and_what_it_stored_comes_back(
    configured: Host, volume: Path, resticprofile: Path, tmp_path: Path
) -> None:
    depot, password = new_depot("restic", tmp_path / "repository"), tmp_path / "password"
    password.write_text(PASSPHRASE)
    snippet = pasted(configured, "resticprofile", "home")["default"]["backup"]
    profiles = tmp_path / "profiles.toml"
    profiles.write_text(
        f'[default]\nrepository = "{depot.path}"\npassword-file = "{password}"\n[default.backup]\n'
        f"run-before = {json.dumps(snippet['run-before'])}\n"
        f"run-after = {json.dumps([f'{each} --json >{tmp_path}/said' for each in snippet['run-finally']])}\n"
        f"source = {json.dumps(snippet['source'])}\n"
        "[default.retention]\nafter-backup = true\nkeep-last = 1\nprune = true\n"
    )

    def run() -> int:
        """Run the job; return how much it read."""
        words = [resticprofile, "--no-ansi", "--quiet", "--config", profiles, "backup"]
        done = subprocess.run(words, env=os.environ | configured.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (released,) = json.loads((tmp_path / "said").read_text())["released"]
        return int(released["bytes_read"])

    assert run() > 48 * MIB
    with volume.open("r+b") as file:
        file.seek(40 * MIB)
        file.write(os.urandom(MIB))
    assert run() == SEGMENT
    (kept,) = depot.archives()
    depot.stock("restore", kept, "--target", tmp_path / "back")
    found = next((tmp_path / "back").rglob("home.json")).parent
    configured.ferry("restore", "latest", tmp_path / "home.img", "--repo", f"dir:{found}", "--json").json()
    configured.ferry("verify", "latest", "--against", volume, "--repo", f"dir:{found}", "--json").json()
    # The same file, read for its repository; as its job it would export the volume first, and then find it in use.
    reference = f"resticprofile:{profiles}"
    configured.ferry("backup", volume, "--repo", reference, "--no-job", "--json").json()
    assert len(configured.ferry("snapshots", "--repo", reference, "--json").json()["snapshots"]) == 1
    assert len(depot.archives()) == 2


def run(host: Host, *words: str) -> int:
    """Run another tool's command on a host; return its exit code."""
    env = os.environ | host.env
    return subprocess.run(words, env=env, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode


@pytest.mark.thorough
def test_a_real_autorestic_runs_the_job(configured: Host, volume: Path, tmp_path: Path) -> None:
    depot, file = new_depot("restic", tmp_path / "repository"), tmp_path / "autorestic.yml"
    said = pasted(configured, "autorestic", "home")
    location = said["locations"]["home"] | {"to": ["nas"]}
    (of_success,) = location["hooks"]["success"]
    location["hooks"]["success"] = [f"{of_success} --json >{tmp_path}/said"]
    backends = {"nas": {"type": "local", "path": str(depot.path), "key": PASSPHRASE}}
    with file.open("w") as opened:
        YAML().dump(said | {"locations": {"home": location}, "backends": backends}, opened)

    words = [real_autorestic(), "--ci", "-c", str(file), "backup", "-l", "home"]

    def read() -> int:
        assert run(configured, *words) == 0
        (released,) = json.loads((tmp_path / "said").read_text())["released"]
        return int(released["bytes_read"])

    assert read() > 48 * MIB
    with volume.open("r+b") as changed:
        changed.seek(40 * MIB)
        changed.write(os.urandom(MIB))
    assert read() == SEGMENT
    stored = depot.archives()
    assert len(stored) == 2
    volume.rename(volume.with_name("gone.img"))
    assert run(configured, *words) == 1
    assert depot.archives() == stored
    depot.stock("restore", stored[-1], "--target", tmp_path / "back")
    found = next((tmp_path / "back").rglob("home.json")).parent
    configured.ferry(
        "verify", "latest", "--against", volume.with_name("gone.img"), "--repo", f"dir:{found}", "--json"
    ).json()


@pytest.mark.thorough
def test_a_new_resticprofile_takes_the_snippet_as_it_is(configured: Host, volume: Path, tmp_path: Path) -> None:
    depot, file = new_depot("restic", tmp_path / "repository"), tmp_path / "profiles.yaml"
    (tmp_path / "password").write_text(PASSPHRASE)
    said = pasted(configured, "resticprofile", "home")
    said["default"] |= {"repository": str(depot.path), "password-file": str(tmp_path / "password")}
    with file.open("w") as opened:
        YAML().dump(said, opened)

    words = [real_resticprofile(), "--no-ansi", "--config", str(file), "backup"]
    assert run(configured, *words) == 0
    (stored,) = depot.archives()
    assert "/home.json" in depot.stock("ls", stored)
    assert list(configured.at.iterdir()) == []
    volume.rename(volume.with_name("gone.img"))
    assert run(configured, *words) != 0
    assert depot.archives() == [stored]
    assert configured.is_idle()
