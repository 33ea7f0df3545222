"""What commands leave in the file of metrics: figures of what went well, and what failed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from blockferry.hot import daemon
from blockferry.metrics.textfile import Samples, parse
from blockferry.state import exclusive
from blockferry.volume import Volume
from cluster_hosts_support import VOLUME, sharing
from commands_support import Depot, blockferry, command, new_depot, run
from conftest import Attach
from pages_support import Page

MIB = 1 << 20


@pytest.fixture(scope="module")
def depot(tmp_path_factory: pytest.TempPathFactory) -> Depot:
    return new_depot("restic", tmp_path_factory.mktemp("depot") / "repository")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "vm.img"
    run("truncate", "-s", "32M", path)
    run("mke2fs", "-q", "-F", "-t", "ext4", path)
    return path


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that commands write."""
    directory = tmp_path / "metrics"
    directory.mkdir()
    monkeypatch.setenv("BLOCKFERRY_METRICS_DIR", str(directory))
    return directory / "blockferry.prom"


def sample(path: Path, name: str, *labels: str) -> float:
    return parse(path.read_text())[f"blockferry_{name}", labels]


def names(samples: Samples, part: str) -> set[str]:
    return {name for name, _labels in samples if part in name}


def test_a_backup_leaves_the_figures_that_it_printed(depot: Depot, image: Path, watched: Path) -> None:
    began = time.time()
    printed = depot.ferry("backup", image, "--json").json()
    about = ("vm.img", depot.reference)
    assert printed["repository"] == depot.reference
    for figure in ("volume", "used", "changed", "read", "stored"):
        assert sample(watched, f"backup_{figure}_bytes", *about) == printed[f"bytes_{figure}"]
    assert sample(watched, "backup_duration_seconds", *about) == printed["seconds"]
    assert began <= sample(watched, "backup_last_success_timestamp_seconds", *about) <= time.time()
    tiers = {tier: sample(watched, "backup_tier", *about, tier) for tier in ("changed", "used", "whole")}
    assert tiers == {"changed": 0, "used": 1, "whole": 0}
    assert sample(watched, "backup_failures_total", *about) == 0
    assert sample(watched, "backup_tracker_answered", *about) == 0


def test_a_failure_counts_and_the_last_success_stays(depot: Depot, image: Path, watched: Path) -> None:
    about = ("vm.img", depot.reference)
    depot.ferry("backup", image, "--json").json()
    success = sample(watched, "backup_last_success_timestamp_seconds", *about)
    depot.ferry("backup", image, RESTIC_PASSWORD="wrong").refused(1)
    image.rename(image.with_name("elsewhere"))
    depot.ferry("backup", image).refused(1)
    assert sample(watched, "backup_failures_total", *about) == 2
    assert sample(watched, "backup_failing", *about) == 1
    assert sample(watched, "backup_last_success_timestamp_seconds", *about) == success
    assert sample(watched, "backup_last_failure_timestamp_seconds", *about) >= success
    image.with_name("elsewhere").rename(image)
    depot.ferry("backup", image, "--json").json()
    assert sample(watched, "backup_failing", *about) == 0
    assert sample(watched, "backup_successes_total", *about) == 2


def test_other_volumes_stay_and_what_is_only_not_now_is_no_failure(depot: Depot, image: Path, watched: Path) -> None:
    watched.write_text('blockferry_backup_failures_total{volume="other",repository="borg:/srv"} 7\n')
    with exclusive(Volume.discover(image)):
        depot.ferry("backup", image).refused(75)
    assert names(parse(watched.read_text()), "failing") == set()
    depot.ferry("backup", image, "--json").json()
    assert sample(watched, "backup_failures_total", "other", "borg:/srv") == 7
    assert sample(watched, "backup_failures_total", "vm.img", depot.reference) == 0


@pytest.mark.parametrize("trouble", ["no such directory", "a directory for a file"])
def test_metrics_that_cannot_be_written_are_a_warning(depot: Depot, image: Path, watched: Path, trouble: str) -> None:
    if trouble == "no such directory":
        watched.parent.rmdir()
    else:
        watched.mkdir()
    done = depot.ferry("backup", image, "--json")
    assert done.json()["tier"] == "used"
    assert "metrics are not written" in done.err


def test_the_configuration_names_the_directory_and_groups_are_noted(
    depot: Depot, tmp_path: Path, watched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLOCKFERRY_METRICS_DIR")
    top = tmp_path / "files"
    top.mkdir()
    (top / "file").write_text("content")
    config = tmp_path / "config.yaml"
    groups = {"mail": {"volume": str(top)}, "gone": {"volume": str(tmp_path / "nowhere")}}
    config.write_text(json.dumps({"groups": groups, "metrics": str(watched.parent)}))
    printed = blockferry("--config", config, "backup", "mail", "--repo", depot.reference, "--json", env=depot.env)
    about = ("mail", depot.reference)
    assert sample(watched, "backup_changed_bytes", *about) == printed.json()["bytes_changed"]
    assert sample(watched, "backup_problem_files", *about) == 0
    assert sample(watched, "backup_tier", *about, "used") == 1
    blockferry("--config", config, "backup", "gone", "--repo", depot.reference, env=depot.env).refused(1)
    assert sample(watched, "backup_failures_total", "gone", depot.reference) == 1
    config.write_text("metrics: here")
    blockferry("--config", config, "backup", "mail", "--repo", depot.reference).refused(2, "metrics", "whole path")


def test_a_restore_is_noted(depot: Depot, image: Path, watched: Path, tmp_path: Path) -> None:
    depot.ferry("backup", image, "--json").json()
    printed = depot.ferry("restore", "latest", tmp_path / "back.img", "--json").json()
    assert sample(watched, "restore_written_bytes", "vm.img") == printed["bytes_written"]
    assert sample(watched, "restore_duration_seconds", "vm.img") == printed["seconds"]


@pytest.mark.root
def test_a_hot_restore_says_how_far_it_is_until_it_is_detached(
    depot: Depot, image: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", str(tmp_path / "run"))
    depot.ferry("backup", image, "--json").json()
    target = tmp_path / "hot.img"
    said = depot.ferry("attach", "latest", target, "--rate", "0", "--json").json()
    try:
        deadline = time.monotonic() + 20
        while not watched.exists() or not names(parse(watched.read_text()), "hot_"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert sample(watched, "hot_total_bytes", "hot.img") == said["total"]
        assert 0 <= sample(watched, "hot_hydrated_bytes", "hot.img") <= said["total"]
        assert sample(watched, "hot_complete", "hot.img") == 0
        assert sample(watched, "hot_repository_reachable", "hot.img") == 1
        assert sample(watched, "hot_unreadable_bytes", "hot.img") == 0
        assert time.time() - sample(watched, "hot_updated_timestamp_seconds", "hot.img") < daemon._TELL_EVERY + 10
    finally:
        blockferry("detach", "hot.img", "--forget", "--json").json()
    assert names(parse(watched.read_text()), "hot_") == set()
    assert sample(watched, "backup_failing", "vm.img", depot.reference) == 0


@pytest.mark.root
@pytest.mark.thorough
def test_a_backup_of_a_shared_volume_leaves_the_figures_of_its_set(
    depot: Depot, image: Path, watched: Path, tmp_path: Path, attach: Attach
) -> None:
    with sharing(1, tmp_path, attach(image), f"sqlite://{tmp_path / 'index.sqlite'}") as (host,):
        host.start()
        words = ("cluster", "backup", host.volume, "--name", VOLUME, "--json")
        printed = depot.ferry(*words, **host.env).json()
        host.stop()
        depot.ferry("cluster", "backup", host.volume, "--name", VOLUME, "--host", "away", **host.env).refused(2)
    about = (VOLUME, depot.reference)
    assert sample(watched, "cluster_hosts", *about) == 1
    assert sample(watched, "cluster_shares", *about) == printed["shares"]
    assert sample(watched, "cluster_logged_bytes", *about) == printed["bytes_logged"]
    assert sample(watched, "cluster_held_seconds", *about) == printed["seconds_held"]
    assert sample(watched, "backup_used_bytes", *about) == printed["bytes_used"]
    assert sample(watched, "backup_failures_total", *about) == 1


def test_the_commands_on_the_page_show_the_file(depot: Depot, image: Path, tmp_path: Path) -> None:
    page = Page("metrics.md")
    script, _remove = page.blocks()
    configured = page.block("yaml", below="Switch them on")
    directory = tmp_path / "metrics"
    directory.mkdir()
    places = {
        "/var/lib/prometheus/node-exporter": directory,
        "/dev/vg/home": image,
        "borg:/srv/backup/borg": depot.reference,
    }
    for example, real in places.items():
        configured, script = configured.replace(example, str(real)), script.replace(example, str(real))
    (tmp_path / "config.yaml").write_text(configured)
    where = {
        "PATH": f"{Path(command()[0]).parent}:{os.environ['PATH']}",
        "BLOCKFERRY_CONFIG": str(tmp_path / "config.yaml"),
    }
    shown = run("sh", "-euc", script, env=os.environ | depot.env | where)
    assert f'blockferry_backup_failing{{volume="vm.img",repository="{depot.reference}"}} 0\n' in shown
