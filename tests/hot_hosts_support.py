"""Other hosts, as network namespaces: each has an address of its own, and does not see what is hidden from it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from commands_support import command, run

_MOUNT_OVER = 'for each in $HIDDEN; do mount -t tmpfs none "$each"; done; exec "$@"'


@dataclasses.dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str
    hidden: tuple[Path, ...] = ()
    """Directories that are empty there."""

    def command(self, *words: object) -> list[str]:
        """Return the argument list that runs a command there."""
        return ["ip", "netns", "exec", self.name, "/bin/sh", "-c", _MOUNT_OVER, "sh", *map(str, words)]

    def start(self, *words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words), env=self._env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *words: object) -> str:
        return run(*self.command(*words), env=self._env())

    def fails(self, *words: object) -> str:
        """Run what must fail; return what it says."""
        done = subprocess.run(self.command(*words), env=self._env(), capture_output=True, text=True, check=False)
        assert done.returncode, (words, done.stdout)
        return done.stdout + done.stderr

    def ferry(self, *words: object) -> list[str]:
        """Return the argument list that runs `blockferry` with this host's addresses, and all else as it is here."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *command(*words)]

    def _env(self) -> dict[str, str]:
        return os.environ | {"HIDDEN": " ".join(map(str, self.hidden))}


@contextlib.contextmanager
def hosts(count: int, *, hidden: tuple[Path, ...]) -> Iterator[list[Host]]:
    """Make a host that sees everything, and `count` that are each wired to it; take them away afterwards."""
    with contextlib.ExitStack() as made:
        server = _new_host(made, Host(f"ferry{os.getpid()}s", ""))
        others = []
        for number in range(count):
            other = _new_host(made, Host(f"ferry{os.getpid()}c{number}", f"10.99.{number}.2", hidden))
            run(
                *("ip", "-n", server.name, "link", "add", f"to{number}", "type", "veth"),
                *("peer", "name", "wire", "netns", other.name),
            )
            for name, link, address in (
                (server.name, f"to{number}", f"10.99.{number}.1"),
                (other.name, "wire", other.address),
            ):
                run("ip", "-n", name, "address", "add", f"{address}/24", "dev", link)
                run("ip", "-n", name, "link", "set", link, "up")
            # All others reach the server at one address.
            run("ip", "-n", other.name, "route", "add", "10.99.255.1/32", "via", f"10.99.{number}.1")
            others.append(other)
        run("ip", "-n", server.name, "address", "add", "10.99.255.1/32", "dev", "lo")
        yield [dataclasses.replace(server, address="10.99.255.1"), *others]


def _new_host(made: contextlib.ExitStack, host: Host) -> Host:
    run("ip", "netns", "add", host.name)
    made.callback(run, "ip", "netns", "delete", host.name)
    run("ip", "-n", host.name, "link", "set", "lo", "up")
    return host
