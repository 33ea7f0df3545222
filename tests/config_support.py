"""Files of other tools with real repositories, and the secret that opens them."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from commands_support import run

BORGMATIC = Path(sys.executable).with_name("borgmatic")
SECRET = "geheim-4711-Zebra"
FORMAT = "'{hostname}-{now:%Y-%m-%dT%H:%M:%S.%f}'"


@dataclasses.dataclass
class Job:
    """A file of borgmatic's with its repository, a source directory and a log that its commands write to."""

    file: Path
    repository: Path
    borg: str

    def write(self, more: str = "", *, passphrase: str = f"encryption_passphrase: {SECRET}") -> None:
        self.file.write_text(
            f"{passphrase}\nlocal_path: {self.borg}\nsource_directories: [{self.file.parent / 'source'}]\n"
            f"repositories: [{{path: {self.repository}, label: nas}}]\n{more}\n"
        )

    @property
    def reference(self) -> str:
        return f"borgmatic:{self.file}#nas"

    @property
    def archives(self) -> list[str]:
        listed = run(self.borg, "list", "--short", self.repository, env={**os.environ, "BORG_PASSPHRASE": SECRET})
        return listed.splitlines()

    @property
    def log(self) -> list[str]:
        path = self.file.parent / "log"
        return path.read_text().splitlines() if path.exists() else []
