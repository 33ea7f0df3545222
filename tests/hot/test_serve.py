"""`blockferry serve`: other hosts read a restore while it runs; who may, who may not, and what it costs."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockferry.errors import UsageError
from blockferry.hot.export import Wish, checked
from commands_support import Depot, blockferry, new_depot, run
from hot_hosts_support import Host, hosts

pytestmark = pytest.mark.root
MIB = 1 << 20
PORT = 10809
NAME = f"served-{os.getpid()}"  # device-mapper and the mounts know it, too
SECONDS = float(os.environ.get("BLOCKFERRY_TEST_SECONDS", "2"))


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKFERRY_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 96 MiB: data, a hole, data; the hole begins and ends within a unit."""
    path = tmp_path_factory.mktemp("volume") / "volume.img"
    chance = random.Random(11)
    with path.open("wb") as file:
        file.write(chance.randbytes(40 * MIB + 65536))
        file.seek(55 * MIB - 65536)
        file.write(chance.randbytes(41 * MIB + 65536))
    return path


@pytest.fixture(scope="module")
def depots(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Depot]:
    """A repository of each tool that has the volume."""
    made = {tool: new_depot(tool, tmp_path_factory.mktemp(tool) / "repository") for tool in ("borg", "restic")}
    for depot in made.values():
        assert depot.ferry("backup", volume).code == 0
    return made


class Restore:
    """A hot restore that is attached."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.name = said["name"]
        self.device = said["device"]
        self.process = said["process"]

    def status(self) -> dict[str, Any]:
        return blockferry("status", self.name, "--json").json()

    def serve(self, *words: object) -> str:
        """Return the URI."""
        said = blockferry("serve", self.name, *words, "--json").json()
        assert said.keys() == {"version", "name", "uri", "writable"}
        return said["uri"]


@contextlib.contextmanager
def attached(depot: Depot, *words: object, server: Host | None = None) -> Iterator[Restore]:
    words = ("attach", "latest", *words, "--name", NAME, "--repo", depot.reference, "--json")
    if server:
        said = json.loads(run(*server.ferry(*words), env=os.environ | depot.env))
    else:
        said = blockferry(*words, env=depot.env).json()
    try:
        yield Restore(said)
    finally:
        blockferry("detach", NAME, "--force")


@pytest.fixture
def restore(depots: dict[str, Depot], tmp_path: Path) -> Iterator[Restore]:
    """A restore onto a file, from borg: it opens its repository sooner."""
    with attached(depots["borg"], tmp_path / "target.img") as it:
        yield it


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def servers() -> list[str]:
    """Return the nbdkit processes that serve this test's disk."""
    done = subprocess.run(["pgrep", "-a", "nbdkit"], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if f"{os.environ['BLOCKFERRY_RUNTIME_DIR']}/" in line]


def bytes_of_used_units(unit: int) -> int:
    """Return how much of `volume` lies in units that have any data."""
    first, second = (0, 40 * MIB + 65536), (55 * MIB - 65536, 96 * MIB)
    numbers = {number for start, end in (first, second) for number in range(start // unit, -(-end // unit))}
    return len(numbers) * unit


# -- several hosts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tool", "onto"), [("borg", "target"), ("restic", "target"), ("restic", "buffer")])
def test_two_hosts_read_a_volume_at_once_and_every_unit_is_fetched_once(
    depots: dict[str, Depot], volume: Path, tmp_path: Path, tool: str, onto: str
) -> None:
    depot = depots[tool]
    kept = tmp_path / "kept"
    kept.mkdir()
    place = [kept / "target.img"] if onto == "target" else ["--buffer", kept, "--size", "128M"]
    with (
        hosts(2, hidden=(depot.path, kept)) as (server, one, other),
        attached(depot, *place, server=server) as restore,
    ):
        uri = restore.serve("--listen", f"{server.address}:{PORT}", "--insecure")
        assert uri == f"nbd://{server.address}:{PORT}"
        assert not one.run("ls", "-A", depot.path, kept).replace(f"{depot.path}:", "").replace(f"{kept}:", "").split()
        assert f"export-size: {96 * MIB} " in one.run("nbdinfo", uri)
        copying = one.start("nbdcopy", uri, tmp_path / "copy.img")
        comparing = other.start("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, volume)
        assert "identical" in comparing.communicate()[0]
        assert not copying.communicate()[1]
        run("cmp", tmp_path / "copy.img", volume)
        wait_for(lambda: restore.status()["hydrated"] == restore.status()["total"])
        after = restore.status()
        assert after["fetched"] == bytes_of_used_units(after["unit"]) >= after["total"]
        assert after["exports"] == [{"uri": uri, "writable": False, "clients": 0}]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates as docs/hot-restore-hosts.md makes them: `server` and `client` of one CA, `stranger` of another."""
    top = tmp_path_factory.mktemp("tls")
    for authority, names in (("ours", ("server", "client")), ("theirs", ("stranger",))):
        make_authority(top / authority)
        for name in names:
            make_certificate(top / authority, top / name, name)
    (top / "stranger" / "ca-cert.pem").write_bytes((top / "ours" / "ca-cert.pem").read_bytes())
    return top


def make_authority(place: Path) -> None:
    place.mkdir()
    (place / "ca.info").write_text("cn = blockferry\nca\ncert_signing_key\nexpiration_days = 3650\n")
    run("certtool", "--generate-privkey", "--outfile", place / "ca-key.pem")
    run(
        *("certtool", "--generate-self-signed", "--load-privkey", place / "ca-key.pem"),
        *("--template", place / "ca.info", "--outfile", place / "ca-cert.pem"),
    )


def make_certificate(authority: Path, place: Path, name: str) -> None:
    kind = "server" if name == "server" else "client"
    place.mkdir()
    usage = "dns_name = server\nip_address = 10.99.255.1\ntls_www_server" if kind == "server" else "tls_www_client"
    info = place / f"{kind}.info"
    info.write_text(f"cn = {name}\n{usage}\nencryption_key\nsigning_key\nexpiration_days = 1825\n")
    key, certificate = place / f"{kind}-key.pem", place / f"{kind}-cert.pem"
    run("certtool", "--generate-privkey", "--outfile", key)
    run(
        *("certtool", "--generate-certificate", "--load-privkey", key, "--template", info, "--outfile", certificate),
        *("--load-ca-certificate", authority / "ca-cert.pem", "--load-ca-privkey", authority / "ca-key.pem"),
    )
    (place / "ca-cert.pem").write_bytes((authority / "ca-cert.pem").read_bytes())
    key.chmod(0o600)


def test_only_who_has_a_certificate_is_served(
    depots: dict[str, Depot], volume: Path, tmp_path: Path, certificates: Path
) -> None:
    depot = depots["borg"]
    listen = ("--listen", f"10.99.255.1:{PORT}")
    with (
        hosts(1, hidden=(depot.path,)) as (server, other),
        attached(depot, "--buffer", tmp_path, "--size", "64M", server=server) as restore,
    ):
        uri = restore.serve(*listen, "--tls", certificates / "server")
        assert uri == f"nbds://{server.address}:{PORT}"
        ours, theirs = (
            f"{uri}/?tls-certificates={certificates}/client",
            f"{uri}/?tls-certificates={certificates}/stranger",
        )
        other.run("nbdcopy", ours, tmp_path / "copy.img")
        run("cmp", tmp_path / "copy.img", volume)
        before = restore.status()["fetched"]
        other.fails("nbdinfo", theirs)
        other.fails("nbdinfo", uri)  # TLS without a certificate
        other.fails("nbdinfo", uri.replace("nbds:", "nbd:"))
        assert restore.status()["fetched"] == before

        keys = tmp_path / "keys.psk"
        run("psktool", "--username=other", f"--pskfile={keys}")
        blockferry("serve", NAME, *listen, "--tls", keys)
        other.run("nbdinfo", f"nbds://other@{server.address}:{PORT}/?tls-psk-file={keys}")
        (tmp_path / "wrong.psk").write_text("other:" + "00" * 32 + "\n")
        other.fails("nbdinfo", f"nbds://other@{server.address}:{PORT}/?tls-psk-file={tmp_path}/wrong.psk")
        other.fails("nbdinfo", ours)


# -- one host ----------------------------------------------------------------------------------------------------------


def test_the_socket_is_its_owners_alone(restore: Restore, tmp_path: Path) -> None:
    inside = restore.serve()
    assert inside == f"nbd+unix:///?socket={tmp_path}/run/hot/{NAME}.nbd"
    assert stat.S_IMODE((tmp_path / "run" / "hot").stat().st_mode) == 0o700
    outside = Path("/tmp") / f"ferry-{os.getpid()}.nbd"
    uri = restore.serve("--socket", outside)
    try:
        assert stat.S_IMODE(outside.stat().st_mode) == 0o600
        run("nbdinfo", uri)
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "nbdinfo"]
        for each in (inside, uri):
            done = subprocess.run([*nobody, each], capture_output=True, text=True, check=False)
            assert done.returncode
            assert "Permission denied" in done.stderr
        assert len(servers()) == 2
        assert set(blockferry("serve", NAME, "--stop", "--json").json()["stopped"]) == {inside, uri}
        assert not servers()
        assert not outside.exists()
        assert restore.status()["exports"] == []
    finally:
        outside.unlink(missing_ok=True)


def test_nobody_writes_unless_that_is_asked_for(restore: Restore, volume: Path, tmp_path: Path) -> None:
    uri = restore.serve()
    assert "is_read_only: true" in run("nbdinfo", uri)
    refused = qemu_io("-r", uri, "write -P 7 0 64k")
    assert "Operation not permitted" in refused or "read-only" in refused
    run("cmp", restore.device, volume)
    assert restore.status()["dirty"] == 0
    assert restore.serve("--write") == uri, "the same place: served anew"
    assert "is_read_only: false" in run("nbdinfo", uri)
    assert len(servers()) == 1


def qemu_io(*words: str) -> str:
    *options, uri, work = words
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *options, uri, "-c", work], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_what_a_client_wrote_and_flushed_is_durable_and_the_disk_shows_it(
    restore: Restore, depots: dict[str, Depot], tmp_path: Path
) -> None:
    uri = restore.serve("--write")
    # Within units that were not used, are fetched, and end the volume; the last by FUA instead of a flush.
    written = [(50 * MIB, 65536, 0x41), (3 * MIB + 512, 4096, 0x42), (96 * MIB - 4096, 4096, 0x43)]
    for offset, length, pattern in written[:2]:
        assert "wrote" in qemu_io("-t", "writeback", uri, f"write -P {pattern:#x} {offset} {length}")
    offset, length, pattern = written[2]
    assert "wrote" in qemu_io("-t", "writeback", uri, f"write -f -P {pattern:#x} {offset} {length}")
    assert "wrote" in qemu_io(uri, f"write -z -u {41 * MIB} {MIB}")
    with open(restore.device, "rb") as disk:
        for offset, length, pattern in [*written, (41 * MIB, MIB, 0)]:
            disk.seek(offset)
            assert disk.read(length) == bytes([pattern]) * length
    os.kill(restore.process, 9)  # what was not made durable, the map does not know
    run("losetup", "--detach", restore.device)
    wait_for(lambda: not servers())
    with attached(depots["borg"], tmp_path / "target.img") as again, open(again.device, "rb") as disk:
        for offset, length, pattern in written:
            disk.seek(offset)
            assert disk.read(length) == bytes([pattern]) * length


class Client:
    """An NBD client that reads (nbd's doc/proto.md, fixed newstyle, without options)."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.stream = self.socket.makefile("rwb")
        assert self.stream.read(18)[:16] == b"NBDMAGICIHAVEOPT"
        self.stream.write(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        self.stream.flush()
        self.size = struct.unpack(">QH", self.stream.read(10))[0]

    def read(self, offset: int, length: int) -> bytes:
        self.stream.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, offset, length))
        self.stream.flush()
        assert struct.unpack(">IIQ", self.stream.read(16)) == (0x67446698, 0, 7)
        return self.stream.read(length)

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def test_a_client_never_sees_what_a_block_was_before_it_was_written(restore: Restore, tmp_path: Path) -> None:
    """Were it read through a page cache, a read beside a write would leave the old page there: one in six did."""
    restore.serve()
    clients = [Client(tmp_path / "run" / "hot" / f"{NAME}.nbd") for _ in range(4)]
    done = threading.Event()

    def read_beside(client: Client) -> None:
        while not done.is_set():
            client.read(0, 4096)

    beside = [threading.Thread(target=read_beside, args=[client]) for client in clients[1:]]
    for thread in beside:
        thread.start()
    block = mmap.mmap(-1, 4096)  # on a page of its own, as O_DIRECT wants it
    descriptor = os.open(restore.device, os.O_RDWR | os.O_DIRECT)
    written = stale = 0
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until or written < 100:
            written += 1
            block[:8] = written.to_bytes(8, "little")
            os.pwrite(descriptor, block, 0)
            stale += int.from_bytes(clients[0].read(0, 8), "little") != written
    finally:
        os.close(descriptor)
        done.set()
        for thread in beside:
            thread.join()
        for client in clients:
            client.close()
    assert (stale, clients[0].size) == (0, 96 * MIB), written


def test_it_is_in_use_while_somebody_is_connected(restore: Restore, tmp_path: Path) -> None:
    uri = restore.serve()
    client = subprocess.Popen(["qemu-io", "-r", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        wait_for(lambda: restore.status()["exports"][0]["clients"] == 1)
        blockferry("detach", NAME).refused(1, "in use", f"{uri} (1 connected)")
    finally:
        client.communicate()
    wait_for(lambda: restore.status()["exports"][0]["clients"] == 0)
    assert blockferry("detach", NAME).code == 0
    assert not servers()
    assert not (tmp_path / "run" / "hot" / f"{NAME}.nbd").exists()


def test_it_is_served_no_longer_than_its_process_lives(
    restore: Restore, depots: dict[str, Depot], tmp_path: Path
) -> None:
    uri = restore.serve()
    client = subprocess.Popen(["qemu-io", "-r", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(lambda: restore.status()["exports"][0]["clients"] == 1)
    os.kill(restore.process, 9)
    wait_for(lambda: not servers())
    client.communicate()
    run("losetup", "--detach", restore.device)
    assert (tmp_path / "run" / "hot" / f"{NAME}.nbd").exists(), "nobody could take it away"
    with attached(depots["borg"], tmp_path / "target.img") as again:
        assert run("nbdinfo", "--size", again.serve()).strip() == str(96 * MIB)


def test_an_nbdkit_that_died_is_not_called_an_export(restore: Restore) -> None:
    uri = restore.serve()
    os.kill(int(servers()[0].split()[0]), 9)
    wait_for(lambda: restore.status()["exports"] == [])
    assert restore.serve() == uri
    run("nbdinfo", uri)


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "insecure", "told"),
    [
        (Wish(host="127.0.0.1"), False, "whoever reaches that address could read the disk"),
        (Wish(host="0.0.0.0"), True, "every network"),
        (Wish(host="::"), True, "every network"),
        (Wish(host=""), True, "no address"),
        (Wish(host="127.0.0.1", tls="/nowhere"), False, "not there: /nowhere"),
        (Wish(host="127.0.0.1", tls="/etc"), False, "/etc/server-key.pem"),
        (Wish(host="127.0.0.1", tls="/etc/passwd"), False, "others can read"),
        (Wish(host="127.0.0.1", tls="/etc"), True, "exclude"),
        (Wish(socket="/tmp/x"), True, "for --listen"),
    ],
)
def test_what_would_show_the_disk_to_anybody_is_refused(wish: Wish, insecure: bool, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        checked(wish, insecure=insecure)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--listen", "[::]:1", "--insecure"), "every network"),
        (("--listen", "10.0.0.1", "--insecure"), "HOST:PORT"),
        (("--listen", "127.0.0.1:1", "--socket", "/tmp/x", "--insecure"), "exclude"),
        (("--stop", "--write"), "--stop"),
    ],
)
def test_words_that_name_no_place_are_refused(words: tuple[str, ...], told: str) -> None:
    blockferry("serve", NAME, *words).refused(2, told)


def test_what_cannot_be_served_is_an_error_and_leaves_nothing(restore: Restore, tmp_path: Path) -> None:
    blockferry("serve", "nothing").refused(1, "nothing runs for it")
    blockferry("serve", NAME, "--socket", tmp_path / "missing" / "it.nbd").refused(1, "cannot be listened at")
    (tmp_path / "a file").touch()
    blockferry("serve", NAME, "--socket", tmp_path / "a file").refused(1, "a file: cannot be listened at")
    blockferry("serve", NAME, "--listen", "192.0.2.1:1", "--insecure").refused(1, "192.0.2.1:1")
    (tmp_path / "tls").mkdir()
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (tmp_path / "tls" / name).touch(0o600)
    blockferry("serve", NAME, "--listen", "127.0.0.1:0", "--tls", tmp_path / "tls").refused(1, "nbdkit")
    assert restore.status()["exports"] == []
    assert not servers()


def test_a_restore_without_a_target_cannot_be_written_to(
    depots: dict[str, Depot], volume: Path, tmp_path: Path
) -> None:
    with attached(depots["borg"], "--buffer", tmp_path, "--size", "32M") as restore:
        blockferry("serve", NAME, "--write").refused(1, "read-only")
        run("nbdcopy", restore.serve(), tmp_path / "copy.img")
        run("cmp", tmp_path / "copy.img", volume)
