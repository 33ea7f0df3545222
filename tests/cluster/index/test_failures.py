"""A log index that fails: every call ends in time, says what is the matter, and forgets nothing that counts."""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from blockferry.cluster.index import LogIndex
from blockferry.errors import EpochClosedError, LogIndexError, ToolMissingError
from cluster_index_support import SOON, Place, eventually, numbers
from cluster_support import RedisServer, open_index, running_redis


def test_an_index_that_lost_its_memory_refuses_the_epoch_and_takes_another(place: Place, index: LogIndex) -> None:
    index.open_claims("e1")
    index.claim("e1", "one", numbers(1))
    index.put("a", {})
    place.lose_memory()
    with pytest.raises(EpochClosedError):
        index.claim("e1", "one", numbers(2))
    with pytest.raises(EpochClosedError):
        index.claimed("e1", "one")
    index.close_claims("e1")
    with pytest.raises(EpochClosedError):
        index.claimed("e1", "one")
    assert index.get("a") is None
    index.open_claims("e2")
    assert index.claim("e2", "two", numbers(1)).all()


def test_calls_end_in_time_when_whoever_has_the_index_stands_still(place: Place, index: LogIndex) -> None:
    index.open_claims("e")

    def ends_in_time(call: Callable[[], object]) -> None:
        started = time.monotonic()
        with pytest.raises(LogIndexError, match="did not answer within 2 seconds") as caught:
            call()
        assert time.monotonic() - started < SOON
        assert caught.value.remedy

    with place.stopped(), ThreadPoolExecutor() as pool:  # the first has a connection, the others have to make theirs
        calls = (lambda: index.claim("e", "one", numbers(1)), lambda: index.put("a", {}), lambda: index.push("q", b""))
        list(pool.map(ends_in_time, calls))
    assert index.put("a", {}, new=False)
    assert index.claim("e", "one", numbers(1)).all()


def test_an_index_that_was_closed_says_so(index: LogIndex) -> None:
    index.close()
    index.close()
    with pytest.raises(LogIndexError, match="was closed"):
        index.get("a")


def test_a_connection_that_the_server_hung_up_is_made_anew(redis_server: RedisServer) -> None:
    with contextlib.closing(open_index(redis_server.reference)) as index:
        index.put("a", {"n": 1})
        redis_server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert index.get("a") == {"n": 1}


def test_a_server_that_was_killed_is_an_error_at_once(redis_server: RedisServer) -> None:
    with contextlib.closing(open_index(redis_server.reference)) as index:
        redis_server.kill()
        started = time.monotonic()
        with pytest.raises(LogIndexError, match="cannot be reached") as caught:
            index.get("a")
        assert caught.value.remedy
        with pytest.raises(LogIndexError, match="cannot be reached"):
            open_index(redis_server.reference)
        assert time.monotonic() - started < 1


def test_claims_that_a_server_saved_and_read_again_count_as_lost(redis_server: RedisServer) -> None:
    with contextlib.closing(open_index(redis_server.reference)) as index:
        index.open_claims("e")
        index.claim("e", "one", numbers(1))
        redis_server.ask("SAVE")
        index.claim("e", "one", numbers(2))
        redis_server.restart()
        assert redis_server.ask("GET", "blockferry:epoch:e").startswith(b"open ")
        for call in (
            lambda: index.claim("e", "two", numbers(2)),
            lambda: index.claimed("e", "one"),
            lambda: index.open_claims("e"),
        ):
            with pytest.raises(EpochClosedError):
                call()
        index.remove("e")
        index.open_claims("e")
        assert index.claim("e", "two", numbers(2)).all()


def test_a_server_that_is_full_says_so_and_keeps_what_it_has() -> None:
    with (
        running_redis("maxmemory 2mb", "maxmemory-policy noeviction") as server,
        contextlib.closing(open_index(server.reference)) as index,
    ):
        index.open_claims("e")
        index.claim("e", "one", numbers(1))
        with pytest.raises(LogIndexError, match="is full") as caught:
            for number in range(100):
                index.put(f"fill/{number}", {"text": "x" * 50_000})
        assert "maxmemory" in caught.value.remedy
        server.ask("CONFIG", "SET", "maxmemory", "1500000")  # that the refused object needs none is no room
        for call in (lambda: index.claim("e", "one", numbers(9)), lambda: index.push("q", b"x" * 9)):
            with pytest.raises(LogIndexError, match="is full"):
                call()
        assert index.claimed("e", "one").tolist() == [1]
        index.remove("fill/")
        assert index.claim("e", "two", numbers(1, 9)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("maxmemory 50mb\nmaxmemory-policy allkeys-lru", "allkeys-lru"),
        ("replicaof 127.0.0.1 1", "is a replica"),
        ("cluster-enabled yes\nport 7999", "runs as cluster"),
    ],
)
def test_a_server_that_cannot_be_relied_on_is_refused(line: str, said: str) -> None:
    with running_redis(line) as server, pytest.raises(LogIndexError, match=said) as caught:
        open_index(server.reference)
    assert caught.value.remedy


def test_a_server_that_becomes_a_replica_takes_nothing(redis_server: RedisServer) -> None:
    with contextlib.closing(open_index(redis_server.reference)) as index:
        redis_server.ask("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(LogIndexError, match="is a replica"):
            index.put("a", {})


def test_a_server_that_cannot_save_to_its_disk_says_so() -> None:
    with (
        running_redis("dbfilename taken", "save 3600 1") as server,
        contextlib.closing(open_index(server.reference)) as index,
    ):
        (server.home / "taken" / "by a file").mkdir(parents=True)
        server.ask("BGSAVE")
        eventually(lambda: b"rdb_last_bgsave_status:err" in server.ask("INFO"))
        with pytest.raises(LogIndexError, match="cannot save") as caught:
            index.put("a", {})
        assert "save" in caught.value.remedy


def test_a_server_that_is_still_reading_what_it_saved_is_refused(redis_server: RedisServer) -> None:
    for number in range(200):
        redis_server.ask("SET", f"of-somebody-else/{number}", secrets.token_hex(700))
    redis_server.ask("SAVE")
    redis_server.settings += ("key-load-delay 8000", "loading-process-events-interval-bytes 1024")
    redis_server.kill()
    redis_server.start(wait=False)
    with pytest.raises(LogIndexError, match="still reading"):
        open_index(redis_server.reference)


def test_a_name_that_is_never_resolved_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(4) or [])
    started = time.monotonic()
    with pytest.raises(LogIndexError, match="did not answer within"):
        open_index("redis://index.example:6379/0")
    assert time.monotonic() - started < SOON


def test_without_the_package_redis_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "blockferry.cluster.redis_server", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ToolMissingError, match="not installed") as caught:
        open_index("redis://localhost/0")
    assert "blockferry[redis]" in caught.value.remedy
