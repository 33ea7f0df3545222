"""`blockferry serve`: a hot restore's disk over NBD, for other hosts."""

from __future__ import annotations

import dataclasses
import os

import click

from blockferry.cli import completion as complete
from blockferry.cli.context import Context, json_option
from blockferry.errors import UsageError
from blockferry.hot import attachment, client
from blockferry.hot.export import Wish, checked


@click.command()
@click.argument("name", shell_complete=complete.restores)
@click.option("--socket", "path", metavar="PATH", help="Listen at a Unix socket there; else at a private one of ours.")
@click.option("--listen", metavar="HOST:PORT", help="Listen at an address of this host; port 0: any that is free.")
@click.option(
    "--tls",
    metavar="DIR",
    help="Certificates: ca-cert.pem, by which clients are checked, server-cert.pem, server-key.pem; or a file of"
    " pre-shared keys.",
)
@click.option("--insecure", is_flag=True, help="Without TLS: whoever reaches the address can read the disk.")
@click.option("--write", is_flag=True, help="Let clients write. Two writers need a cluster filesystem.")
@click.option("--stop", is_flag=True, help="End all that serves NAME, whoever is connected.")
@json_option
@click.pass_obj
def serve(
    context: Context,
    name: str,
    path: str | None,
    listen: str | None,
    tls: str | None,
    insecure: bool,
    write: bool,
    stop: bool,
) -> None:
    """Serve the disk of the restore NAME over NBD, read-only, until it is detached.

    Each block is fetched from the repository once, whoever reads it. A restore can be served at several places; serving
    it again at the same place ends what serves it there.

    \b
    Examples:
      blockferry serve sdb
      blockferry serve sdb --listen 10.0.0.5:10809 --tls /etc/blockferry/tls
    """
    attachment.directory_of(name)
    if stop:
        if path or listen or tls or insecure or write:
            raise UsageError("--stop ends all that serves it", remedy="Leave out the other options.")
        stopped = client.ask(name, {"do": "stop serving"})["stopped"]
        told = ", ".join(stopped) or "nowhere"
        context.output.result({"version": 1, "name": name, "stopped": stopped}, lambda: f"{name}: was served at {told}")
        return
    wish = checked(_wish(name, path, listen, tls, writable=write), insecure=insecure)
    said = client.ask(name, {"do": "serve", "wish": dataclasses.asdict(wish)})
    result = {"version": 1, "name": name, "uri": said["uri"], "writable": said["writable"]}
    may = "read and written" if write else "read"
    context.output.result(result, lambda: f"{name}: can be {may} at {said['uri']}")


def _wish(name: str, path: str | None, listen: str | None, tls: str | None, *, writable: bool) -> Wish:
    """Return what the options say."""
    if path and listen:
        raise UsageError("--socket and --listen exclude each other", remedy="Serve it twice.")
    keys = os.path.realpath(tls) if tls else ""
    if not listen:
        return Wish(socket=os.path.realpath(path or client.nbd_socket_path(name)), tls=keys, writable=writable)
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--listen {listen}: no port", remedy="Say HOST:PORT, for example 10.0.0.5:10809.")
    return Wish(host=host.removeprefix("[").removesuffix("]"), port=int(port), tls=keys, writable=writable)
