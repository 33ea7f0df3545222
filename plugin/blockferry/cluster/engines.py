"""Who copies the shares of a volume: this process, processes beside it, or other hosts by way of Dask."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import ModuleType
from typing import Any, Protocol

from blockferry.cluster import copying
from blockferry.cluster.copying import Job
from blockferry.errors import BlockferryError, ToolMissingError, UsageError
from blockferry.repository import Advance, Repository
from blockferry.snapshot import Stored

Check = Callable[[], None]
"""Raises when there is no sense in going on."""

_LOOK_EVERY = 0.5


class Engine(Protocol):
    """Copies shares, each wherever there is somebody to do it."""

    shares: int
    """How many shares there are to be: as many as copy at a time."""

    def copy(self, jobs: Sequence[Job], repository: Repository, check: Check, advance: Advance) -> Iterator[Stored]:
        """Yield what was stored, as shares are done. Raise BlockferryError if one cannot be; what was yielded stays."""


class InProcess:
    """Copies all by itself, with the repository that is open."""

    shares = 1

    def copy(self, jobs: Sequence[Job], repository: Repository, check: Check, advance: Advance) -> Iterator[Stored]:
        """Copy one share after the other."""
        for job in jobs:
            yield copying.copy_into(repository, job, advance, check)


class Processes:
    """Copies by several processes of this host at a time, each with a repository of its own."""

    def __init__(self, count: int) -> None:
        self.shares = count

    def copy(self, jobs: Sequence[Job], repository: Repository, check: Check, advance: Advance) -> Iterator[Stored]:
        """Copy as many shares at a time as the repository takes writers."""
        at_once = self.shares if "concurrent" in repository.capabilities else 1
        with ProcessPoolExecutor(at_once, get_context("spawn"), _tell_paths, (dict(copying.PATHS),)) as pool:
            try:
                yield from _drain(lambda job: pool.submit(copying.copy_share, job), jobs, at_once, check, advance)
            finally:
                pool.shutdown(cancel_futures=True)


class Dask:
    """Copies by the workers of a Dask scheduler that said that they have the volume (`cluster worker`)."""

    def __init__(self, address: str, volume: str) -> None:
        """Connect; raise UsageError if nobody there has the volume, ToolMissingError without the package."""
        distributed = _distributed()
        try:
            self._client = distributed.Client(address, timeout="10s", set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise UsageError(
                f"{address}: no Dask scheduler answers there: {error}", remedy="Write dask://tcp://HOST:8786"
            ) from None
        self._resource = {f"volume:{volume}": 1}
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        self.shares = sum(1 for each in workers if f"volume:{volume}" in each["resources"])
        if not self.shares:
            self.close()
            raise UsageError(
                f"{address}: no worker has the volume {volume}",
                remedy=f"On the hosts: blockferry cluster worker {address} --volume {volume}=PATH",
            )

    def copy(self, jobs: Sequence[Job], repository: Repository, check: Check, advance: Advance) -> Iterator[Stored]:
        """Copy by as many workers as the repository takes writers; a dead one's share Dask gives to others."""
        at_once = self.shares if "concurrent" in repository.capabilities else 1
        submit = self._client.get_executor(resources=self._resource, pure=False, retries=0).submit
        yield from _drain(lambda job: submit(copying.copy_share, job), jobs, at_once, check, advance)

    def close(self) -> None:
        """Leave the scheduler."""
        with contextlib.suppress(OSError, TimeoutError):
            self._client.close(timeout=5)


def work_for(address: str, host: str) -> None:
    """Copy shares of what `copying.PATHS` names, as a Dask scheduler hands them out, until SIGTERM or SIGINT.

    No nanny: a worker that dies takes nothing along that it had said it did, and its service starts it anew.
    """
    distributed = _distributed()

    async def work(scratch: str) -> None:
        resources = {f"volume:{name}": 1 for name in copying.PATHS}
        # Where nobody but those who reach the scheduler can have it run what they like.
        own = distributed.utils.get_ip(distributed.comm.get_address_host(address))
        worker = distributed.Worker(
            address, host=own, name=host, nthreads=1, resources=resources, local_directory=scratch, dashboard=False
        )
        async with worker:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, asyncio.ensure_future, worker.close())
            await worker.finished()

    with tempfile.TemporaryDirectory(prefix="blockferry-worker-") as scratch:
        try:
            asyncio.run(work(scratch))
        except (OSError, TimeoutError, ValueError) as error:
            raise UsageError(
                f"{address}: no Dask scheduler answers there: {error}", remedy="Write tcp://HOST:8786"
            ) from None


def _distributed() -> ModuleType:
    """Return Dask's package; ToolMissingError without it."""
    try:
        return importlib.import_module("distributed")
    except ImportError:
        raise ToolMissingError(
            "the package distributed is not installed", remedy="Install the extra: pip install 'blockferry[dask]'"
        ) from None


def _drain(
    submit: Callable[[Job], Future[dict[str, Any]]],
    jobs: Sequence[Job],
    at_once: int,
    check: Check,
    advance: Advance,
) -> Iterator[Stored]:
    """Have jobs done, so many at a time; yield what they come to."""
    todo = list(jobs)
    running: dict[Future[dict[str, Any]], Job] = {}
    try:
        while todo or running:
            while todo and len(running) < at_once:
                job = todo.pop(0)
                running[submit(job)] = job
            done, _rest = wait(running, timeout=_LOOK_EVERY, return_when=FIRST_COMPLETED)
            check()
            for each in done:
                job = running.pop(each)
                yield _outcome(each)
                advance(job.bytes)
    finally:
        for each in running:
            each.cancel()


def _outcome(done: Future[dict[str, Any]]) -> Stored:
    """Return what a share came to; raise BlockferryError, in words, if it failed."""
    try:
        return copying.stored_of(done.result())
    except BlockferryError:
        raise
    except BrokenProcessPool:
        raise BlockferryError("a process that copied a share was killed", remedy="Is there enough memory?") from None
    except Exception as error:  # whatever another host's Python raised
        raise BlockferryError(f"a share could not be copied: {error}") from None


def _tell_paths(paths: dict[str, str]) -> None:
    copying.PATHS.update(paths)
