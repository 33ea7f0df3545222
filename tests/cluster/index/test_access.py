"""Who is let into a Redis and how its address is written; no password is ever repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.errors import LogIndexError, UsageError
from cluster_index_support import numbers
from cluster_support import PASSWORD, RedisServer, open_index, running_redis


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
