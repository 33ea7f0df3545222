"""The servers that the hosts of a shared volume have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster_support import PROGRAMS, RedisServer, running_redis


@pytest.fixture(params=PROGRAMS or ["redis-server"])
def redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server that can be killed, stopped and started again; skipped with the remedy if there is none."""
    with running_redis(program=request.param) as server:
        yield server
