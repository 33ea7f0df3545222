"""What to write into the configuration of another tool, so that its job backs up what an export shows.

Each tool has hooks that run before a job and after it, whatever came of it. The export has to be released in any case,
and its exit code is to be seen: 1 after a job that cannot have read all.
"""

from __future__ import annotations

import dataclasses
import io
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from blockferry.config.configuration import NamedVolume
from blockferry.groups.definition import Group


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a job is to back up."""

    names: Sequence[str]
    """Of volumes and groups."""
    volumes: Sequence[NamedVolume]
    groups: Sequence[Group]
    at: str
    """The directory."""
    usual: bool
    """Whether that is the one that need not be named."""
    kind: str
    """`segments` or `image`."""
    command: str
    """The path of `blockferry`."""
    config: str
    """The configuration that has to be named; "" for none."""

    @property
    def export(self) -> str:
        """The command before the job."""
        options = [] if self.kind == "segments" else ["--as", self.kind]
        return self._command("export", *options, *self._place, *self.names)

    def release(self, *options: str) -> str:
        """Return the command after the job."""
        return self._command("release", *options, *self._place, *self.names)

    @property
    def _place(self) -> list[str]:
        return [] if self.usual else ["--at", self.at]

    def _command(self, *words: str) -> str:
        config = ["--config", self.config] if self.config else []
        return shlex.join([self.command, *config, *words])


def snippet(tool: str, wanted: Wanted) -> str:
    """Return what to paste for one of `TOOLS`, as YAML with comments."""
    remarks, content = TOOLS[tool](wanted)
    return "".join(f"# {line}\n" for line in remarks) + _yaml(content)


def _borgmatic(wanted: Wanted) -> tuple[list[str], dict[str, Any]]:
    """Return it for borgmatic 2: `commands`, and the volumes where borgmatic lets anybody keep what is theirs."""
    remarks = [
        "For borgmatic's configuration, next to `repositories`. Where it has source_directories, constants or",
        "commands already, add these entries to them.",
    ]
    return remarks, {
        "constants": {"blockferry": _definitions(wanted)},
        "source_directories": [wanted.at],
        "commands": [
            {"before": "configuration", "when": ["create"], "run": [wanted.export]},
            {"after": "configuration", "when": ["create"], "states": ["finish", "fail"], "run": [wanted.release()]},
        ],
    }


def _resticprofile(wanted: Wanted) -> tuple[list[str], dict[str, Any]]:
    """Return it for resticprofile: `run-finally` also runs when `run-before` or the backup has failed."""
    remarks = [
        "For resticprofile's profiles.yaml, below the name of your profile. In version 2 of its format everything",
        "but the version is below `profiles`.",
    ]
    backup = {"source": [wanted.at], "run-before": [wanted.export], "run-finally": [wanted.release()]}
    return remarks, {"version": "1", "default": {"backup": backup}}


def _autorestic(wanted: Wanted) -> tuple[list[str], dict[str, Any]]:
    """Return it for autorestic: of `success` and `failure` one runs, whatever came of it."""
    remarks = ["For .autorestic.yml; name your own backend after `to`."]
    hooks = {
        "prevalidate": [wanted.export],
        "success": [wanted.release()],
        "failure": [wanted.release("--failed")],
    }
    location = {"from": [wanted.at], "to": ["BACKEND"], "hooks": hooks}
    return remarks, {"version": 2, "locations": {wanted.names[0]: location}}


def _definitions(wanted: Wanted) -> dict[str, Any]:
    """Return what the configuration says of volumes and groups, as it says it; their schedule is the job's."""
    said: dict[str, Any] = {}
    if wanted.volumes:
        said["volumes"] = {volume.name: _volume(volume) for volume in wanted.volumes}
    if wanted.groups:
        said["groups"] = {group.name: _group(group) for group in wanted.groups}
    return said


def _group(group: Group) -> dict[str, Any]:
    said = {
        "volume": group.root,
        "paths": list(group.paths),
        "patterns": list(group.patterns),
        "exclude_if_present": list(group.exclude_if_present),
        "exclude_caches": group.exclude_caches,
    }
    return {key: value for key, value in said.items() if value}


def _volume(volume: NamedVolume) -> dict[str, str]:
    """Return what a volume's entry in a configuration says; a repository is the job's own matter."""
    said = {"path": volume.path, "mount": volume.mount}
    return {key: value for key, value in said.items() if value}


def _yaml(content: dict[str, Any]) -> str:
    from ruamel.yaml import YAML  # noqa: PLC0415  # takes a while, and few commands need it

    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # it has no types
    yaml.width = 1 << 16
    yaml.indent(mapping=4, sequence=6, offset=4)
    yaml.dump(content, text)
    return text.getvalue()


TOOLS: dict[str, Callable[[Wanted], tuple[list[str], dict[str, Any]]]] = {
    "autorestic": _autorestic,
    "borgmatic": _borgmatic,
    "resticprofile": _resticprofile,
}
