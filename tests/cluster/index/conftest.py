"""Log indexes of each kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.cluster.index import LogIndex
from cluster_index_support import KINDS, Place, held_by_another
from cluster_support import PROGRAMS, RedisServer, open_index, running_redis


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        file = tmp_path / "index.db"

        def lose_memory() -> None:
            for name in tmp_path.glob("index.db*"):
                name.unlink()

        yield Place(f"sqlite://{file}", lose_memory, lambda: held_by_another(file))
        return
    with running_redis(program=request.param) as server:
        yield Place(server.reference, server.restart, server.stopped)


@pytest.fixture
def index(place: Place) -> Iterator[LogIndex]:
    with contextlib.closing(open_index(place.reference)) as opened:
        yield opened


@pytest.fixture(params=PROGRAMS or ["redis-server"])
def redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server that can be killed, stopped and started again; skipped with the remedy if there is none."""
    with running_redis(program=request.param) as server:
        yield server
