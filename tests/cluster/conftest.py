"""What tests of shared volumes have in common: a volume, and the servers that its hosts reach."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster_hosts_support import MIB
from cluster_support import RedisServer, running_redis
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
