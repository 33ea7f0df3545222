"""`blockferry cluster`: backups of volumes that several hosts share."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import click
from rich.filesize import decimal

from blockferry.cli import completion as complete
from blockferry.cli.afterwards import remember, thin_out
from blockferry.cli.context import Context, index_option, json_option, no_job_option, repository_option
from blockferry.cli.output import Listing
from blockferry.cluster import copying, engines
from blockferry.cluster.backup import SharedResult, back_up_shared
from blockferry.cluster.coordinator import hosts_of, progress_of, unguarded_hosts
from blockferry.cluster.engines import Engine
from blockferry.cluster.epoch import device_key
from blockferry.errors import UsageError
from blockferry.joined import JoinedRepository
from blockferry.manager import log_index_named
from blockferry.repository import Repository
from blockferry.volume import Volume


@click.group()
def cluster() -> None:
    """Back up a volume that several hosts share, as it is at one instant, while all of them write to it."""


@cluster.command()
@click.argument("volume", shell_complete=complete.paths)
@repository_option
@index_option
@click.option("--name", default="", help="What the guards call the volume; else the end of its path.")
@click.option("--host", "hosts", multiple=True, metavar="HOST", help="A host that has to take part; can be repeated.")
@click.option(
    "--engine",
    default="local",
    show_default=True,
    metavar="ENGINE",
    help="Who copies: `local`, this host; `dask://SCHEDULER`, all hosts with a worker there.",
)
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, help="Of the local engine: copy with so many at a time."
)
@click.option("--log-repo", metavar="REF", help="Store the before-images in this repository; else beside the copy.")
@no_job_option
@json_option
@click.pass_obj
def backup(
    context: Context,
    volume: str,
    reference: str | None,
    index: str,
    name: str,
    hosts: tuple[str, ...],
    engine: str,
    processes: int,
    log_repo: str | None,
    no_job: bool,
) -> None:
    """Store VOLUME, in front of which every host that writes to it has a guard, as it is at one instant.

    VOLUME is a path, or the name of a volume in the configuration.

    \b
    Example:
      blockferry cluster backup /dev/mapper/lun0 --index redis://10.0.0.5/0 --repo restic:/srv/backup
    """
    meant = context.volume(volume, name, reference)

    def store(repository: Repository) -> SharedResult:
        with contextlib.ExitStack() as opened:
            logs = opened.enter_context(context.repository(log_repo)) if log_repo else repository
            found = Volume.discover(meant.path, meant.name)
            copying.PATHS[found.name] = found.path
            shared_index = opened.enter_context(contextlib.closing(log_index_named(context.manager, index)))
            chosen = opened.enter_context(_engine(engine, processes, found.name))
            made = back_up_shared(
                context.manager,
                found,
                (repository, logs),
                shared_index,
                hosts=hosts,
                engine=chosen,
                progress=context.output,
            )
            remember(context, logs.reference, made)
            both = JoinedRepository(repository, logs) if log_repo else repository
            thin_out(context, both, found.name, meant.keep)
            return made

    result = context.back_up(meant.repository, meant.name, store, job=not no_job, known_as=log_repo)
    context.output.result(result.as_json(), lambda: _sentence(result))
    context.complain()


@contextlib.contextmanager
def _engine(named: str, processes: int, volume: str) -> Iterator[Engine]:
    """Give the engine that copies."""
    if named == "local":
        yield engines.Processes(processes) if processes > 1 else engines.InProcess()
        return
    scheme, separator, address = named.partition("://")
    if scheme != "dask" or not separator or not address:
        raise UsageError(f"{named}: not an engine", remedy="Say local, or dask://SCHEDULER:8786.")
    with contextlib.closing(engines.Dask(address, volume)) as dask:
        yield dask


@cluster.command()
@click.argument("volume")
@index_option
@json_option
@click.pass_obj
def hosts(context: Context, volume: str, index: str) -> None:
    """List the hosts that have a guard in front of VOLUME, by the name that they call it, and where one was killed.

    \b
    Example:
      blockferry cluster hosts lun0 --index redis://10.0.0.5/0
    """
    with contextlib.closing(log_index_named(context.manager, index)) as shared_index:
        found = hosts_of(shared_index, volume)
        unguarded = unguarded_hosts(shared_index, volume)
    rows: list[dict[str, Any]] = [{"host": host, **about} for host, about in found.items()]

    def listing() -> Listing:
        there = [(each["host"], each["path"], decimal(each["size"])) for each in rows]
        return Listing(("host", "path", "size"), there + [(host, "its guard was killed", "") for host in unguarded])

    context.output.result({"version": 1, "volume": volume, "hosts": rows, "unguarded": unguarded}, listing)


@cluster.command()
@click.argument("volume")
@click.argument("host")
@index_option
@json_option
@click.pass_obj
def forget(context: Context, volume: str, host: str, index: str) -> None:
    """Have backups of VOLUME begin without HOST, which is gone for good, or does not use it any more.

    Its guard was killed, and nobody else knows whether it still writes: then it spoils them.

    \b
    Example:
      blockferry cluster forget lun0 b --index redis://10.0.0.5/0
    """
    with contextlib.closing(log_index_named(context.manager, index)) as shared_index:
        if host not in unguarded_hosts(shared_index, volume):
            raise UsageError(f"{volume}: nothing is to be forgotten of {host}", remedy="See `cluster hosts`.")
        shared_index.remove(device_key(volume, host))
    context.output.result({"version": 1, "volume": volume, "host": host}, lambda: f"{volume}: {host} is forgotten")


@cluster.command()
@click.argument("scheduler")
@click.option(
    "--volume", "volumes", multiple=True, required=True, metavar="NAME=PATH", help="A shared volume; can be repeated."
)
@click.option("--host", default="", help="What this host is called; else its host name.")
@json_option
@click.pass_obj
def worker(context: Context, scheduler: str, volumes: tuple[str, ...], host: str) -> None:
    """Copy shares of volumes for backups that the Dask scheduler SCHEDULER hands out, until SIGTERM.

    Each repository is opened with the credentials in this command's environment.

    \b
    Example:
      blockferry cluster worker tcp://10.0.0.4:8786 --volume lun0=/dev/mapper/lun0
    """
    for each in volumes:
        name, separator, path = each.partition("=")
        if not separator:
            raise UsageError(f"{each}: names no volume", remedy="Write NAME=PATH, such as lun0=/dev/mapper/lun0.")
        copying.PATHS[name] = Volume.discover(path, name).path
    host = host or socket.gethostname()
    engines.work_for(scheduler, host)
    said = {"version": 1, "host": host, "scheduler": scheduler}
    context.output.result(said, lambda: f"{host}: copies no shares any more")


@cluster.command()
@click.argument("volume")
@index_option
@json_option
@click.pass_obj
def status(context: Context, volume: str, index: str) -> None:
    """Say whether a backup of VOLUME, by the name that the guards call it, is under way, and how far each host is.

    \b
    Example:
      blockferry cluster status lun0 --index redis://10.0.0.5/0
    """
    with contextlib.closing(log_index_named(context.manager, index)) as shared_index:
        epoch, reports = progress_of(shared_index, volume)
    found: dict[str, Any] = {"version": 1, "volume": volume, "epoch": epoch.as_json() if epoch else None}

    def listing() -> Listing | str:
        if epoch is None:
            return f"{volume}: no backup is under way"
        rows = [(host, str(said.get("state", "")), str(said.get("reason", ""))) for host, said in reports.items()]
        return Listing(("host", f"is (stage: {epoch.stage})", "because"), rows)

    context.output.result(found | {"hosts": reports}, listing)


def _sentence(result: SharedResult) -> str:
    record = result.record
    return (
        f"{result.snapshot.id}: {record.volume} of {len(result.hosts)} hosts, {decimal(record.bytes_used)} in use, "
        f"{result.shares} shares, {decimal(result.bytes_logged)} of before-images, "
        f"held for {result.seconds_held:.2f} s, in {result.seconds:.1f} s"
    )
