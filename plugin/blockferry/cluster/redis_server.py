"""Talking to a Redis server, or to a Valkey, within a bounded time.

Connections are made when they are needed and kept for whoever comes next; never two threads on one. Each is to one
process of the server, whose run_id is asked once: memory that was saved and read again is another life. Making one
takes several steps and a look at the DNS, which knows no time limit: that is done in a thread that can be left behind.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from blockferry.cluster.index import PATIENCE, closed
from blockferry.cluster.redis_address import Address
from blockferry.cluster.redis_failures import IS_LOADING, IS_REPLICA, reason
from blockferry.cluster.redis_scripts import Script
from blockferry.errors import LogIndexError

T = TypeVar("T")


class Link:
    """A connection, used by one thread at a time."""

    def __init__(self, connection: Any) -> None:
        """Take a connection that is made and say who is at the other end."""
        self._connection = connection
        facts = self.ask("INFO").decode("utf-8", "replace").splitlines()
        self.facts = dict(line.split(":", 1) for line in facts if ":" in line)
        self.life = self.facts.get("run_id", "")
        """One process of the server, from its start to its end."""

    def ask(self, *words: str | bytes | int) -> Any:
        """Send a command and return the answer, texts as bytes."""
        self._connection.send_command(*words)
        return self._connection.read_response()

    def run(self, script: Script, keys: Sequence[str], *arguments: str | bytes | int) -> Any:
        """Run a script, which is sent only to a server that does not have it."""
        try:
            return self.ask("EVALSHA", script.digest, len(keys), *keys, *arguments)
        except redis.exceptions.NoScriptError:
            return self.ask("EVAL", script.text, len(keys), *keys, *arguments)

    def alive(self) -> bool:
        """Tell whether the server has not hung up since the last answer."""
        try:
            return not self._connection.can_read(0)
        except redis.RedisError:
            return False

    def close(self) -> None:
        """Hang up."""
        self._connection.disconnect()


class Server:
    """A server and the connections to it."""

    def __init__(self, address: Address, password: str) -> None:
        """Connect; raise LogIndexError if that fails, or if the server cannot be relied on."""
        self.reference = address.reference
        self._address = address
        self._password = password
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._closed = False
        self.use(lambda _link: None)

    def use(self, work: Callable[[Link], T]) -> T:
        """Return what `work` does with a connection; whatever goes wrong within PATIENCE is a LogIndexError."""
        with self._named_errors():
            link = self._take()
            if link:
                return self._through(link, work)
            deadline = time.monotonic() + PATIENCE
            return _within(PATIENCE, lambda: self._through(self._connected(deadline), work))

    def close(self) -> None:
        """Hang up every connection, those in use when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()

    def _take(self) -> Link | None:
        """Return a connection that nobody uses, None if there is none."""
        while True:
            with self._lock:
                if self._closed:
                    raise closed(self.reference)
                link = self._idle.pop() if self._idle else None
            if link is None or link.alive():
                return link
            link.close()

    def _give_back(self, link: Link) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(link)
                return
        link.close()

    def _through(self, link: Link, work: Callable[[Link], T]) -> T:
        try:
            result = work(link)
        except redis.ResponseError:  # an answer: the connection is as good as before
            self._give_back(link)
            raise
        except BaseException:
            link.close()
            raise
        self._give_back(link)
        return result

    # -- connecting ----------------------------------------------------------------------------------------------------

    def _connected(self, deadline: float) -> Link:
        """Return a new connection; raise TimeoutError if nobody waits for it any more."""
        connection = self._new_connection()
        try:
            connection.connect()
            link = Link(connection)
            self._check(link)
        except BaseException:
            connection.disconnect()
            raise
        if time.monotonic() > deadline:
            self._give_back(link)
            raise TimeoutError
        return link

    def _new_connection(self) -> Any:
        address = self._address
        options: dict[str, Any] = {
            "db": address.database,
            "username": address.user or None,
            "password": self._password or None,
            "socket_timeout": PATIENCE,
            "socket_connect_timeout": PATIENCE,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        make: Any = redis.UnixDomainSocketConnection
        if address.path:
            return make(path=address.path, **options)
        options |= {"host": address.host, "port": address.port, "socket_keepalive": True}
        make = redis.SSLConnection if address.tls else redis.Connection
        if address.tls:
            options |= {"ssl_ca_certs": address.files.get("ca"), "ssl_cert_reqs": "required"}
            options |= {"ssl_certfile": address.files.get("cert"), "ssl_keyfile": address.files.get("key")}
            options |= {"ssl_check_hostname": True}
        return make(**options)

    def _check(self, link: Link) -> None:
        """Raise LogIndexError unless what is kept there stays there."""
        facts = link.facts
        if facts.get("loading", "0") != "0":
            raise self._failed(*IS_LOADING)
        if facts.get("role") != "master":
            raise self._failed(*IS_REPLICA)
        mode = facts.get("redis_mode") or facts.get("server_mode")  # Redis, Valkey
        if mode != "standalone":
            raise self._failed(f"runs as {mode}", "Use a server of its own, not a cluster.")
        if facts.get("maxmemory", "0") != "0" and facts.get("maxmemory_policy") != "noeviction":
            raise self._failed(
                f"throws away what it keeps when its memory is full (maxmemory-policy {facts.get('maxmemory_policy')})",
                "Set `maxmemory-policy noeviction` in redis.conf: a claim that is forgotten spoils a backup.",
            )
        if not link.life:
            raise self._failed("does not say its run_id", "Use Redis or Valkey itself, and let the user run INFO.")

    # -- errors --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn redis-py's errors into ours, with the way out and without the password."""
        try:
            yield
        except (redis.RedisError, OSError) as error:  # which TimeoutError is, too
            raise self._failed(*reason(error, self._password, tls=self._address.tls)) from None

    def _failed(self, what: str, remedy: str) -> LogIndexError:
        return LogIndexError(f"{self.reference}: the log index {what}", remedy=remedy)


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises; TimeoutError if it takes longer, and leave it to itself."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # whoever waits is told
            answer.set_exception(error)

    threading.Thread(target=run, name="log index", daemon=True).start()
    return answer.result(timeout=seconds)
