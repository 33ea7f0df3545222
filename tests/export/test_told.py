"""What is told of an export, to metrics and whoever looks at processes: how the job went, and none of its secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockferry.metrics.textfile import Samples, parse
from commands_support import PASSPHRASE, Done, blockferry, new_depot
from export_support import MIB, Host, job
from secrets_support import Watch, kept

pytestmark = pytest.mark.root


@pytest.fixture
def host(host: Host, volume: Path, sharing: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with a volume and a group, and metrics of them."""
    host.configure(
        f"metrics: {host.directory}\nvolumes: {{home: {{path: {volume}}}}}\n"
        f"groups: {{mail: {{volume: {sharing}, paths: [{sharing}/files]}}}}"
    )
    return host


def samples(host: Host) -> Samples:
    return parse((host.directory / "blockferry.prom").read_text())


def figure(host: Host, name: str, volume: str, *labels: str) -> float:
    return samples(host)[f"blockferry_backup_{name}", (volume, "export:", *labels)]


def test_a_job_that_read_everything_is_a_success_of_each(host: Host, tmp_path: Path) -> None:
    depot = new_depot("restic", tmp_path / "repository")
    host.ferry("export", "home", "mail", "--json").json()
    assert not (host.directory / "blockferry.prom").exists(), "nothing is known yet"
    assert job(depot, host.at, "first").code == 0
    (said,) = host.ferry("release", "--json").json()["released"]
    assert {labels for name, labels in samples(host) if name.endswith("_successes_total")} == {
        ("home", "export:"),
        ("mail", "export:"),
    }
    for each in said["volumes"]:
        assert figure(host, "read_bytes", each["name"]) == each["bytes_read"] > 40 * MIB
        assert figure(host, "tier", each["name"], "used") == 1
        assert figure(host, "duration_seconds", each["name"]) == said["seconds"] > 0
    assert figure(host, "tracker_ready", "home") == 1
    assert [labels for name, labels in samples(host) if name.endswith("_problem_files")] == [("mail", "export:")]


def test_a_job_that_failed_or_could_not_begin_is_a_failure(host: Host, volume: Path) -> None:
    host.ferry("export", "home", "--json").json()
    host.ferry("release", "home", "--failed", "--json").json()
    assert figure(host, "failing", "home") == figure(host, "failures_total", "home") == 1
    host.ferry("export", "home", "--json").json()
    host.kill()
    assert host.ferry("release", "home").code == 1
    assert figure(host, "failures_total", "home") == 2
    volume.rename(volume.with_name("elsewhere"))
    host.ferry("export", "home").refused(1)
    volume.with_name("elsewhere").rename(volume)
    assert figure(host, "failures_total", "home") == 3
    host.ferry("export", "home", "--json").json()
    host.ferry("release", "home", "--json").json()
    assert (figure(host, "failing", "home"), figure(host, "successes_total", "home")) == (0, 1)


def test_the_secrets_of_the_job_go_nowhere(host: Host, tmp_path: Path) -> None:
    depot = new_depot("restic", tmp_path / "repository")
    said: list[Done] = []
    with Watch(PASSPHRASE) as watch:
        said.append(blockferry("-vv", "export", "home", "mail", env=host.env | depot.env))
        assert job(depot, host.at, "first").code == 0
        said.append(blockferry("-vv", "--log-json", "release", env=host.env | depot.env))
    assert [each.code for each in said] == [0, 0], said
    assert watch.seen == set()
    what_stays = [line for line in watch.environments if "blockferry.export" in line or "qemu" in line]
    assert what_stays == []
    assert any("restic" in line for line in watch.environments), "else nothing was looked at"
    assert not any(PASSPHRASE in each.out + each.err for each in said)
    runtime = Path(os.environ["BLOCKFERRY_RUNTIME_DIR"])
    assert list(kept(PASSPHRASE, host.directory, runtime)) == []
