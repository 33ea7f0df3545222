"""An sshd of our own on 127.0.0.1, which lets us in by a key of our own, and can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAM = Path("/usr/sbin/sshd")


class Sshd:
    """`rsh` is what BORG_RSH has to be."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
            subprocess.run(command, check=True)
        (home / "user.pub").rename(home / "authorized")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        settings = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": home / "host",
            "AuthorizedKeysFile": home / "authorized",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PermitRootLogin": "yes",
        }
        (home / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd as root insists on it (privilege separation)
        options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR -o UserKnownHostsFile=/dev/null"
        self.rsh = f"ssh -i {home / 'user'} {options}"

    def start(self) -> None:
        self.server = subprocess.Popen([str(PROGRAM), "-D", "-e", "-f", str(self.home / "sshd_config")])
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError("sshd does not answer")

    def stop(self) -> None:
        self.server.send_signal(signal.SIGTERM)
        self.server.wait()

    def kill(self) -> None:
        """End it and every connection, without a word."""
        family, seen = [self.server.pid], 0
        while seen < len(family):
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{family[seen]}/task").iterdir():
                    family += [int(each) for each in (task / "children").read_text().split()]
            seen += 1
        for number in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.server.wait()
