"""What tests of shared volumes have in common: a volume, and the servers that its hosts reach."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.cluster.index import LogIndex
from cluster_hosts_support import MIB, SharingHost, sharing
from cluster_support import RedisServer, open_index, running_redis
from conftest import Attach


@pytest.fixture
def volume(request: pytest.FixtureRequest, tmp_path: Path, attach: Attach) -> str:
    """A device that is full of noise, of as many bytes as the module's SIZE says."""
    image = tmp_path / "volume.img"
    image.write_bytes(random.Random(5).randbytes(getattr(request.module, "SIZE", 24 * MIB)))
    return attach(image)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A server that can be killed, stopped and started again; skipped with the remedy if there is none."""
    with running_redis() as server:
        yield server


@pytest.fixture
def index(redis: RedisServer) -> Iterator[LogIndex]:
    """The index in that server, as one of the hosts sees it."""
    with contextlib.closing(open_index(redis.reference)) as opened:
        yield opened


@pytest.fixture
def hosts(tmp_path: Path, volume: str, redis: RedisServer) -> Iterator[list[SharingHost]]:
    """Two hosts that share the volume; their guards are not started."""
    with sharing(2, tmp_path, volume, redis.reference) as made:
        yield made
