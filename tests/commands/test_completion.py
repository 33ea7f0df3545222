"""Completion as a shell has it: commands, names in the configuration, snapshots in the catalog; nothing is opened."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from blockferry.catalog import Catalog
from blockferry.cli.main import cli
from blockferry.snapshot import Snapshot
from commands_support import blockferry
from sets_support import common_record

PACKAGING = Path(__file__).parents[2] / "packaging" / "completion"


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A host with two volumes, a group, two snapshots, and a repository that nobody can open."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "repository: borg:/nowhere\n"
        "volumes: {home: {path: /dev/vg/home}, vm: {path: /srv/vm.img}}\n"
        "groups: {homepages: {volume: /srv}}\n"
    )
    state = tmp_path / "state"
    state.mkdir()
    catalog = Catalog(state / "catalog.sqlite")
    for name, created in (("aa01", "2026-01-01T00:00:00Z"), ("ab02", "2026-02-02T00:00:00Z")):
        record = common_record(4096, 4096, snapshot=name, created=created)
        catalog.add("borg:/nowhere", Snapshot.of(record, name), record, {})
    catalog.close()
    variables = {"BLOCKFERRY_CONFIG": str(config), "BLOCKFERRY_STATE_DIR": str(state)}
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    return variables


def completed(line: str) -> list[str]:
    """Return the names that are offered behind a line."""
    *words, incomplete = line.split(" ")[1:]
    found = ShellComplete(cli, {}, "blockferry", "_BLOCKFERRY_COMPLETE").get_completions(words, incomplete)
    return [each.value for each in found if each.type == "plain"]


@pytest.mark.usefixtures("env")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("blockferry ser", ["serve"]),
        ("blockferry schedule in", ["install"]),
        ("blockferry backup --dr", ["--dry-run"]),
        ("blockferry backup ho", ["home", "homepages"]),
        ("blockferry group ", ["homepages"]),
        ("blockferry restore a", ["ab02", "aa01"]),
        ("blockferry backup home --since ", ["none", "latest", "ab02", "aa01"]),
    ],
)
def test_commands_and_names_are_offered(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


@pytest.mark.usefixtures("env")
def test_a_configuration_that_is_named_is_the_one_that_counts(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("groups: {mail: {volume: /srv}}")
    assert completed(f"blockferry --config {other} group ") == ["mail"]


def test_where_there_is_nothing_to_read_nothing_is_offered_and_nothing_said(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("groups: [this is no")
    (tmp_path / "state" / "catalog.sqlite").write_text("no database")
    assert completed("blockferry restore a") == []
    words = {"_BLOCKFERRY_COMPLETE": "bash_complete", "COMP_WORDS": "blockferry group ", "COMP_CWORD": "2"}
    done = blockferry(env=env | words)
    assert (done.out.strip(), done.err) == ("", "")


@pytest.mark.parametrize(
    ("shell", "file"), [("bash", "blockferry"), ("zsh", "_blockferry"), ("fish", "blockferry.fish")]
)
def test_the_command_prints_what_is_shipped(shell: str, file: str) -> None:
    printed = CliRunner().invoke(cli, ["completion", shell]).output
    assert printed == (PACKAGING / file).read_text()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_itself_takes_the_script(shell: str, env: dict[str, str]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}: apt install {shell}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    file = {"bash": "blockferry", "zsh": "_blockferry", "fish": "blockferry.fish"}[shell]
    source = f"source {shlex.quote(str(PACKAGING / file))}"
    as_readline = "compopt() { :; }; COMP_WORDS=(blockferry backup ho); COMP_CWORD=2"
    ask = {
        "bash": f"{as_readline}; _blockferry_completion blockferry; echo ${{COMPREPLY[@]}}",
        "zsh": "whence -w _blockferry_completion",
        "fish": "complete --do-complete 'blockferry backup ho'",
    }[shell]
    begin = "autoload -Uz compinit; compinit -u -D; " if shell == "zsh" else ""
    done = subprocess.run(
        [shell, "-c", f"{begin}{source}\n{ask}"],
        env=os.environ | env | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("function" if shell == "zsh" else "homepages") in done.stdout
    assert done.stderr == ""
