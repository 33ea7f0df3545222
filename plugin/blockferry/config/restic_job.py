"""What the jobs of resticprofile and autorestic have in common: their commands around a backup, and retention.

Their own commands cannot make our backup, so their commands are run from here, in their order. Retention is restic's
own `forget`, with their rules, confined to the snapshots of one volume of this host: those are one series.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

import pluggy

from blockferry.config.reference import ForeignReference
from blockferry.errors import BlockferryError, PartialError, RepositoryError, ToolMissingError, UsageError
from blockferry.hookspecs import Job
from blockferry.manager import repository_named
from blockferry.repository import Repository

log = logging.getLogger(__name__)


class CommandError(BlockferryError):
    """A command of the user's, around a backup, failed."""

    def __init__(self, message: str, *, remedy: str, status: int) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Commands:
    """How a tool runs the commands of its users: by a shell, in a directory, with variables of its own."""

    where: str
    """Names the file and the section, for messages."""
    interpreter: str
    directory: str
    environment: Mapping[str, str] = dataclasses.field(repr=False)

    def run(self, kind: str, commands: Sequence[str], more: Mapping[str, str] | None = None) -> None:
        """Run commands one after the other, until one fails; raise CommandError for that. They print to our stderr."""
        for number, command in enumerate(commands, 1):
            log.info("%s: %s %d of %d", self.where, kind, number, len(commands))
            shell = shutil.which(self.interpreter, path=self.environment.get("PATH")) or self.interpreter
            try:
                # A shell by intention: what these tools call commands are lines of one.
                status = subprocess.run(
                    [shell, "-c", command],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr.fileno(),
                    env={**self.environment, **(more or {})},
                    cwd=self.directory or None,
                    check=False,
                ).returncode
            except OSError as error:
                raise CommandError(
                    f"{self.where}: {kind}: {shell} does not start: {error.strerror}",
                    remedy="Check its shell and directory.",
                    status=127,
                ) from None
            if status:
                raise CommandError(
                    f"{self.where}: {kind}: command {number} of {len(commands)} ended with status {status}",
                    remedy="Run it by hand, and see what it says above.",
                    status=status,
                )


def open_restic(manager: pluggy.PluginManager, named: ForeignReference, environment: Mapping[str, str]) -> Repository:
    """Open the restic repository that variables describe, known by the reference to where they come from."""
    repository = repository_named(manager, "restic:", environment)
    repository.named = str(named)
    return repository


def outcome(made: Sequence[object], failure: BlockferryError | None) -> Job:
    """Return what a job came to that made these backups, and then failed, perhaps; raise that if it made none."""
    if failure is None:
        return Job(made[-1])
    if not made:
        raise failure
    return Job(made[-1], PartialError(f"the snapshot is stored, but then: {failure.message}", remedy=failure.remedy))


def restic(environment: Mapping[str, str], *words: str) -> None:
    """Run restic on the repository that the environment names; raise RepositoryError if it fails."""
    binary = shutil.which(environment.get("BLOCKFERRY_RESTIC") or "restic", path=environment.get("PATH"))
    if binary is None:
        raise ToolMissingError("restic is not installed", remedy="Install restic 0.18 or later.")
    options = shlex.split(environment.get("BLOCKFERRY_RESTIC_OPTIONS", ""))
    done = subprocess.run(
        [binary, *options, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=dict(environment),
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RepositoryError(f"restic {words[0]} ended with status {done.returncode}: {said}", remedy="See restic.")
    log.info("restic %s: %s", words[0], (done.stdout.strip().splitlines() or ["done"])[-1])


def forget(environment: Mapping[str, str], repository: Repository, volume: str, rules: Sequence[str]) -> None:
    """Remove the snapshots of a volume that rules (`--keep-daily=7`) do not keep. Parts would lose what they lie on."""
    if not any(rule.startswith("--keep-") for rule in rules):
        return
    if lies_on_others(repository, volume):
        log.warning("%s: nothing was removed: there are parts, which lie on earlier snapshots", volume)
        return
    mine = f"blockferry,volume={quote(volume, safe='')}"
    restic(environment, "forget", "--host", socket.gethostname(), "--tag", mine, "--group-by", "", *rules)


def lies_on_others(repository: Repository, volume: str) -> bool:
    """Tell whether any snapshot of a volume needs another one: a rule that knows dates only might remove that."""
    return any(each.part or each.share_of or each.closing for each in repository.snapshots() if each.volume == volume)


def check_apart(where: str, options: Mapping[str, object]) -> None:
    """Raise UsageError if a tool's own `forget` would put volumes and its own snapshots into one series.

    The paths of our snapshots are never those of another: as long as restic groups by paths each is by itself.
    """
    grouped = options.get("group-by")
    given = grouped if isinstance(grouped, str) else ",".join(map(str, grouped)) if isinstance(grouped, list) else None
    if given is not None and "path" not in given and not options.get("path") and not options.get("tag"):
        raise UsageError(
            f"{where}: forget does not group by paths: it would remove snapshots of volumes for newer ones of files",
            remedy="Leave group-by out, or add paths to it, or give forget a tag or path of its own.",
        )


def attempt(steps: Sequence[Callable[[], None]]) -> BlockferryError | None:
    """Run steps until one fails; return what it failed of."""
    for step in steps:
        try:
            step()
        except BlockferryError as error:
            return error
    return None
