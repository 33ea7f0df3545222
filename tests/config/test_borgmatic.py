"""Repositories as borgmatic's files describe them, and what stands there of ours; a real borgmatic reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockferry.config.configuration import load_configuration
from blockferry.errors import UsageError
from blockferry.manager import plugin_manager
from commands_support import blockferry
from config_support import SECRET, Job


def test_a_passphrase_of_borgmatics_opens_the_repository_and_runs_none_of_its_commands(job: Job, volume: Path) -> None:
    job.write(f"commands: [{{before: everything, run: ['echo no >> {job.file.parent}/log']}}]\numask: 0027")
    stored = blockferry("backup", volume, "--repo", job.reference, "--no-job", "--json").json()
    assert job.log == []
    (archive,) = job.archives
    assert archive == stored["archive"]
    assert archive.startswith("vm.img+20")
    newest = max(job.repository.glob("data/*/*"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.stat().st_mode & 0o777 == 0o640
    # However it is named it is the same repository: the catalog knows what was stored.
    for reference, environment in ((job.reference, {}), (f"borg:{job.repository}", {"BORG_PASSPHRASE": SECRET})):
        (listed,) = blockferry("snapshots", "--repo", reference, "--json", env=environment).json()["snapshots"]
        assert listed["id"] == stored["snapshot"]
        assert listed["run"]["bytes_stored"] == stored["bytes_stored"]


@pytest.mark.parametrize(
    "passphrase",
    [
        pytest.param("encryption_passcommand: cat {place}/secret", marks=pytest.mark.thorough),
        'encryption_passphrase: "{{credential file {place}/secret}}"',
        "encryption_passphrase: ${{OF_THE_ENVIRONMENT}}",
        pytest.param("<<: !include {place}/common.yaml", marks=pytest.mark.thorough),
    ],
)
def test_every_way_of_borgmatic_to_a_passphrase_is_one_of_ours(
    job: Job, passphrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = job.file.parent
    (place / "secret").write_text(SECRET)
    (place / "common.yaml").write_text(f"encryption_passphrase: {SECRET}\n")
    monkeypatch.setenv("OF_THE_ENVIRONMENT", SECRET)
    job.write(passphrase=passphrase.format(place=place))
    assert blockferry("snapshots", "--repo", f"borgmatic:{job.file}", "--json").json()["snapshots"] == []


def test_volumes_and_groups_stand_below_constants(job: Job) -> None:
    (job.file.parent / "more.yaml").write_text("constants: {blockferry: {volumes: {data: {path: /dev/vg/data}}}}\n")
    job.write(
        f"<<: !include {job.file.parent}/more.yaml\n"
        "constants:\n  blockferry:\n    volumes:\n      vm: {path: /srv/vm.img, repository: restic:/srv/restic}\n"
        "    groups:\n      mail: {volume: /mnt/mail, keep_daily: 7}"
    )
    configuration = load_configuration(plugin_manager(), str(job.file))
    assert configuration.repository == f"borgmatic:{job.file}"
    assert configuration.volume("data").repository == configuration.repository
    assert configuration.volume("vm").repository == "restic:/srv/restic"
    assert configuration.group("mail").keep == {"keep_daily": 7}


@pytest.mark.parametrize(
    ("constants", "line", "words", "remedy"),
    [
        ("volumes: {\n      vm: {pat: /x}}", 8, "constants.blockferry.volumes.vm.pat: no such key", "path"),
        (
            'volumes: {vm: {path: "0012345"}}',
            7,
            "constants.blockferry.volumes.vm.path: 12345 is no plain text",
            "serial:",
        ),
        ("[a]", 6, "constants.blockferry: is no mapping", "indented"),
    ],
)
def test_a_mistake_below_constants_has_its_line(job: Job, constants: str, line: int, words: str, remedy: str) -> None:
    job.write(f"constants:\n  blockferry:\n    {constants}")
    with pytest.raises(UsageError) as caught:
        load_configuration(plugin_manager(), str(job.file))
    assert caught.value.message.startswith(f"{job.file}:{line}: {words}"), caught.value.message
    assert remedy in caught.value.remedy


def test_a_mistake_in_an_included_file_is_named_without_a_line(job: Job) -> None:
    (job.file.parent / "more.yaml").write_text("constants: {blockferry: {volums: {}}}\n")
    job.write(f"<<: !include {job.file.parent}/more.yaml")
    with pytest.raises(UsageError) as caught:
        load_configuration(plugin_manager(), str(job.file))
    assert caught.value.message == f"{job.file}: constants.blockferry.volums: no such key"


def test_what_borgmatic_refuses_is_refused_in_its_words(job: Job) -> None:
    job.write("retris: 3")
    blockferry("--config", job.file, "snapshots").refused(2, "borgmatic refuses it", "retris", "config validate")


def test_a_label_that_is_not_there_brings_the_nearest_and_several_need_one(job: Job) -> None:
    blockferry("snapshots", "--repo", f"borgmatic:{job.file}#nsa").refused(2, "label", "nas")
    text = job.file.read_text().replace("label: nas}", "label: nas}, {path: /srv/other, label: other}")
    job.file.write_text(text)
    blockferry("snapshots", "--repo", f"borgmatic:{job.file}").refused(2, "several", "nas, other")
    blockferry("snapshots", "--repo", "borgmatic:/nowhere.yaml").refused(2, "/nowhere.yaml is no file")


@pytest.mark.thorough
def test_a_wrong_passphrase_is_told_as_ever(job: Job) -> None:
    job.write(passphrase="encryption_passphrase: wrong")
    said = blockferry("snapshots", "--repo", job.reference).refused(1, "passphrase")
    assert "wrong" not in json.dumps(said.out)


@pytest.mark.thorough
def test_a_passcommand_that_fails_is_told_in_borgmatics_words(job: Job) -> None:
    job.write(passphrase="encryption_passcommand: 'false'")
    blockferry("snapshots", "--repo", job.reference).refused(1, "borgmatic ended with status 1", "repo-info")


def test_without_borgmatic_it_is_said_how_to_get_it(job: Job) -> None:
    blockferry("snapshots", "--repo", job.reference, env={"BLOCKFERRY_BORGMATIC": "/no/borgmatic"}).refused(
        1, "not installed", "borgmatic 2.1"
    )
