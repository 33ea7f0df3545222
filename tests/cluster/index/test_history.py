"""After any history an index holds what dictionaries would."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from blockferry.cluster.index import LogIndex
from blockferry.errors import BlockferryError, EpochClosedError, LogIndexError
from cluster_index_support import numbers

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
