"""A backup as a run of borgmatic: its commands, its retention, its archive names."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockferry.config.borgmatic_job import confined, means
from commands_support import blockferry, run
from config_support import FORMAT, Job

COMMANDS = """
commands:
  - {before: everything, run: ['echo begin >> LOG']}
  - {before: action, when: [create], run: ['echo before create >> LOG']}
  - {after: action, when: [prune], run: ['echo after prune >> LOG']}
  - {after: repository, states: [finish], run: ['echo finish {repository_label} >> LOG']}
  - {after: error, run: ['echo error >> LOG']}
"""


def commands(job: Job) -> str:
    return COMMANDS.replace("LOG", str(job.file.parent / "log"))


def test_borgmatics_commands_run_around_it_and_its_rules_keep_each_series_apart(
    job: Job, volume: Path, tmp_path: Path, borgmatic: Path
) -> None:
    # The volume is called as the host may be: its archives are none of borgmatic's all the same.
    host = run("hostname").strip().split(".")[0]
    job.write(
        f"{commands(job)}\nkeep_secondly: 1\nskip_actions: [check, compact]\narchive_name_format: {FORMAT}\n"
        f"constants: {{blockferry: {{volumes: {{{host}: {{path: {volume}}}}}}}}}"
    )
    run(borgmatic, "--config", job.file, "create")
    (tmp_path / "log").unlink()
    first, second = (blockferry("--config", job.file, "backup", host, "--json").json() for _ in range(2))
    assert job.log[:4] == ["begin", "before create", "after prune", "finish nas"]
    own, volumes = job.archives
    assert "+" not in own, "borgmatic's own is of another series"
    assert volumes == second["archive"] != first["archive"]
    assert volumes.startswith(f"{host}+{host}-20")
    run(borgmatic, "--config", job.file, "create", "prune")
    assert volumes in job.archives
    assert own not in job.archives
    assert blockferry("verify", second["snapshot"], "--against", volume, "--repo", job.reference).code == 0


def test_when_the_backup_fails_so_does_borgmatics_run(job: Job, volume: Path) -> None:
    job.write(commands(job) + "\nretries: 1")
    with volume.open("rb+"):
        done = blockferry("backup", volume, "--repo", job.reference)
    assert done.code == 1
    assert "blockferry: " in done.err
    assert "nothing can make it hold still" in done.err
    assert job.log == ["begin", "before create", "before create", "error"]
    assert job.archives == []


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (75, 75, "not now"),
        pytest.param(1, 1, "before the backup", marks=pytest.mark.thorough),
        pytest.param(0, 2, "skip_actions", marks=pytest.mark.thorough),
    ],
)
def test_no_backup_is_made_where_borgmatic_makes_none(
    job: Job, volume: Path, status: int, code: int, words: str
) -> None:
    skipped = "skip_actions: [create]" if status == 0 else ""
    job.write(f"commands: [{{before: action, when: [create], run: ['exit {status}']}}]\n{skipped}")
    blockferry("backup", volume, "--repo", job.reference).refused(code, words)
    assert job.archives == []


@pytest.mark.thorough
def test_what_goes_wrong_afterwards_does_not_hide_the_snapshot(job: Job, volume: Path) -> None:
    job.write("btrfs:\nskip_actions: [check]\ncommands: [{after: action, when: [create], run: ['exit 3']}]")
    done = blockferry("backup", volume, "--repo", job.reference, "--json")
    assert done.code == 3
    assert job.archives[0] in done.out
    assert "the snapshot is stored" in done.err


def test_a_pattern_as_wide_as_all_archives_is_refused(job: Job, volume: Path) -> None:
    job.write("keep_daily: 7\nmatch_archives: '*'")
    blockferry("backup", volume, "--repo", job.reference).refused(2, "would prune", "archive_name_format")
    blockferry("backup", volume, "--repo", job.reference, "--incremental").refused(2, "--incremental", "--no-job")
    assert job.archives == []


def test_a_file_with_databases_is_for_files(job: Job, volume: Path) -> None:
    job.write("sqlite_databases: [{name: a, path: /nowhere.db}]")
    blockferry("backup", volume, "--repo", job.reference).refused(2, "sqlite_databases", "--no-job")


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("{hostname}-*", False),
        ("host-*", False),
        ("vm-*", False),
        ("vm*", True),
        ("*", True),
        ("sh:*", True),
        ("re:.*", True),
        ("re:host-.*", False),
        ("re:(", True),
        ("*-data", False),
        ("vm?{hostname}-*", True),
        ("other+*", False),
        ("id:vm+*", True),
    ],
)
def test_which_patterns_mean_a_volumes_archives(pattern: str, meant: bool) -> None:
    assert means(pattern, "vm+{hostname}-{now:%Y}") is meant


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["prune", "--keep-daily", "7", "--glob-archives", "{hostname}-*", "/repo"],
            ["prune", "--glob-archives", "vm+{hostname}-*", "--keep-daily", "7", "/repo"],
        ),
        (
            ["prune", "--match-archives", "sh:{hostname}-*", "--repo", "/repo"],
            ["prune", "--match-archives", "sh:vm+{hostname}-*", "--repo", "/repo"],
        ),
        (
            ["prune", "--keep-last", "1", "/repo"],
            ["prune", "--glob-archives", "vm+{hostname}-*", "--keep-last", "1", "/repo"],
        ),
    ],
)
def test_pruning_is_confined_to_the_series(given: list[str], expected: list[str]) -> None:
    assert confined(given, "vm+", "{hostname}-{now:%Y-%m-%d}") == expected
