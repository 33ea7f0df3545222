"""The worker's life: greeted, asked, abandoned."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

from borg.archive import Archive, Statistics
from borg.cache import Cache
from borg.helpers import Manifest
from borg.logger import setup_logging

import borg
from blockferry_borg.worker.archives import Connection, chunk_lists, comments
from blockferry_borg.worker.channel import Abandoned, Channel
from blockferry_borg.worker.problems import description
from blockferry_borg.worker.reading import read
from blockferry_borg.worker.storing import store


def main() -> int:
    """Answer requests until there are no more; return the exit status."""
    signal.signal(signal.SIGTERM, _abandon)
    channel = Channel(int(sys.argv[1]))
    _remember_passphrase()
    sys.argv = ["blockferry"]  # what borg notes in the archive as the command line
    setup_logging(level="warning", json=True)
    try:
        greeting = channel.take()
        channel.slot_size = greeting["slot"]
        connection = Connection(greeting["repository"], greeting["lock_wait"], greeting["umask"])
        channel.send(borg=borg.__version__)
        while True:
            request = channel.take()
            OPERATIONS[request["op"]](connection, channel, request)
    except Abandoned:
        return 0
    except Exception as error:
        with contextlib.suppress(Abandoned):
            channel.send(error=description(error))
        return 1


def list_archives(connection: Connection, channel: Channel, _request: dict[str, Any]) -> None:
    """Send name and comment of every archive that blockferry wrote, oldest first."""
    with connection.open() as repository:
        found = comments(repository, *connection.manifest(repository))
    channel.send(archives=[{"name": name, "comment": comment} for name, comment in found])


def delete(connection: Connection, channel: Channel, request: dict[str, Any]) -> None:
    """Delete archives in one transaction; those that are not there need no deleting."""
    with connection.open(exclusive=True) as repository:
        manifest, key = Manifest.load(repository, (Manifest.Operation.DELETE,))
        with Cache(repository, key, manifest, lock_wait=connection.lock_wait) as cache:
            names = [name for name in request["archives"] if name in manifest.archives]
            for name in names:
                _forget(Archive(repository, key, manifest, name, cache=cache), cache)
                del manifest.archives[name]
            if names:
                manifest.write()
                repository.commit(compact=False)
                cache.commit()
    channel.send(deleted=len(names))


def _forget(archive: Any, cache: Any) -> None:
    """Drop every reference that an archive holds: `Archive.delete`, without the whole chunk list in memory."""
    statistics = Statistics()
    for entries in chunk_lists(archive):
        if entries.field == "chunks":
            for chunk in entries:
                cache.chunk_decref(chunk.id, statistics, wait=False)
    for chunk_id in (*archive.metadata.items, archive.id):
        cache.chunk_decref(chunk_id, statistics, wait=False)
    while archive.repository.async_response(wait=True) is not None:
        pass


OPERATIONS = {"list": list_archives, "store": store, "open": read, "delete": delete}


def _abandon(_signal: int, _frame: object) -> None:
    """Turn SIGTERM into an exception, so that everything that was opened is closed."""
    raise Abandoned


def _remember_passphrase() -> None:
    """Read BORG_PASSPHRASE_FD, which can be read once, for all the times that borg wants it.

    Borg itself looks there last, and keeps BORG_PASSPHRASE from the programs that it starts.
    """
    descriptor = os.environ.pop("BORG_PASSPHRASE_FD", None)
    if descriptor is not None and not {"BORG_PASSPHRASE", "BORG_PASSCOMMAND"} & os.environ.keys():
        with os.fdopen(int(descriptor)) as secret:
            os.environ["BORG_PASSPHRASE"] = secret.read().rstrip("\n")
