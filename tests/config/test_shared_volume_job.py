"""A volume that several hosts share, backed up as a run of borgmatic."""

from __future__ import annotations

from pathlib import Path

import pytest

import cluster_load
from cluster_hosts_support import VOLUME, instant_of, sharing, writes_of
from commands_support import Depot, blockferry
from config_support import SECRET, Job
from conftest import Attach

pytestmark = pytest.mark.root


@pytest.mark.thorough
def test_it_runs_within_borgmatics_hooks_and_keeps_as_many_as_its_volume_says(
    job: Job, volume: Path, tmp_path: Path, attach: Attach
) -> None:
    device = attach(volume)
    before = volume.read_bytes()
    (tmp_path / "locks").touch()
    job.write(
        "skip_actions: [check, compact]\nkeep_secondly: 1\n"
        f"commands: [{{after: action, when: [create], run: ['echo created >> {job.file.parent}/log']}}]\n"
        f"constants: {{blockferry: {{volumes: {{{VOLUME}: {{path: {device}, keep_last: 1}}}}}}}}"
    )
    with sharing(2, tmp_path, device, f"sqlite://{tmp_path}/index.sqlite") as hosts:
        for number, host in enumerate(hosts):
            host.start()
            host.start_load(tmp_path / "locks", number + 1)
        words = ["--config", job.file, "cluster", "backup", VOLUME, "--json"]
        first, second = (blockferry(*words, env=hosts[0].env).json() for _ in range(2))
        assert all(code == 0 for host in hosts for code in host.stop_loads())
    assert job.log == ["created", "created"]
    depot = Depot("borg", job.repository, {"BORG_PASSPHRASE": SECRET})
    (kept,) = depot.ferry("snapshots", "--json").json()["snapshots"]
    assert kept["id"] == second["snapshot"] != first["snapshot"]
    assert depot.ferry("restore", kept["id"], tmp_path / "restored.img").code == 0
    found = (tmp_path / "restored.img").read_bytes()
    cluster_load.check(found, before, writes_of(hosts), instant_of(depot, kept["id"]))
