"""The file: Prometheus's text format, one file a host, which is also what remembers the samples of other volumes.

Whoever changes it holds a lock, reads what is there, and puts a whole new file in its place: node_exporter never reads
half a file, and two backups that end at once lose nothing. Lines that are none of ours are dropped.
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from blockferry.errors import NotNowError
from blockferry.kernel import sync_directory
from blockferry.metrics.families import FAMILIES, Family

FILE_NAME = "blockferry.prom"
_LARGEST = 16 << 20
_PATIENCE = 10.0
"""Seconds to wait for another's lock, which is held for milliseconds."""
_SAMPLE = re.compile(r"(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"(?:,|$)')
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n"}
_UNESCAPED = {escaped: plain for plain, escaped in _ESCAPES.items()}

Key = tuple[str, tuple[str, ...]]
"""A metric's name, and the values of its labels in their order."""
Samples = dict[Key, float]


def key(name: str, labels: tuple[str, ...]) -> Key:
    """Return what tells a sample from all others. A name may be no UTF-8, as paths are; the file has to be."""
    return name, tuple(label.encode("utf-8", "backslashreplace").decode() for label in labels)


@contextlib.contextmanager
def changing(directory: Path) -> Iterator[Samples]:
    """Give the samples in a directory's file, to be changed; what the context leaves of them is put in its place.

    Raise OSError if the directory is not there or cannot be written, NotNowError if another keeps the lock.
    """
    with _locked(directory / f".{FILE_NAME}.lock"):
        samples = parse(_read(directory / FILE_NAME))
        yield samples
        _write(directory / FILE_NAME, render(samples))


def render(samples: Samples) -> str:
    """Return the text of samples, with what each metric is."""
    lines = []
    for family in FAMILIES.values():
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.type}"]
        mine = sorted((values, value) for (name, values), value in samples.items() if name == family.name)
        lines += [f"{family.name}{{{_labels(family, values)}}} {_number(value)}" for values, value in mine]
    return "\n".join(lines) + "\n"


def parse(text: str) -> Samples:
    """Return the samples in a text; what is not of ours is left out."""
    samples: Samples = {}
    for line in text.split("\n"):
        match = _SAMPLE.fullmatch(line)
        family = FAMILIES.get(match["name"]) if match else None
        if match and family:
            found = {name: _unescaped(value) for name, value in _LABEL.findall(match["labels"])}
            with contextlib.suppress(ValueError):
                value = float(match["value"])
                if tuple(found) == family.labels and math.isfinite(value):
                    samples[family.name, tuple(found.values())] = value
    return samples


def _labels(family: Family, values: tuple[str, ...]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(family.labels, values, strict=True))


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(each, each) for each in text)


def _unescaped(text: str) -> str:
    return re.sub(r"\\.", lambda match: _UNESCAPED.get(match[0], match[0]), text)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _read(path: Path) -> str:
    """Return the text of the file, "" if there is none. Not through a link: others may write to the directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    with open(descriptor, "rb") as file:
        return file.read(_LARGEST).decode(errors="replace")


def _write(path: Path, text: str) -> None:
    """Put a whole new file in place of what is there, for everybody to read."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + _PATIENCE
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "rb") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NotNowError(f"{path}: another process keeps it locked") from None
                time.sleep(0.02)
        yield
