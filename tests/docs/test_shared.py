"""The pages about shared volumes: their Redis, their files and their session, by two hosts that are one machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster_dask_support import COUNT
from cluster_support import PROGRAMS, make_authority, make_certificate
from commands_support import new_depot, run
from conftest import Attach
from pages_support import Block, blocks_of, with_places
from udev_support import wait_for

GENERATOR = "/usr/lib/systemd/system-generators/systemd-fstab-generator"
AS_HOST = ["unshare", "--uts", "sh", "-ec", 'hostname "$0"; exec "$@"']


def shown(page: str, beginning: str) -> list[Block]:
    """Return the blocks that are shown and begin so."""
    return [each for each in blocks_of(page) if each.language == "text" and each.text.startswith(beginning)]


def text_shown(page: str, beginning: str) -> str:
    (found,) = shown(page, beginning)
    return found.text


def settings(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())


@pytest.fixture
def index(host: Path) -> Iterator[dict[str, str]]:
    """What the guard's file says, of a server that is set up as the page on the index says."""
    if not PROGRAMS:
        pytest.skip("needs redis-server: run scripts/bootstrap --test")
    make_authority(host, "ca")
    for name in ("server", "client"):
        make_certificate(host, name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    certificates = {"server-cert": "server", "server-key": "server-key", "ca-cert": "ca"}
    places: dict[str, object] = {f"/etc/redis/{name}.pem": host / f"{own}.pem" for name, own in certificates.items()}
    places |= {"tls-port 6380": f"bind 127.0.0.1\ntls-port {port}", "PASSWORD": "geheim"}
    (host / "redis.conf").write_text(with_places(text_shown("shared-index.md", "maxmemory"), places))
    (host / "index-password").write_text("geheim")
    own = f"ca={host}/ca.pem&cert={host}/client.pem&key={host}/client-key.pem"
    places = {
        "/dev/mapper": str(host / "mapper"),
        "10.0.0.5:6380/0": f"localhost:{port}/0?{own}",
        "/etc/blockferry": str(host),
    }
    with subprocess.Popen([PROGRAMS[0], str(host / "redis.conf")], stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(lambda: server.poll() is not None or is_listened_to(int(port)), "the server to listen")
            yield settings(with_places(text_shown("shared-volumes.md", "VOLUME="), places))
        finally:
            server.terminate()


def is_listened_to(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Hosts that are one machine, each with a name, a state and sockets of its own."""

    home: Path
    environment: dict[str, str]
    places: dict[str, object]

    def command(self, name: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
        """Return what runs a command of the page on a host, with real places, and in which environment."""
        own = {"BLOCKFERRY_STATE_DIR": str(self.home / name), "BLOCKFERRY_RUNTIME_DIR": str(self.home / f"{name}-run")}
        line = shlex.join(words)
        named = {example: real for example, real in self.places.items() if example in line}
        return [*AS_HOST, name, *shlex.split(with_places(line, named))], os.environ | self.environment | own

    def on(self, name: str, words: list[str]) -> str:
        command, environment = self.command(name, ["blockferry", *words])
        return run(*command, env=environment)

    @contextlib.contextmanager
    def running(self, name: str, words: list[str]) -> Iterator[None]:
        command, environment = self.command(name, words)
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                yield
            finally:
                process.terminate()


@pytest.mark.root
@pytest.mark.parametrize("engine", ["", pytest.param("dask", marks=pytest.mark.thorough)])
def test_two_hosts_back_up_what_they_share(
    host: Path, files: Path, index: dict[str, str], attach: Attach, engine: str
) -> None:
    """The one mounts it, for there is no filesystem here that both could mount."""
    depot = new_depot("restic", host / "repository")
    run("truncate", "-s", "48M", host / "shared.img")
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", files, host / "shared.img")
    volume = Path(index.pop("VOLUME"))
    volume.parent.mkdir()
    volume.symlink_to(attach(host / "shared.img"))
    hosts = Hosts(host, index | depot.env, {"/dev/mapper/lun0": volume, "restic:sftp:nas:/volumes": depot.reference})
    session, with_dask = shown("shared-volumes.md", "host a")
    start_on_a, back_up, start_on_b = session.command_lines()
    try:
        hosts.on("a", start_on_a)
        hosts.on("b", start_on_b)
        assert "# mount /run/blockferry/guard/lun0.disk /srv" in session.text
        run("mount", host / "a-run" / "guard" / "lun0.disk", host / "mnt")
        (host / "mnt" / "more").write_text("more")
        said = copied_by_dask(hosts, with_dask) if engine else hosts.on("a", back_up)
        assert "2 hosts" in said
    finally:
        subprocess.run(["umount", str(host / "mnt")], check=False)
        for name in ("a", "b"):
            hosts.on(name, ["guard", "stop", "lun0", "--force"])
    depot.ferry("restore", "latest", host / "back.img")
    assert "more" in run("debugfs", "-R", "ls", host / "back.img")


def copied_by_dask(hosts: Hosts, session: Block) -> str:
    """Back up as the page says for copies by every host; return what was said."""
    (scheduler,) = [line.removeprefix("# ") for line in session.lines() if line.startswith("# dask scheduler")]
    worker_on_a, back_up, worker_on_b = session.command_lines()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hosts.places["10.0.0.4:8786"] = f"127.0.0.1:{port}"
    hosts.places["--host 10.0.0.4"] = f"--host 127.0.0.1 --port {port} --no-dashboard"
    with contextlib.ExitStack() as running:
        running.enter_context(hosts.running("a", scheduler.split()))
        wait_for(lambda: is_listened_to(port), "the scheduler")
        for name, words in (("a", worker_on_a), ("b", worker_on_b)):
            running.enter_context(hosts.running(name, ["blockferry", *words]))
        count = [sys.executable, "-c", COUNT, f"tcp://127.0.0.1:{port}"]
        wait_for(lambda: run(*count) == "2\n", "the workers")
        return hosts.on("a", back_up)


def test_the_guards_disk_is_mounted_after_the_guard(tmp_path: Path) -> None:
    if not shutil.which(GENERATOR):
        pytest.skip("systemd is not installed: apt install systemd")
    (tmp_path / "fstab").write_text(text_shown("shared-volumes.md", "/run/blockferry/guard"))
    units = [tmp_path / name for name in ("normal", "early", "late")]
    for each in units:
        each.mkdir()
    run(GENERATOR, *units, env={"SYSTEMD_FSTAB": str(tmp_path / "fstab")})
    unit = (units[0] / "srv.mount").read_text()
    assert "\nRequires=o2cb.service\n" in unit
    (after,) = [line for line in unit.splitlines() if line.startswith("After=") and "blockferry" in line]
    assert "blockferry-guard@lun0.service" in after
    assert "\nWhat=/run/blockferry/guard/lun0.disk\n" in unit
    assert "\nType=ocfs2\n" in unit
