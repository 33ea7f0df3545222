"""The file of metrics: what an independent reader makes of it, and that it remembers what it holds."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blockferry.errors import NotNowError
from blockferry.manager import plugin_manager, without_credentials
from blockferry.metrics import textfile
from blockferry.metrics.families import FAMILIES
from blockferry.metrics.textfile import Samples, changing, key, parse, render
from pages_support import ROOT, Page, run_shell

PAGE = Page("metrics.md")
NAMES = ["home", 'with "quotes"', "back\\slash\\n", "two\nlines", "a{b}=,c ", "ü", os.fsdecode(b"\xff\xfe"), ""]


def every_kind_of_sample() -> Samples:
    samples = Samples()
    for number, family in enumerate(FAMILIES.values()):
        for name in NAMES:
            samples[key(family.name, (name, *family.labels[1:]))] = number + 0.25
    return samples


def test_what_is_written_is_read_back_as_it_was() -> None:
    samples = every_kind_of_sample()
    assert parse(render(samples)) == samples


def test_an_independent_parser_reads_the_same() -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus-client")
    samples = every_kind_of_sample()
    read = list(parser.text_string_to_metric_families(render(samples)))
    found = {
        (sample.name, tuple(sample.labels[label] for label in FAMILIES[sample.name].labels)): sample.value
        for family in read
        for sample in family.samples
    }
    assert found == samples
    said = {family.name: (family.type, family.documentation) for family in read}
    assert said == {family.name.removesuffix("_total"): (family.type, family.help) for family in FAMILIES.values()}


def test_promtool_has_nothing_to_say_against_the_names() -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed: apt install prometheus")
    text = render(every_kind_of_sample())
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_lines_of_others_and_damaged_ones_are_dropped() -> None:
    good = 'blockferry_backup_failing{volume="a",repository="b"} 1'
    bad = [
        'other_metric{volume="a",repository="b"} 1',
        'blockferry_backup_failing{volume="a"} 1',
        'blockferry_backup_failing{volume="a",repository="b} 1',
        'blockferry_backup_failing{volume="c",repository="b"} many',
        'blockferry_backup_failing{volume="d",repository="b"} NaN',
        "blockferry_backup_failing",
        "\x00\xff",
    ]
    assert parse("\n".join([*bad, good, *bad])) == {("blockferry_backup_failing", ("a", "b")): 1}


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from blockferry.metrics.textfile import changing, key\n"
        "for number in range(20):\n"
        "    with changing(Path(sys.argv[1])) as samples:\n"
        "        samples[key('blockferry_backup_failing', (sys.argv[2], str(number)))] = number\n"
        "        counter = key('blockferry_backup_failures_total', ('all', 'r'))\n"
        "        samples[counter] = samples.get(counter, 0) + 1\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path, str(each)]) for each in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    samples = parse((tmp_path / "blockferry.prom").read_text())
    assert samples.pop(key("blockferry_backup_failures_total", ("all", "r"))) == 80
    assert len(samples) == 80
    assert sorted(path.name for path in tmp_path.iterdir()) == [".blockferry.prom.lock", "blockferry.prom"]


def test_everybody_may_read_the_file_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with changing(tmp_path):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "blockferry.prom").stat().st_mode & 0o7777 == 0o644


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with changing(tmp_path) as samples:
        samples[key("blockferry_backup_failing", ("a", "b"))] = 1
    before = (tmp_path / "blockferry.prom").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), changing(tmp_path) as samples:
        samples.clear()
    assert (tmp_path / "blockferry.prom").read_bytes() == before


@pytest.mark.parametrize("name", ["blockferry.prom", ".blockferry.prom.new", ".blockferry.prom.lock"])
def test_a_link_that_somebody_put_there_is_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / name).symlink_to(victim)
    with contextlib.suppress(OSError), changing(tmp_path) as samples:
        samples[key("blockferry_backup_failing", ("a", "b"))] = 1
    assert victim.read_text() == "mine"


def test_a_lock_that_is_kept_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "_PATIENCE", 0.1)
    with changing(tmp_path), pytest.raises(NotNowError, match="locked"), changing(tmp_path):
        pass


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("borg:/srv/user@host:x", "borg:/srv/user@host:x"),
        ("borg:ssh://backup@nas:22/./vms", "borg:ssh://nas:22/./vms"),
        ("borg:backup@nas:vms", "borg:nas:vms"),
        ("restic:sftp:backup@nas:/srv/vms@home", "restic:sftp:nas:/srv/vms@home"),
        ("restic:rest:https://me:secret@nas:8000/a", "restic:rest:https://nas:8000/a"),
        ("restic:rest:https://me:se@cret@nas/a", "restic:rest:https://nas/a"),
        ("restic:rest:https://me:se/cr@et@nas/a", "restic:rest:https://nas/a"),
        ("restic:rest:https://nas:8000/a@b", "restic:rest:https://nas:8000/a@b"),
        ("restic:s3:https://s3.example.org/bucket", "restic:s3:https://s3.example.org/bucket"),
        ("borg:", "borg:"),
    ],
)
def test_user_names_and_passwords_are_not_in_labels(reference: str, shown: str) -> None:
    assert without_credentials(reference) == shown


def test_the_page_lists_the_metrics_with_their_labels_and_meaning() -> None:
    rows = re.findall(r"^\| `(blockferry_\w+)` \| (.*?) \| (.*) \|$", PAGE.text, re.MULTILINE)
    listed = {name: (tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, labels, meaning in rows}
    assert listed == {family.name: (family.labels, family.help) for family in FAMILIES.values()}
    assert [name for name, _labels, _meaning in rows] == list(FAMILIES)


def test_nothing_is_said_where_no_directory_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        hook = plugin_manager().hook.blockferry_backup_failed
        hook(volume="a", repository="borg:/srv", error=RuntimeError())
    assert caplog.records == []


def test_the_dashboard_and_the_alerts_use_metrics_that_there_are_with_their_labels() -> None:
    dashboard = (ROOT / "docs" / "grafana" / "blockferry.json").read_text()
    shown = [
        target["expr"] for panel in json.loads(dashboard)["panels"] for target in panel.get("targets", [])
    ] + re.findall(r"label_values\((.*?)\)", dashboard)
    alerts = re.findall(r"expr: (.*)", PAGE.text)
    assert len(alerts) == 4
    for expression in shown + alerts:
        used = re.findall(r"(blockferry_\w+)(?:\{(.*?)\})?", expression)
        assert used, expression
        for name, labels in used:
            assert set(re.findall(r"(\w+)=~", labels)) <= {*FAMILIES[name].labels, "instance"}, expression
    used_somewhere = set(re.findall(r"blockferry_\w+", "\n".join(shown)))
    left_out = {"blockferry_backup_last_failure_timestamp_seconds", "blockferry_backup_successes_total"}
    assert FAMILIES.keys() - used_somewhere == left_out | {
        "blockferry_hot_complete",
        "blockferry_restore_written_bytes",
    }


def test_promtool_understands_the_expressions(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed: apt install prometheus")
    alerts = PAGE.block("yaml", below="What to be woken for")
    dashboard = json.loads((ROOT / "docs" / "grafana" / "blockferry.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    rules = [{"record": f"shown:{number}", "expr": each} for number, each in enumerate(shown)]
    (tmp_path / "alerts.yaml").write_text(alerts)
    (tmp_path / "shown.yaml").write_text(json.dumps({"groups": [{"name": "shown", "rules": rules}]}))
    subprocess.run([promtool, "check", "rules", *tmp_path.glob("*.yaml")], check=True, capture_output=True)


def test_a_volume_is_taken_out_as_the_page_says(tmp_path: Path) -> None:
    _look, command = PAGE.blocks()
    with changing(tmp_path) as samples:
        for volume in ("old", "older", "new"):
            samples[key("blockferry_backup_failing", (volume, "r"))] = 1
    run_shell(command, {"/var/lib/prometheus/node-exporter": tmp_path})
    left = parse((tmp_path / "blockferry.prom").read_text())
    assert [labels[0] for _name, labels in left] == ["new", "older"]
