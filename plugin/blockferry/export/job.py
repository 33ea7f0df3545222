"""Whose export it is: the processes of the job that asked for it, so that no other one ends it or reads on from it.

A job's hook is a descendant of the job. Of its ancestors those belong to it that are of its session (credentials(7)):
what systemd or cron starts is a session of its own. The shell of a terminal is not one of them: it outlives its jobs.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

Process = tuple[int, int]
"""A process's number, and when it began, in clock ticks since boot: numbers are used again."""


def processes() -> list[Process]:
    """Return those ancestors of this process that are the job which it is a hook of; none if a person typed it."""
    session, found = os.getsid(0), []
    number = os.getppid()
    while number > 1 and (facts := _facts(number)):
        parent, its_session, terminal, began = facts
        if its_session != session or (number == session and terminal):
            break
        found.append((number, began))
        number = parent
    return found


def alive(job: Collection[Process]) -> bool:
    """Tell whether any of the processes still runs."""
    return any((facts := _facts(number)) is not None and facts[3] == began for number, began in job)


def is_ours(job: Collection[Process]) -> bool:
    """Tell whether this process belongs to the same job."""
    return bool(set(job) & set(processes()))


def _facts(number: int) -> tuple[int, int, int, int] | None:
    """Return parent, session, terminal and beginning of a process that runs (proc_pid_stat(5)), None if none does."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in {"Z", "X"}:
        return None
    return int(fields[1]), int(fields[3]), int(fields[4]), int(fields[19])
