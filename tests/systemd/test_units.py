"""The units: systemd understands them, they are as safe as the page says, and what they allow is enough."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from blockferry import systemd
from blockferry.systemd import units
from commands_support import Depot, blockferry, command, new_depot, run
from conftest import Mount
from pages_support import Page, run_shell

PAGE = Page("systemd.md")
SYSTEM = Path("etc/systemd/system")
DROP_IN = SYSTEM / "borgmatic.service.d" / "blockferry.conf"
BORGMATIC = """\
[Service]
Type=oneshot
ExecStart=/bin/true
PrivateDevices=yes
ProtectClock=yes
ProtectSystem=full
SystemCallFilter=@system-service
CapabilityBoundingSet=CAP_DAC_READ_SEARCH CAP_NET_RAW
"""
"""What hides volumes in borgmatic's sample unit."""

needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze reads units: install systemd"
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine's root, on which all is installed."""
    monkeypatch.delenv("BLOCKFERRY_STATE_DIR")
    blockferry("systemd", "install", "--root", tmp_path / "root", "--borgmatic", "--json").json()
    return tmp_path / "root"


def instance(root: Path, template: str) -> Path:
    """Return a unit made of a template, whose command is there."""
    content = (root / SYSTEM / template).read_text()
    unit = root / SYSTEM / template.replace("@", "@dev-loop0")
    unit.write_text(content.replace("=blockferry ", f"={command()[0]} "))
    return unit


def exposure(unit: Path) -> float:
    said = run("systemd-analyze", "security", "--offline=true", "--threshold=100", unit)
    (figure,) = re.findall(r"Overall exposure level for .*: (\d+\.\d)", said)
    return float(figure)


@needs_systemd
@pytest.mark.parametrize("template", units.TEMPLATES)
def test_systemd_understands_each_unit(root: Path, template: str) -> None:
    verify = ["systemd-analyze", "verify", "--man=no", instance(root, template)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "blockferry" in line] == []
    assert done.returncode == 0, done.stderr


@needs_systemd
def test_the_units_are_as_safe_as_the_page_says(root: Path) -> None:
    said = dict(re.findall(r"^\| `(blockferry-\w+@\.service)` \|.*\| (\d+\.\d) \|$", PAGE.text, re.MULTILINE))
    assert said.keys() == set(units.TEMPLATES)
    for template, figure in said.items():
        # systemd 257 has weights of its own, and finds all of them a little safer than 252 does.
        assert float(figure) - 0.31 < exposure(instance(root, template)) < float(figure) + 0.11, template


@needs_systemd
def test_borgmatics_unit_has_devices_and_what_it_takes_to_mount(root: Path) -> None:
    alone, dropped_in = root / "borgmatic.service", root / SYSTEM / "borgmatic.service"
    said = []
    for unit in (alone, dropped_in):
        unit.write_text(BORGMATIC)
        verify = ["systemd-analyze", "verify", "--man=no", unit]
        done = subprocess.run(verify, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        said.append(run("systemd-analyze", "security", "--offline=true", "--threshold=100", "--no-pager", unit))
    before, after = said
    for name in ("PrivateDevices=", "SystemCallFilter=~@mount", "CapabilityBoundingSet=~CAP_SYS_ADMIN"):
        assert re.search(rf"^✓ {name}", before, re.MULTILINE), name
        assert re.search(rf"^✗ {name}", after, re.MULTILINE), name


def test_each_line_of_the_drop_in_is_explained_in_it_and_the_page_shows_it(root: Path) -> None:
    shown = (root / DROP_IN).read_text()
    lines = shown.partition("[Service]\n")[2].splitlines()
    assert lines[0].startswith("#")
    assert [line for line in lines if not re.match(r"# |[A-Z]\w+=", line)] == []
    directives = [before + line for before, line in itertools.pairwise(lines) if not line.startswith("#")]
    assert [each for each in directives if not each.startswith("#")] == [
        "CapabilityBoundingSet=CAP_SYS_ADMINSystemCallFilter=@mount"
    ]
    assert shown.partition("\n")[2] in PAGE.text


def test_what_is_made_at_boot_is_as_we_make_it(root: Path) -> None:
    tool = shutil.which("systemd-tmpfiles")
    if not tool:
        pytest.skip("systemd-tmpfiles is not installed: apt install systemd")
    done = subprocess.run([tool, f"--root={root}", "--create", "blockferry.conf"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (root / "run/blockferry").stat().st_mode & 0o777 == 0o755
    assert (root / "var/lib/blockferry").stat().st_mode & 0o777 == 0o700


@pytest.mark.root
def test_the_commands_on_the_page_install_the_units(tmp_path: Path) -> None:
    """On this machine, but for a while, and seen by nobody else. Queries of the journal are run in test_journal.py."""
    blocks = PAGE.blocks()
    installs = [block for block in blocks if block.startswith("blockferry ")]
    looks = [line for block in blocks if block not in installs for line in block.splitlines()]
    assert [line for line in looks if not line.startswith("journalctl ")] == ["systemctl status 'blockferry-*'"]
    if systemd.runs():
        pytest.skip("systemd runs here, and would be told to read what it cannot see")
    places = ["/etc/systemd/system", "/etc/tmpfiles.d"]
    script = "".join(f"mount -t tmpfs tmpfs {each};" for each in places)
    script += f"{''.join(installs)}find {places[0]} {places[1]} -type f"
    found = run_shell(script, {}, prefix=["unshare", "--mount", "--propagation=private"]).splitlines()
    files = [path for path in found if path.startswith("/etc/")]
    assert {Path(path).name for path in files} == {*units.TEMPLATES, "blockferry.conf"}
    assert f"/{DROP_IN}" in files


def test_what_was_installed_is_removed_and_nothing_of_others(root: Path) -> None:
    mine = root / SYSTEM / units.GUARD
    mine.write_text(mine.read_text().replace("Written by `blockferry systemd install`.", "Changed by me."))
    said = blockferry("systemd", "remove", "--root", root, "--json").json()
    assert len(said["removed"]) == 5
    assert [path for path in root.rglob("*") if path.is_file()] == [mine]
    assert blockferry("systemd", "remove", "--root", root).out == "there was nothing to remove\n"


def test_the_command_and_the_places_of_this_machine_are_in_its_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", "/srv/100% state")
    monkeypatch.setenv("BLOCKFERRY_METRICS_DIR", "/srv/metrics")
    monkeypatch.setattr(systemd, "own_command", lambda: "/opt/blockferry/bin/blockferry")
    monkeypatch.setattr(systemd, "runs", lambda: False)
    monkeypatch.setattr(units, "Path", lambda *parts: tmp_path if parts == ("/",) else Path(*parts))
    written = units.install(None, "/srv/config.yaml", borgmatic=False)
    assert tmp_path / DROP_IN not in written
    for template in units.TEMPLATES:
        content = (tmp_path / SYSTEM / template).read_text()
        assert 'ExecStart="/opt/blockferry/bin/blockferry" ' in content
        assert 'Environment="BLOCKFERRY_CONFIG=/srv/config.yaml"\n' in content
        assert 'Environment="BLOCKFERRY_STATE_DIR=/srv/100%% state"\n' in content
        assert 'Environment="BLOCKFERRY_METRICS_DIR=/srv/metrics"\n' in content
    assert 'd "/srv/100%% state" 0700 root root -' in (tmp_path / "etc/tmpfiles.d/blockferry.conf").read_text()


def allowed(unit: str) -> list[str]:
    """Return the words that run a command with no more capabilities and mounts than a unit leaves to it."""
    content = (Path(units.__file__).parent / "files" / unit).read_text()
    names = re.findall(r"CAP_(\w+)", " ".join(re.findall(r"^CapabilityBoundingSet=(.*)", content, re.MULTILINE)))
    bounding = "--bounding-set=-all," + ",".join(f"+{name.lower()}" for name in names)
    read_only = ["/etc", "/usr"] * ("ProtectSystem=full" in content)
    read_only += ["/sys", "/proc/sys"] * ("ProtectKernelTunables=yes" in content)
    mounts = "".join(f"mount --bind {each} {each}; mount -o remount,bind,ro {each}; " for each in read_only)
    apart = ["unshare", "--mount", "--propagation=slave"] if read_only else []
    return [*apart, "sh", "-ec", f'{mounts}exec setpriv {bounding} --no-new-privs "$@"', "sh"]


@pytest.mark.root
@pytest.mark.parametrize("tool", ["restic", pytest.param("borg", marks=pytest.mark.thorough)])
def test_what_the_unit_allows_is_enough_to_freeze_and_back_up_a_mounted_volume(
    tool: str, tmp_path: Path, mount: Mount
) -> None:
    depot: Depot = new_depot(tool, tmp_path / "repository")
    image = tmp_path / "vm.img"
    run("truncate", "-s", "32M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    place = mount(image, "loop")
    device = run("findmnt", "-no", "SOURCE", place).strip()
    words = ("backup", device, "--fsfreeze", "60", "--repo", depot.reference, "--json")
    done = blockferry(*words, env=depot.env, prefix=allowed(units.BACKUP)).json()
    assert (done["stability"], done["tier"]) == ("frozen", "used")


@pytest.mark.root
def test_what_the_unit_allows_is_enough_for_a_hot_restore_that_tells_how_far_it_is(
    tmp_path: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", str(tmp_path / "run"))
    depot = new_depot("restic", tmp_path / "repository")
    image, target = tmp_path / "vm.img", tmp_path / "target.img"
    run("truncate", "-s", "32M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    depot.ferry("backup", image, "--json").json()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(60)
        words = command("attach", "latest", target, "--name", "unit", "--repo", depot.reference, "--foreground")
        environment = os.environ | depot.env | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        unit = subprocess.Popen([*allowed(units.RESTORE), *words], env=environment)
        try:
            assert told.recv(100) == b"READY=1"
            assert b" % there" in told.recv(100)
            place = mount(blockferry("status", "unit", "--json").json()["device"])
            (place / "file").write_text("content")
            run("umount", place)
        finally:
            unit.terminate()
        assert unit.wait(60) == 0
        assert told.recv(100) == b"STOPPING=1"
