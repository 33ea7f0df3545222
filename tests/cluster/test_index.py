"""The log index: the same promises from Redis, Valkey and a file, also when they fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from blockferry.cluster import index as cluster_index
from blockferry.cluster import sqlite_index
from blockferry.cluster.index import PATIENCE, QUEUE_BYTES, LogIndex
from blockferry.errors import BlockferryError, EpochClosedError, LogIndexError, ToolMissingError, UsageError
from cluster_support import PASSWORD, PROGRAMS, RedisServer, open_index, running_redis

KINDS = [*(PROGRAMS or ["redis-server"]), "sqlite"]
MIB = 1 << 20
SOON = PATIENCE + 0.7
"""Seconds within which a call has ended, on a busy machine."""


@dataclasses.dataclass
class Place:
    """Where an index is, and what can be done to it from outside."""

    reference: str
    lose_memory: Callable[[], None]
    stopped: Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        file = tmp_path / "index.db"

        def lose_memory() -> None:
            for name in tmp_path.glob("index.db*"):
                name.unlink()

        yield Place(f"sqlite://{file}", lose_memory, lambda: _held_by_another(file))
        return
    with running_redis(program=request.param) as server:
        yield Place(server.reference, server.restart, server.stopped)


@pytest.fixture
def index(place: Place) -> Iterator[LogIndex]:
    with contextlib.closing(open_index(place.reference)) as opened:
        yield opened


@contextlib.contextmanager
def _held_by_another(file: Path) -> Iterator[None]:
    """Have a process that was stopped in the middle of a transaction."""
    script = (
        f"import sqlite3, time; c = sqlite3.connect({str(file)!r}); c.execute('BEGIN IMMEDIATE'); print(flush=True)"
    )
    holder = subprocess.Popen([sys.executable, "-c", f"{script}; time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        holder.stdout.readline()
        yield
    finally:
        holder.kill()
        holder.communicate()


def numbers(*chunks: int) -> np.ndarray:
    return np.array(chunks, np.int64)


def eventually(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_what_is_put_is_got_until_it_is_removed(index: LogIndex) -> None:
    assert index.get("a/1") is None
    assert index.put("a/1", {"state": "held", "at": [1, 2.5, None, "ö"]})
    assert index.get("a/1") == {"state": "held", "at": [1, 2.5, None, "ö"]}
    assert index.put("a/1", {})
    assert index.get("a/1") == {}
    index.remove("a/")
    assert index.get("a/1") is None


def test_what_has_to_be_new_does_not_replace(index: LogIndex) -> None:
    assert index.put("lock", {"host": "one"}, new=True)
    assert not index.put("lock", {"host": "two"}, new=True)
    assert index.get("lock") == {"host": "one"}


def test_a_key_that_lasts_vanishes_by_itself_and_can_be_new_again(index: LogIndex) -> None:
    index.put("beat", {"n": 1}, lasts=0.3)
    index.put("stays", {"n": 2}, lasts=60)
    assert index.get("beat") == {"n": 1}
    assert set(index.list("")) == {"beat", "stays"}
    assert not index.put("beat", {"n": 3}, new=True)
    eventually(lambda: index.get("beat") is None)
    assert set(index.list("")) == {"stays"}
    assert index.put("beat", {"n": 3}, new=True)


def test_a_key_that_is_put_again_lasts_as_long_as_it_was_put_last(index: LogIndex) -> None:
    index.put("beat", {}, lasts=0.2)
    index.put("beat", {})
    time.sleep(0.3)
    assert index.get("beat") == {}


def test_a_list_has_the_keys_that_begin_with_the_prefix(index: LogIndex) -> None:
    for key in ("v/1", "v/10", "v/1/x", "v/2", "w", "v", "v%1", "v_", "V/1", "v/ü", "v/\uffff", "v/🦀"):
        index.put(key, {"key": key})
    assert set(index.list("v/1")) == {"v/1", "v/10", "v/1/x"}
    assert set(index.list("v/")) == {"v/1", "v/10", "v/1/x", "v/2", "v/ü", "v/\uffff", "v/🦀"}
    assert set(index.list("v%")) == {"v%1"}
    assert index.list("none") == {}
    assert all(value == {"key": key} for key, value in index.list("").items())


def test_what_another_program_wrote_is_an_error(place: Place, index: LogIndex) -> None:
    index.put("odd", {})
    if place.reference.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(place.reference.removeprefix("sqlite://"))) as other, other:
            other.execute("UPDATE keys SET value = '[1]'")
    else:
        _ask(place, "SET", "blockferry:key:odd", "[1]")
    for read in (index.get, index.list):
        with pytest.raises(LogIndexError, match="not written by blockferry"):
            read("odd")


def _ask(place: Place, *words: str) -> object:
    server = RedisServer(Path(place.reference.removeprefix("redis+unix://")).parent, PROGRAMS[0])
    return server.ask(*words)


@pytest.mark.parametrize("name", ["a\0b"])
def test_a_name_with_a_nul_is_refused(index: LogIndex, name: str) -> None:
    for call in (
        lambda: index.put(name, {}),
        lambda: index.list(name),
        lambda: index.remove(name),
        lambda: index.claim("e", name, numbers(1)),
        lambda: index.push(name, b""),
        lambda: index.pop(name, 0),
    ):
        index.open_claims("e")
        with pytest.raises(ValueError, match="NUL"):
            call()


# -- claims ------------------------------------------------------------------------------------------------------------


def test_the_first_claim_of_a_chunk_wins_and_stays_its_own(index: LogIndex) -> None:
    index.open_claims("e")
    assert index.claim("e", "one", numbers(5, 1, 7)).tolist() == [True, True, True]
    assert index.claim("e", "two", numbers(7, 8, 1, 0)).tolist() == [False, True, False, True]
    assert index.claim("e", "one", numbers(0, 1, 8, 9, 9)).tolist() == [False, True, False, True, True]
    assert index.claimed("e", "one").tolist() == [1, 5, 7, 9]
    assert index.claimed("e", "two").tolist() == [0, 8]
    assert index.claimed("e", "three").tolist() == []
    assert index.claimed("e", "one").dtype == np.int64


def test_no_chunks_are_claimed_by_a_claim_of_none(index: LogIndex) -> None:
    index.open_claims("e")
    assert index.claim("e", "one", numbers()).tolist() == []
    assert index.claim("e", "one", numbers()).dtype == np.bool_
    assert index.claimed("e", "one").tolist() == []


def test_chunks_of_different_epochs_and_hosts_with_alike_names_are_apart(index: LogIndex) -> None:
    for epoch in ("e", "e/h", "e:h"):
        index.open_claims(epoch)
    assert index.claim("e", "h:x", numbers(1)).all()
    assert index.claim("e:h", "x", numbers(1)).all()
    assert index.claim("e/h", "x", numbers(1)).all()


def test_the_highest_chunk_of_a_petabyte_can_be_claimed_and_one_out_of_range_cannot(index: LogIndex) -> None:
    index.open_claims("e")
    assert index.claim("e", "one", numbers(1 << 24, (1 << 24) + 1)).all()
    assert index.claimed("e", "one").tolist() == [1 << 24, (1 << 24) + 1]
    for chunk in (-1, cluster_index.CHUNKS):
        with pytest.raises(ValueError, match="out of range"):
            index.claim("e", "one", numbers(0, chunk))
    assert index.claimed("e", "one").tolist() == [1 << 24, (1 << 24) + 1]


def test_claims_are_refused_before_they_are_opened_and_after_they_are_closed(index: LogIndex) -> None:
    with pytest.raises(EpochClosedError):
        index.claim("e", "one", numbers(1))
    index.close_claims("e")  # nothing to close
    with pytest.raises(EpochClosedError):
        index.claimed("e", "one")
    index.open_claims("e")
    assert index.claim("e", "one", numbers(1)).all()
    index.close_claims("e")
    index.close_claims("e")
    with pytest.raises(EpochClosedError) as caught:
        index.claim("e", "two", numbers(1, 2))
    assert caught.value.remedy
    assert index.claimed("e", "one").tolist() == [1]
    assert index.claimed("e", "two").tolist() == []


def test_removing_an_epoch_forgets_its_claims(index: LogIndex) -> None:
    for epoch in ("v/e1", "v/e2", "w/e1"):
        index.open_claims(epoch)
        index.claim(epoch, "one", numbers(1, 2, 3))
    index.remove("v/e1")
    for call in (index.claimed, lambda epoch, host: index.claim(epoch, host, numbers(1))):
        with pytest.raises(EpochClosedError):
            call("v/e1", "one")
    assert index.claimed("v/e2", "one").tolist() == [1, 2, 3]
    index.open_claims("v/e1")
    assert index.claim("v/e1", "two", numbers(1)).all()
    index.remove("")
    with pytest.raises(EpochClosedError):
        index.claimed("w/e1", "one")


RACER = """
import json, sys, random
import numpy as np
from blockferry.cluster import redis_index, sqlite_index
reference, host = sys.argv[1:]
find = redis_index if reference.startswith("redis") else sqlite_index
index = find.blockferry_log_index(reference)
print(flush=True); sys.stdin.readline()
chance, won = random.Random(host), set()
for _ in range(150):
    first = chance.randrange(2000)
    chunks = np.array(chance.sample(range(first, first + 64), 40), np.int64)
    won.update(chunks[index.claim("e", host, chunks)].tolist())
for first in range(0, 2064, 129):
    chunks = np.arange(first, first + 129)
    won.update(chunks[index.claim("e", host, chunks)].tolist())
print(json.dumps(sorted(won)))
"""


def test_of_chunks_that_four_processes_race_for_each_has_one_winner(place: Place, index: LogIndex) -> None:
    index.open_claims("e")
    hosts = [f"host{number}" for number in range(4)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, place.reference, host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    ]
    for racer in racers:
        assert racer.stdout.readline() == "\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = {host: json.loads(racer.communicate(timeout=60)[0]) for host, racer in zip(hosts, racers, strict=True)}
    assert sorted(chunk for chunks in won.values() for chunk in chunks) == list(range(2064))
    assert sum(bool(chunks) for chunks in won.values()) > 1, "nobody raced"
    assert {host: index.claimed("e", host).tolist() for host in hosts} == won


def test_one_index_serves_several_threads(index: LogIndex) -> None:
    index.open_claims("e")

    def work(number: int) -> int:
        index.put(f"thread/{number}", {"n": number})
        return int(index.claim("e", f"h{number}", np.arange(500)).sum())

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(work, range(30)))
    assert sum(won) == 500
    assert len(index.list("thread/")) == 30


# -- queues ------------------------------------------------------------------------------------------------------------


def test_pieces_are_popped_in_their_order_each_once(index: LogIndex) -> None:
    pieces = [b"", b"\0\xff", bytes(range(256)) * 500, b"last"]
    assert all(index.push("q", piece) for piece in pieces)
    index.push("other", b"x")
    assert [index.pop("q", 0) for _ in pieces] == pieces
    assert index.pop("q", 0) is None
    index.remove("oth")
    assert index.pop("other", 0) is None


def test_a_queue_that_is_full_takes_a_piece_when_one_is_gone(index: LogIndex) -> None:
    piece = bytes(MIB)
    for _ in range(QUEUE_BYTES // MIB):
        assert index.push("q", piece)
    assert not index.push("q", b"x")
    assert index.push("another", b"x")
    assert index.pop("q", 0) == piece
    assert index.push("q", b"x")
    index.remove("q")
    assert index.push("q", piece)


def test_pop_waits_for_a_piece_and_no_longer(index: LogIndex) -> None:
    threading.Timer(0.4, index.push, ("q", b"late")).start()
    started = time.monotonic()
    assert index.pop("q", 30) == b"late"
    assert 0.3 < time.monotonic() - started < 2
    started = time.monotonic()
    assert index.pop("q", 1.3) is None
    assert 1.2 < time.monotonic() - started < 1.3 + SOON


def test_of_several_that_pop_each_gets_its_pieces(index: LogIndex) -> None:
    pieces = [f"{number}".encode() for number in range(60)]

    def take(_number: int) -> list[bytes]:
        return list(iter(lambda: index.pop("q", 1.0), None))

    with ThreadPoolExecutor(4) as pool:
        taken = pool.map(take, range(3))
        for piece in pieces:
            index.push("q", piece)
        assert sorted(each for some in taken for each in some) == sorted(pieces)


# -- failures ----------------------------------------------------------------------------------------------------------


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


# -- credentials -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    """A server with TLS, and the user that the page on the shared index describes."""
    with running_redis(tls=True) as server:
        yield server


@pytest.mark.parametrize("how", ["command", "variable"])
def test_the_user_of_the_page_may_do_all_that_is_needed_over_tls(
    guarded: RedisServer, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "command":
        (tmp_path / "a file").write_text(f"{PASSWORD}\n")
        monkeypatch.setenv("BLOCKFERRY_INDEX_PASSWORD_COMMAND", f"cat '{tmp_path}/a file'")
        monkeypatch.setenv("BLOCKFERRY_INDEX_PASSWORD", "of somebody else")
    else:
        monkeypatch.setenv("BLOCKFERRY_INDEX_PASSWORD", PASSWORD)
    with contextlib.closing(open_index(guarded.tls_reference())) as index:
        assert index.reference == f"rediss://localhost:{guarded.port}/0"
        assert index.put("a", {"n": 1}, lasts=20, new=True)
        assert index.get("a") == {"n": 1}
        assert index.list("") == {"a": {"n": 1}}
        index.open_claims("e")
        index.claim("e", "one", numbers(1))
        assert index.claim("e", "one", numbers(1, 2)).all()
        index.close_claims("e")
        assert index.claimed("e", "one").tolist() == [1, 2]
        assert index.push("q", b"x")
        assert [index.pop("q", 0), index.pop("q", 0.05)] == [b"x", None]
        index.remove("")
        assert guarded.ask("KEYS", "*") == []


@pytest.mark.parametrize(
    ("options", "password", "said"),
    [
        ({}, "wrong", "user name or the password"),
        ({}, "", "user name or the password"),
        ({"user": "nobody@"}, PASSWORD, "user name or the password"),
        ({"certificate": ""}, PASSWORD, "cert="),
        ({"authority": "other"}, PASSWORD, "cannot be trusted"),
    ],
)
def test_whoever_is_not_let_in_learns_why_and_no_password(
    guarded: RedisServer, options: dict[str, str], password: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_INDEX_PASSWORD", password)
    with pytest.raises(LogIndexError, match=said) as caught:
        open_index(guarded.tls_reference(**options))
    assert caught.value.remedy
    assert caught.value.__suppress_context__
    for secret in filter(None, (password, PASSWORD)):
        assert secret not in str(caught.value).replace("the password is wrong", "")


def test_a_user_who_may_not_do_it_is_told_what_is_missing(
    guarded: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded.ask("ACL", "SETUSER", "short", "on", ">pw", "~blockferry:*", "-@all", "+info", "+get")
    monkeypatch.setenv("BLOCKFERRY_INDEX_PASSWORD", "pw")
    with contextlib.closing(open_index(guarded.tls_reference(user="short@"))) as index:
        assert index.get("a") is None
        with pytest.raises(LogIndexError, match="evalsha"):
            index.put("a", {})


def test_another_name_than_the_one_in_the_certificate_is_refused(
    guarded: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_INDEX_PASSWORD", PASSWORD)
    with pytest.raises(LogIndexError, match="cannot be trusted"):
        open_index(guarded.tls_reference().replace("localhost", "127.0.0.1"))


@pytest.mark.parametrize(
    "reference",
    [
        "redis://user:s3cret@localhost/0",
        "redis://:s3cret@localhost/0",
        "rediss://user:s3cr@et@localhost/0",
        "redis+unix://user:s3cret@/run/redis.sock",
        "redis://user:s3cr/et@localhost/0",
        "http://user:s3cr/et@localhost/0",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_repeated(reference: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_index(reference)
    assert "s3cr" not in str(caught.value)
    assert "et@" not in str(caught.value)


@pytest.mark.parametrize(
    "command", ["sh -c 'echo s3cret; echo s3cret >&2; exit 3'", "no-such-program s3cret", "'unclosed s3cret"]
)
def test_a_password_command_that_fails_is_an_error_without_its_words(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_INDEX_PASSWORD_COMMAND", command)
    with pytest.raises(LogIndexError, match="BLOCKFERRY_INDEX_PASSWORD_COMMAND") as caught:
        open_index("redis://localhost/0")
    assert "s3cret" not in str(caught.value)


# -- references --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "etcd://localhost", "localhost:6379", "redis:", "redis://", "redis://host:port/0", "redis://host/x",
        "redis://host/0?timeout=5", "redis://host/0?ca=/x", "redis://host/-1", "redis+unix://host/path", "redis+unix:///",
        "redis+unix:///x?db=y", "rediss://host/0?ca=/no/such/file", "rediss://host/0?cert=/dev/null", "sqlite://index.db",
        "sqlite:///", "sqlite:///tmp/",
    ],
)  # fmt: skip
def test_a_reference_that_names_no_index_says_what_to_write(reference: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_index(reference)
    assert caught.value.remedy


def test_indexes_in_two_databases_are_apart(redis_server: RedisServer) -> None:
    with (
        contextlib.closing(open_index(redis_server.reference)) as first,
        contextlib.closing(open_index(f"{redis_server.reference}?db=3")) as second,
    ):
        first.put("a", {})
        assert second.get("a") is None
        assert second.reference == f"{redis_server.reference}?db=3"


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_for_its_owner_alone_and_one_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "index.db"
    with contextlib.closing(open_index(f"sqlite://{file}")) as index:
        index.put("a", {})
        assert {name.stat().st_mode & 0o777 for name in tmp_path.glob("index.db*")} == {0o600}
    file.chmod(0o640)
    with pytest.raises(LogIndexError, match="by others") as caught:
        open_index(f"sqlite://{file}")
    assert "chmod" in caught.value.remedy


def test_what_is_in_a_file_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    for expected in (None, {"n": 1}):
        with contextlib.closing(open_index(f"sqlite://{tmp_path}/index.db")) as index:
            assert index.get("a") == expected
            index.put("a", {"n": 1})


def test_an_epoch_that_was_opened_before_the_host_started_or_on_another_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = f"sqlite://{tmp_path}/index.db"
    with contextlib.closing(open_index(reference)) as index:
        index.open_claims("e")
        index.claim("e", "one", numbers(1))
    (tmp_path / "boot_id").write_text("another boot\n")
    monkeypatch.setattr(sqlite_index, "_BOOT", tmp_path / "boot_id")
    with contextlib.closing(open_index(reference)) as index:
        for call in (
            lambda: index.claim("e", "two", numbers(1)),
            lambda: index.claimed("e", "one"),
            lambda: index.open_claims("e"),
        ):
            with pytest.raises(EpochClosedError):
                call()


@pytest.mark.parametrize("what", ["text", "database", "directory", "link", "nowhere"])
def test_what_is_no_index_of_ours_is_refused_and_left_as_it_is(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if what == "text":
        path.write_bytes(b"no database, but long enough to be looked at as one\n" * 100)
        path.chmod(0o600)
    elif what == "database":
        with contextlib.closing(sqlite3.connect(path)) as other, other:
            other.execute("CREATE TABLE things (name TEXT)")
        path.chmod(0o600)
    elif what == "directory":
        path.mkdir()
    elif what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path = tmp_path / "none" / "file"
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(LogIndexError) as caught:
        open_index(f"sqlite://{path}")
    assert caught.value.remedy
    assert not (tmp_path / "elsewhere").exists()
    assert before == (path.read_bytes() if path.is_file() else b"")


@pytest.mark.root
def test_a_file_whose_disk_is_full_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], check=True)
    try:
        with contextlib.closing(open_index(f"sqlite://{tmp_path}/index.db")) as index:
            index.open_claims("e")
            index.claim("e", "one", numbers(1))
            with pytest.raises(LogIndexError, match="is full"):
                for _ in range(100):
                    index.push("q", bytes(50_000))
            with pytest.raises(LogIndexError, match="is full"):
                index.claim("e", "one", np.arange(100_000))
            assert index.claimed("e", "one").tolist() == [1]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# -- any history -------------------------------------------------------------------------------------------------------

names = st.sampled_from(["", "a", "ab", "a/b", "b", "é"])
chunks = st.lists(st.integers(0, 40), max_size=12)
hosts = st.sampled_from(["one", "two"])


class History(RuleBasedStateMachine):
    """The index beside what it is to be, as dictionaries."""

    index: LogIndex

    @initialize()
    def begin(self) -> None:
        self.index.remove("")
        self.keys: dict[str, dict[str, int]] = {}
        self.claims: dict[str, dict[int, str]] = {}
        self.open: set[str] = set()
        self.queues: dict[str, list[bytes]] = {}

    @rule(key=names, number=st.integers(), new=st.booleans())
    def put(self, key: str, number: int, new: bool) -> None:
        taken = self.index.put(key, {"n": number}, new=new)
        assert taken == (not new or key not in self.keys)
        if taken:
            self.keys[key] = {"n": number}

    @rule(key=names)
    def get(self, key: str) -> None:
        assert self.index.get(key) == self.keys.get(key)

    @rule(prefix=names)
    def list(self, prefix: str) -> None:
        assert self.index.list(prefix) == {key: each for key, each in self.keys.items() if key.startswith(prefix)}

    @rule(prefix=names)
    def remove(self, prefix: str) -> None:
        self.index.remove(prefix)
        for kept in (self.keys, self.claims, self.queues):
            for name in [name for name in kept if name.startswith(prefix)]:
                del kept[name]
        self.open = {epoch for epoch in self.open if not epoch.startswith(prefix)}

    @rule(epoch=names)
    def open_claims(self, epoch: str) -> None:
        self.index.open_claims(epoch)
        self.claims.setdefault(epoch, {})
        self.open.add(epoch)

    @rule(epoch=names)
    def close_claims(self, epoch: str) -> None:
        self.index.close_claims(epoch)
        self.open.discard(epoch)

    @rule(epoch=names, host=hosts, wanted=chunks)
    def claim(self, epoch: str, host: str, wanted: list[int]) -> None:
        if epoch not in self.open:
            with pytest.raises(EpochClosedError):
                self.index.claim(epoch, host, numbers(*wanted))
            return
        won = self.index.claim(epoch, host, numbers(*wanted)).tolist()
        assert won == [self.claims[epoch].setdefault(chunk, host) == host for chunk in wanted]

    @rule(epoch=names, host=hosts)
    def claimed(self, epoch: str, host: str) -> None:
        if epoch not in self.claims:
            with pytest.raises(EpochClosedError):
                self.index.claimed(epoch, host)
            return
        expected = sorted(chunk for chunk, winner in self.claims[epoch].items() if winner == host)
        assert self.index.claimed(epoch, host).tolist() == expected

    @rule(queue=names, piece=st.binary(max_size=9))
    def push(self, queue: str, piece: bytes) -> None:
        assert self.index.push(queue, piece)
        self.queues.setdefault(queue, []).append(piece)

    @rule(queue=names)
    def pop(self, queue: str) -> None:
        pieces = self.queues.get(queue, [])
        assert self.index.pop(queue, 0) == (pieces.pop(0) if pieces else None)


def test_after_any_history_an_index_holds_what_dictionaries_would(index: LogIndex) -> None:
    machine = type("HistoryOfOne", (History,), {"index": index})
    few = settings(
        max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(machine, settings=few)


def test_every_error_is_one_that_users_are_shown() -> None:
    assert issubclass(EpochClosedError, LogIndexError)
    assert issubclass(LogIndexError, BlockferryError)
