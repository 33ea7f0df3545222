"""`blockferry attach`, `status` and `detach`: a volume that is usable while it is restored."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from blockferry import service
from blockferry.cli import completion as complete
from blockferry.cli.context import Context, json_option, log_repository_option, repository_option
from blockferry.cli.output import Listing
from blockferry.errors import BlockferryError, UsageError
from blockferry.export.client import standing
from blockferry.hot import arming, attachment, client, daemon, movable
from blockferry.hot.arming import Armed
from blockferry.hot.client import Request
from blockferry.manager import tell
from blockferry.volume import default_name

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(_context: click.Context, _parameter: click.Parameter, text: str | None, least: int = 1) -> int | None:
    """Return a number of bytes, which stands by itself or with K, M, G or T: powers of 1024; `least` or more."""
    if text is None:
        return None
    plain = text.upper().removesuffix("B").removesuffix("I")
    unit = plain[-1:] if plain[-1:] in "KMGT" else ""
    try:
        amount = float(plain.removesuffix(unit)) * _UNITS[unit]
        number = math.ceil(amount)  # a little is more than none
    except (ValueError, OverflowError):
        amount = number = -1
    if amount < least:
        raise click.BadParameter(f"{text!r} is not a number of bytes such as 500M or 2G")
    return number


_parse_rate = functools.partial(parse_bytes, least=0)


@click.command()
@click.argument("snapshot", shell_complete=complete.snapshots)
@click.argument("target", required=False, shell_complete=complete.paths)
@repository_option
@log_repository_option
@click.option("--buffer", metavar="DIR", help="Without a TARGET: keep what was read last in a file in DIR.")
@click.option("--size", callback=parse_bytes, metavar="BYTES", help="How large that file may become: 20G.")
@click.option("--name", default="", help="What to call it; else the end of the target's path, or SNAPSHOT.")
@click.option("--force", is_flag=True, help="Overwrite a target that holds something.")
@click.option(
    "--rate",
    callback=_parse_rate,
    metavar="BYTES",
    help="Bring in at most so many bytes a second: 20M; 0: nothing but what is read.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=Request.patience,
    show_default=True,
    metavar="SECONDS",
    help="Wait so long for a repository that does not answer before reads fail.",
)
@click.option(
    "--threads", type=click.IntRange(min=0), default=0, help="Read so much at a time; else one more than processors."
)
@click.option("--foreground", is_flag=True, help="Stay, until SIGTERM or `detach`: for systemd.")
@json_option
@click.pass_obj
def attach(
    context: Context,
    snapshot: str,
    target: str | None,
    reference: str | None,
    log_reference: str | None,
    buffer: str | None,
    size: int | None,
    name: str,
    force: bool,
    rate: int | None,
    patience: float,
    threads: int,
    foreground: bool,
) -> None:
    """Make SNAPSHOT usable at once, as a disk, while it is brought back to TARGET, a block device or a file.

    Prints the device, which can be mounted and written to. What is written is on TARGET, which is the whole volume when
    all is there. The same command goes on with a restore that was interrupted.

    With --buffer nothing is restored: the disk is read-only, and lasts until `detach`.

    \b
    Examples:
      blockferry attach latest /dev/sdb --repo borg:ssh://nas/./volumes
      blockferry attach latest --buffer /var/tmp --size 20G --repo borg:ssh://nas/./volumes
    """
    _refuse_places(target, buffer, size)
    request = Request(
        name=name or (default_name(target) if target else snapshot),
        reference=context.reference(reference),
        snapshot=snapshot,
        log_reference=log_reference or "",
        target=os.path.realpath(target) if target else "",
        buffer=os.path.realpath(buffer) if buffer else "",
        buffer_size=size or 0,
        force=force,
        rate=rate,
        patience=patience,
        threads=threads,
    )
    attachment.directory_of(request.name)
    if foreground:
        daemon.serve(request)
        return
    began = time.monotonic()
    said = client.start(request)
    said["seconds"] = round(time.monotonic() - began, 3)
    context.output.result({"version": 1, **said}, lambda: _sentence(said))


def _refuse_places(target: str | None, buffer: str | None, size: int | None) -> None:
    """Refuse what does not say where the blocks are to be kept."""
    if not target and not buffer:
        raise UsageError(
            "nowhere to restore to", remedy="Name a device or file as the target, or a directory for a --buffer."
        )
    if target and buffer:
        raise UsageError(
            "a target needs no buffer: what is fetched is kept there", remedy="Leave out TARGET or --buffer."
        )
    if bool(buffer) != bool(size):
        raise UsageError("--buffer and --size belong together", remedy="Say --buffer DIR --size 20G.")


@click.command()
@click.argument("name", required=False, shell_complete=complete.restores)
@json_option
@click.pass_obj
def status(context: Context, name: str | None) -> None:
    """Say how far the restore NAME is, or all of them; without NAME also what is exported for other tools' jobs.

    \b
    Example:
      blockferry status sdb
    """
    found = [_status(each) for each in ([name] if name else _names())]
    exports = [] if name else standing()
    data: dict[str, Any] = {"version": 1, **found[0]} if name else {"version": 1, "restores": found, "exports": exports}

    def listing() -> Listing:
        columns = ("name", "snapshot", "device", "target", "there", "of", "written", "rate", "state")
        return Listing(columns, [*map(_row, found), *map(_row_of_export, exports)])

    context.output.result(data, listing)


@click.command()
@click.argument("name", shell_complete=complete.restores)
@click.option("--force", is_flag=True, help="Although the disk is in use: what is not synced is lost.")
@click.option("--forget", is_flag=True, help="Forget how far it was: it cannot be gone on with.")
@json_option
@click.pass_obj
def detach(context: Context, name: str, force: bool, forget: bool) -> None:
    """Take the disk NAME away. What is on its target stays; `attach` goes on with it.

    When all is there, the target alone is the volume, and nothing is kept of the restore. Nothing is kept of one
    without a target. What serves the disk to other hosts ends; while one of them is connected, the disk is in use.

    \b
    Example:
      blockferry detach sdb
    """
    known = attachment.load(name)
    said: dict[str, Any] = {"name": name}
    try:
        said = client.ask(name, {"do": "detach", "force": force})
        _wait_until_gone(name)
    except service.NobodyThereError as error:
        if not known and not error.broken_off:
            raise BlockferryError(f"{name}: no such restore", remedy="`blockferry status` lists them.") from None
        if error.broken_off:
            client.clear_away(name)
        tell(context.manager.hook.blockferry_restore_progress, statistics={"name": name}, ended=True)
    known = attachment.load(name)
    finished = known is not None and known.finished
    if known and finished:
        movable.remove_moved(name, known.target)
    if known and (finished or forget):
        known.forget()

    def sentence() -> str:
        if finished:
            return f"{name}: {known.target if known else ''} is the volume, whole and by itself"
        if known is None:
            return f"{name}: detached; nothing is kept of it"
        if forget:
            return f"{name}: detached and forgotten"
        return f"{name}: detached; the same `blockferry attach` goes on with it"

    context.output.result({"version": 1, **said, "finished": finished}, sentence)


def _names() -> list[str]:
    known = [each.name for each in attachment.load_all()] + [each.name for each in arming.load_all()]
    return sorted({*client.running(), *known})


def _status(name: str) -> dict[str, Any]:
    """Return what the process of a restore says, or what is known without one."""
    try:
        said = client.ask(name, {"do": "status"})
        return {"state": "complete" if said["finished"] else "attached", **said}
    except service.NobodyThereError as error:
        known = attachment.load(name)
        armed = next((each for each in arming.load_all() if each.name == name), None)
        if known is None and error.broken_off:  # it had no target, of which anything would be known
            nothing = {"snapshot": "", "device": "", "path": "", "target": "", "finished": False}
            return {"state": "broken off", "name": name, **nothing}
        if known is None:
            return _waiting(name, armed)
        state = "complete" if known.finished else "broken off" if error.broken_off else "detached"
        if armed and armed.refused:
            state += f", refused: {armed.refused}"
        return {
            "state": state,
            "name": name,
            "snapshot": known.snapshot,
            "device": str(device) if (device := movable.mapper_path(name)).exists() else "",
            "path": "",
            "target": known.target,
            "size": known.size,
            "total": known.total,
            "finished": known.finished,
        }


def _waiting(name: str, armed: Armed | None) -> dict[str, Any]:
    """Return what is known of a restore that has not begun; raise BlockferryError if nothing is."""
    if armed is None:
        raise BlockferryError(f"{name}: no such restore", remedy="`blockferry status` lists them.")
    return {
        "state": f"refused: {armed.refused}" if armed.refused else "armed",
        "name": name,
        "snapshot": armed.snapshot,
        "device": "",
        "path": "",
        "target": str(armed.match),
        "finished": False,
    }


def _row(said: dict[str, Any]) -> tuple[str, ...]:
    state = said["state"]
    if said.get("repository") == "waiting":
        state = "waiting for the repository"
    if said.get("unreadable"):
        state += f", {len(said['unreadable'])} places unreadable"
    if said.get("failure"):
        state += f": {said['failure']}"
    if said.get("finished"):
        state = "complete"
    sizes = [decimal(said[key]) if key in said else "" for key in ("hydrated", "total", "dirty", "rate")]
    if said.get("exports"):
        state += f", served ({sum(each['clients'] for each in said['exports'])} connected)"
    place = said.get("target") or said.get("buffer", "")
    return (said["name"], said["snapshot"], said["device"], place, *sizes[:3], f"{sizes[3]}/s", state)


def _row_of_export(said: dict[str, Any]) -> tuple[str, ...]:
    names = ", ".join(each["name"] for each in said["volumes"])
    state = f"{said['state']}: {said['failure']}" if said.get("failure") else said["state"]
    read = f"{decimal(said['bytes_read'])} read" if "bytes_read" in said else ""
    return (names, "", "", said["at"], read, "", "", "", state)


def _sentence(said: dict[str, Any]) -> str:
    next_step = f"mount {said['device']} /mnt; `blockferry status {said['name']}` says how far it is"
    if not said.get("target"):
        next_step = f"mount -o ro {said['device']} /mnt; it lasts until `blockferry detach {said['name']}`"
    where = f"{said['name']}: snapshot {said['snapshot']} is at {said['device']}, in {said['seconds']:.1f} s"
    return f"{where}\n  {next_step}"


def _wait_until_gone(name: str) -> None:
    """Wait until the process of a restore has let go of everything: it holds the lock to its end."""
    place: Path = client.socket_path(name)
    with contextlib.suppress(FileNotFoundError):
        service.wait_until_free(place)
