"""What every log index promises of keys, claims and queues: the same of Redis, Valkey and a file."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from blockferry.cluster import index as cluster_index
from blockferry.cluster.index import QUEUE_BYTES, LogIndex
from blockferry.errors import EpochClosedError, LogIndexError
from cluster_index_support import SOON, Place, eventually, numbers
from cluster_support import PROGRAMS, RedisServer

MIB = 1 << 20


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
