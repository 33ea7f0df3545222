"""What one of two guests does that share a disk with OCFS2 on it: it stands guard, mounts, writes, and backs up.

    python ocfs2_host.py NAME HOME

The guests are called a and b. They have the addresses of the page on shared volumes, and meet by way of the index,
which runs in a. Each writes steps, as described at `Writer`; a backs the disk up meanwhile. At last, when nobody uses
the disk any more, a restores it, mounts it, and takes its files out.

HOME has `setup.sh`, which configures the cluster. It gets NAME.json, what a host knows of the instant, backup.json,
what the backup said, and the directory `restored`. The repository is that of the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from blockferry.cluster.coordinator import progress_of
from blockferry.cluster.epoch import Stage
from blockferry.manager import log_index_named, plugin_manager
from commands_support import blockferry, run

VOLUME = "shared"
DISK = "/dev/vda"
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2"}
INDEX = f"redis://{ADDRESSES['a']}:6379/0"
PLACE = Path("/srv")
WORK = PLACE / "work"
KEPT = 30
"""Files of a host that are there at a time."""
CELLS = 48
BLOCK = 4096
_PATIENCE = 400.0
_ENOUGH = 15
"""Steps of each host before the backup begins."""


def content(name: str, number: int) -> bytes:
    """Return what is in the file of a step."""
    return f"{name} {number:08}\n".encode() * (100 + number * 997 % 5000)


def record(number: int, seen: int) -> bytes:
    """Return what a step adds to its host's log: its number, and the last one that it saw in the other's log."""
    return f"{number:08} {seen:08}\n".encode()


def records_of(log: bytes) -> list[tuple[int, int]]:
    """Return the records of a log; ValueError if one is not whole."""
    found = [(int(line[:8]), int(line[9:])) for line in log.splitlines()]
    if b"".join(record(*each) for each in found) != log:
        raise ValueError("a record is not whole")
    return found


class Writer(threading.Thread):
    """Writes numbered steps, until `ending` is set: each of them through, and synced, before the next one.

    A step sees how far the other host is, removes the file of long ago, makes one of its own in a directory that both
    use, overwrites the cell of its number in place, and notes itself in the host's log at last.
    """

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True)
        self.begun = self.done = 0
        self.failure: BaseException | None = None
        self.ending = threading.Event()
        self._name, (self._other,) = name, ADDRESSES.keys() - {name}
        self._files = WORK / "files"

    def run(self) -> None:
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            while not self.ending.is_set():
                self.begun = self.done + 1
                self._step(self.begun)
                self.done = self.begun
        except BaseException as error:
            self.failure = error
            raise

    def _step(self, number: int) -> None:
        seen = self._seen()
        (self._files / f"{self._name}-{number - KEPT}").unlink(missing_ok=True)
        self._write(self._files / f"{self._name}-{number}", content(self._name, number), 0)
        directory = os.open(self._files, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        self._write(WORK / f"cells-{self._name}", b"%08d" % number * (BLOCK // 8), number % CELLS * BLOCK)
        self._write(WORK / f"log-{self._name}", record(number, seen), (number - 1) * len(record(0, 0)))

    def _seen(self) -> int:
        try:
            found = (WORK / f"log-{self._other}").read_bytes()
        except FileNotFoundError:
            return 0
        return len(records_of(found))

    @staticmethod
    def _write(path: Path, data: bytes, offset: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)
        os.close(descriptor)


class Watcher(threading.Thread):
    """Notes of each epoch which step was done for certain before the instant, and which one after it had not begun.

    The instant is when the coordinator says `open`: all hosts hold their writes then. No clock is asked.
    """

    def __init__(self, writer: Writer) -> None:
        super().__init__(daemon=True)
        self.bounds: dict[str, tuple[int, int]] = {}
        self._writer = writer
        self._index = log_index_named(plugin_manager(), INDEX)

    def run(self) -> None:
        before = 0
        while not self._writer.ending.is_set():
            done = self._writer.done
            epoch, _reports = progress_of(self._index, VOLUME)
            if epoch is None or epoch.stage in (Stage.ENTER, Stage.PREPARE, Stage.HOLD):
                before = done
            elif epoch.id not in self.bounds:
                self.bounds[epoch.id] = before, self._writer.begun
            time.sleep(0.05)


class Host:
    """One guest."""

    def __init__(self, name: str, home: Path) -> None:
        self.name, self.home = name, home
        self.index = redis.Redis(ADDRESSES["a"], socket_timeout=30)

    def share(self) -> None:
        """Do all of it."""
        (network,) = (path.name for path in Path("/sys/class/net").iterdir() if path.name != "lo")
        run("ip", "address", "add", f"{ADDRESSES[self.name]}/24", "dev", network)
        run("ip", "link", "set", network, "up")
        with self._index_server():
            self._be_in_the_cluster()
            words = [DISK, "--index", INDEX, "--name", VOLUME, "--host", self.name]
            self.say("in the cluster")
            said = blockferry("guard", "start", *words, "--json").json()
            if self.name == "a":
                run("mkfs.ocfs2", "-b", BLOCK, "-N", 2, "--cluster-stack=o2cb", "--cluster-name=shared", said["device"])
            self.meet("made")
            run("mount", "-t", "ocfs2", said["link"], PLACE)
            self.meet("mounted")
            self._write_and_back_up()
            run("umount", PLACE)
            blockferry("guard", "stop", VOLUME, "--json").json()
            self.meet("over", wait=self.name == "a")
            if self.name == "a":
                self._take_out()

    def meet(self, where: str, *, wait: bool = True) -> None:
        """Wait until the other guest is so far, too."""
        self.say(where)
        self.index.sadd(where, self.name)
        self.until(lambda: not wait or self.index.scard(where) == len(ADDRESSES), where)

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            assert not self.index.exists("failed"), "the other guest failed"
            assert time.monotonic() < deadline, what
            time.sleep(0.1)

    def say(self, words: object) -> None:
        print(f"{time.monotonic():7.1f} {self.name}: {words}", flush=True)  # noqa: T201

    def _write_and_back_up(self) -> None:
        writer = Writer(self.name)
        watcher = Watcher(writer)
        writer.start()
        watcher.start()
        self.until(lambda: writer.done >= _ENOUGH or writer.failure, "steps")
        self.meet("written")
        if self.name == "a":
            self._back_up()
        self.meet("backed up")
        writer.ending.set()
        writer.join(_PATIENCE)
        watcher.join(_PATIENCE)
        assert not writer.failure
        self.say(f"{writer.done} steps, instant within {watcher.bounds}")
        before, after = list(watcher.bounds.values())[-1]
        told = {"before": before, "after": after, "done": writer.done}
        (self.home / f"{self.name}.json").write_text(json.dumps(told))

    def _back_up(self) -> None:
        words = [DISK, "--name", VOLUME, "--index", INDEX, "--host", "a", "--host", "b"]
        self.said: Any = blockferry("cluster", "backup", *words, "--json", timeout=_PATIENCE).json()
        self.say(self.said)
        (self.home / "backup.json").write_text(json.dumps(self.said))

    def _take_out(self) -> None:
        """Restore what was backed up, and mount it, by which the kernel replays the journals of both hosts."""
        run("blkdiscard", "--zeroout", DISK)
        blockferry("restore", self.said["snapshot"], DISK, "--json", timeout=_PATIENCE).json()
        self.say("restored")
        run("mount", "-t", "ocfs2", DISK, PLACE)
        shutil.copytree(WORK, self.home / "restored")
        run("umount", PLACE)

    @contextlib.contextmanager
    def _index_server(self) -> Iterator[None]:
        """Run the index in a; wait for it in b."""
        if self.name != "a":
            self._wait_for_index()
            yield
            return
        settings = ["--bind", ADDRESSES["a"], "--protected-mode", "no", "--save", ""]
        server = subprocess.Popen(["redis-server", *settings], stdout=subprocess.DEVNULL)
        try:
            self._wait_for_index()
            yield
        finally:
            server.terminate()
            server.wait()

    def _wait_for_index(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self.index.ping()
                return
            except redis.RedisError:
                assert time.monotonic() < deadline
                time.sleep(0.5)

    def _be_in_the_cluster(self) -> None:
        """Set o2cb up as Debian does it, but for a directory below the root, which a guest cannot make."""
        socket.sethostname(self.name)
        run("sh", self.home / "setup.sh")
        script = Path("/etc/init.d/o2cb")
        script.write_text(script.read_text().replace('"/dlm"', '"/run/dlm"'))
        run(script, "start")


if __name__ == "__main__":
    host = Host(sys.argv[1], Path(sys.argv[2]))
    try:
        host.share()
    except BaseException:
        with contextlib.suppress(redis.RedisError):
            host.index.sadd("failed", host.name)
        raise
