"""A reader of restic's repository format, versions 1 and 2, for random access to a repository in a local directory.

Source: restic's documentation, "References: Design" (doc/design.rst in its sources). Every file and blob is
`IV (16 bytes) || ciphertext || MAC (16 bytes)`, AES-256 in counter mode with a Poly1305-AES MAC. Nothing here writes,
and nothing is locked: a prune that runs meanwhile can take a pack away, which is reported as what it is.

What is read is checked: the MAC of every file and blob, the SHA-256 of every blob, and the bounds of every number.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.poly1305 import Poly1305

from blockferry.errors import DamagedSnapshotError, PassphraseError, RepositoryError

log = logging.getLogger(__name__)

_IV, _MAC = 16, 16
_OVERHEAD = _IV + _MAC
_COMPRESSED = 2
"""The encoding byte of an unpacked file of format 2 that is zstd-compressed JSON."""
_MOST_KEYS = 20
"""Keys that are tried, as many as restic tries."""
_MOST_SCRYPT_MEMORY = 1 << 30
_LARGEST_BLOB = 256 << 20
"""Bytes. restic's own largest chunk has 8 MiB; a tree with very many entries may be larger."""
_LARGEST_FILE = 1 << 30
_ID = re.compile(r"[0-9a-f]{64}")

Digests = npt.NDArray[np.uint64]
"""SHA-256 digests, one a row, as four big-endian numbers."""
Rows = npt.NDArray[np.int64]
"""Positions of blobs in a `BlobIndex`."""

_SOUND = 'Run `restic check --read-data`; its documentation, "Troubleshooting", says how to repair a repository.'


class Key:
    """A pair of an encryption and a MAC key. Used from several threads at once."""

    def __init__(self, encrypt: bytes, mac_k: bytes, mac_r: bytes) -> None:
        """Take the 32-byte AES key, the 16-byte AES key and the 16 bytes `r` of Poly1305-AES."""
        self._encrypt = algorithms.AES(encrypt)
        self._nonce_cipher = Cipher(algorithms.AES(mac_k), modes.ECB())  # noqa: S305  # Poly1305-AES is built so
        self._mac_r = mac_r

    def open(self, sealed: bytes) -> bytes:
        """Return the plaintext; raise InvalidSignature if the MAC does not fit."""
        if len(sealed) < _OVERHEAD:
            raise InvalidSignature
        view = memoryview(sealed)
        iv, ciphertext, mac = bytes(view[:_IV]), view[_IV:-_MAC], bytes(view[-_MAC:])
        Poly1305.verify_tag(self._mac_r + self._nonce_cipher.encryptor().update(iv), ciphertext, mac)
        return Cipher(self._encrypt, modes.CTR(iv)).decryptor().update(ciphertext)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a snapshot: its name, its size in bytes and the ids of its blobs, in hexadecimal."""

    name: str
    size: int
    content: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
    """A directory of a snapshot: its files, and the ids of the trees of its directories, by name."""

    files: dict[str, File]
    directories: dict[str, str]


class BlobIndex:
    """Where every blob of a repository is, in 48 bytes a blob: columns, sorted by digest. Immutable."""

    def __init__(self, digests: Digests, columns: npt.NDArray[np.uint32], packs: list[str]) -> None:
        """Take the digests and, for each, (number of its pack, offset, length, length uncompressed or 0)."""
        order = np.argsort(digests[:, 0], kind="stable")
        self._digests = digests[order]
        self._columns = columns[order]
        self._first = np.ascontiguousarray(self._digests[:, 0])
        self._packs = packs

    def __len__(self) -> int:
        return int(self._first.size)

    def rows(self, digests: Digests) -> Rows:
        """Return the row of each digest, -1 for those that are not in the repository."""
        found = np.full(len(digests), -1, np.int64)
        candidate = np.searchsorted(self._first, digests[:, 0]).astype(np.int64)
        open_ = np.arange(len(digests))
        # Almost always one step: only blobs that are in several packs share their first eight bytes.
        while open_.size:
            open_ = open_[candidate[open_] < len(self)]
            open_ = open_[self._first[candidate[open_]] == digests[open_, 0]]
            equal = (self._digests[candidate[open_]] == digests[open_]).all(axis=1)
            found[open_[equal]] = candidate[open_[equal]]
            open_ = open_[~equal]
            candidate[open_] += 1
        return found

    def lengths(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return the plaintext sizes of blobs."""
        stored, plain = self._columns[rows, 2].astype(np.int64), self._columns[rows, 3].astype(np.int64)
        lengths: npt.NDArray[np.int64] = np.where(plain > 0, plain, stored - _OVERHEAD)
        return lengths

    def place(self, row: int) -> tuple[str, int, int, int]:
        """Return the pack of a blob, its offset and length there, and its uncompressed length, 0 if not compressed."""
        pack, offset, length, plain = self._columns[row].tolist()
        return self._packs[pack], offset, length, plain

    def digest(self, row: int) -> bytes:
        """Return the SHA-256 that a blob's plaintext must have."""
        return bytes(self._digests[row].astype(">u8").tobytes())


class RepositoryReader:
    """A repository in a local directory, opened with its password. `blob` may be called from several threads."""

    def __init__(self, directory: Path, password: str) -> None:
        """Derive the keys and check the format's version.

        Raise PassphraseError if the password opens none of the keys, RepositoryError if this is no such repository.
        """
        self.directory = directory
        self._threads = threading.local()
        self._key = _master_key(directory, password)
        version = self._json("config").get("version")
        if version not in {1, 2}:
            raise RepositoryError(
                f"{directory}: is in restic's format {version!r}; this blockferry reads 1 and 2",
                remedy="Use a newer blockferry.",
            )
        self._index_files: frozenset[str] = frozenset()
        self._index = BlobIndex(np.empty((0, 4), np.uint64), np.empty((0, 4), np.uint32), [])

    def index(self) -> BlobIndex:
        """Return the index of the repository as it now is; it is loaded again only if it has changed."""
        names = frozenset(listing(self.directory / "index"))
        if names != self._index_files:
            self._index = self._load_index(sorted(names))
            self._index_files = names
        return self._index

    def snapshots(self, names: Iterable[str], tag: str) -> dict[str, dict[str, Any] | None]:
        """Return what `restic snapshots --json` lists of these, by id; None for one without the tag.

        One that cannot be read is left out, with a warning.
        """
        entries: dict[str, dict[str, Any] | None] = {}
        for name in names:
            try:
                found = self._json("snapshots", name)
            except DamagedSnapshotError as error:
                log.warning("%s", error.message)
                continue
            tagged = isinstance(found.get("tags"), list) and tag in found["tags"]
            entries[name] = found | {"id": name} if tagged else None
        return entries

    def root(self, index: BlobIndex, snapshot: str) -> Tree:
        """Return the root of a snapshot, given by its full id."""
        if not _ID.fullmatch(snapshot):
            raise RepositoryError(f"{snapshot!r} is not the id of a restic snapshot")
        return self.tree(index, self._json("snapshots", snapshot).get("tree"))

    def tree(self, index: BlobIndex, blob: Any) -> Tree:
        """Return the directory that is stored in a blob."""
        try:
            nodes = json.loads(self.read(index, File("tree", -1, (blob,))))["nodes"] or []
            return Tree(
                {each["name"]: _file(each) for each in nodes if each["type"] == "file"},
                {each["name"]: each["subtree"] for each in nodes if each["type"] == "dir"},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"the tree {blob} cannot be read: {error!r}") from None

    def read(self, index: BlobIndex, file: File, limit: int = _LARGEST_FILE) -> bytes:
        """Return the whole content of a file; a size of -1 is not checked."""
        rows = self.locate(index, file.content)
        if int(index.lengths(rows).sum()) > limit:
            raise self._damaged(f"{file.name} is beyond all bounds")
        content = b"".join(self.blob(index, row) for row in rows.tolist())
        if file.size not in {-1, len(content)}:
            raise self._damaged(f"{file.name} has {len(content)} bytes, its tree says {file.size}")
        return content

    def locate(self, index: BlobIndex, blobs: Any) -> Rows:
        """Return the rows of blobs given by their ids in hexadecimal; DamagedSnapshotError if any is missing."""
        try:
            rows = index.rows(_digests(blobs))
        except (ValueError, TypeError) as error:
            raise self._damaged(f"a tree holds ids that are none: {error}") from None
        missing = np.flatnonzero(rows < 0)
        if missing.size:
            raise self._damaged(f"blob {blobs[int(missing[0])]} is not in the index, nor are {missing.size - 1} more")
        return rows

    def blob(self, index: BlobIndex, row: int) -> bytes:
        """Return a blob's plaintext, decrypted, decompressed and checked; DamagedSnapshotError if it is not sound."""
        pack, offset, length, plain_length = index.place(row)
        digest = index.digest(row)
        where = f"blob {digest.hex()} in pack {pack}"
        sealed = self._piece(self.directory / "data" / pack[:2] / pack, offset, length)
        try:
            plain = self._key.open(sealed)
        except InvalidSignature:
            raise self._damaged(f"{where} is not what was written") from None
        if plain_length:
            plain = self._decompress(plain, plain_length, where)
        if hashlib.sha256(plain).digest() != digest:
            raise self._damaged(f"{where} has another content than its id says")
        return plain

    def _piece(self, path: Path, offset: int, length: int) -> bytes:
        """Return some bytes of a pack."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise self._damaged(f"pack {path.name} is gone") from None
        except OSError as error:
            raise RepositoryError(
                f"{path}: cannot be read: {error.strerror}", remedy="Check the repository's disk and permissions."
            ) from None

    def _decompress(self, packed: bytes, length: int, where: str) -> bytes:
        """Return what zstd packed, which must be `length` bytes: no more is ever allocated."""
        try:
            declared = zstandard.frame_content_size(packed)
            if declared not in {-1, length} or length > _LARGEST_BLOB:
                raise self._damaged(f"{where} unpacks to {declared} bytes, the index says {length}")
            # A decompressor must not be shared by threads.
            if not hasattr(self._threads, "zstd"):
                self._threads.zstd = zstandard.ZstdDecompressor()
            plain: bytes = self._threads.zstd.decompress(packed, max_output_size=length)
        except zstandard.ZstdError as error:
            raise self._damaged(f"{where} does not unpack: {error}") from None
        return plain

    def _json(self, *path: str) -> dict[str, Any]:
        """Return the JSON object in an unpacked file: config, an index, a snapshot."""
        where = self.directory.joinpath(*path)
        try:
            plain = self._key.open(_whole(where))
            if plain[:1] not in {b"{", b"["}:
                if plain[:1] != bytes([_COMPRESSED]):
                    raise ValueError("it is in an encoding of a later restic")
                plain = zstandard.ZstdDecompressor().decompressobj().decompress(plain[1:])
            decoded = json.loads(plain)
            if not isinstance(decoded, dict):
                raise ValueError("it is not an object")
            return decoded
        except (InvalidSignature, ValueError, zstandard.ZstdError) as error:
            reason = "its MAC is wrong" if isinstance(error, InvalidSignature) else str(error)
            raise self._damaged(f"{'/'.join(path)} cannot be read: {reason}") from None

    def _load_index(self, names: list[str]) -> BlobIndex:
        """Return the contents of all index files, one after the other in memory."""
        packs: list[str] = []
        digests = [np.empty((0, 4), np.uint64)]
        columns = [np.empty((0, 4), np.uint32)]
        for name in names:
            stored = self._json("index", name)
            try:
                for pack, blobs in _packs(stored):
                    digests.append(_digests([blob["id"] for blob in blobs]))
                    columns.append(_columns(len(packs), blobs))
                    packs.append(pack)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise self._damaged(f"index {name} cannot be read: {error!r}") from None
        return BlobIndex(np.concatenate(digests), np.concatenate(columns), packs)

    def _damaged(self, what: str) -> DamagedSnapshotError:
        return DamagedSnapshotError(f"{self.directory}: {what}", remedy=_SOUND)


def _master_key(directory: Path, password: str) -> Key:
    """Return the master key that the password opens."""
    names = listing(directory / "keys")
    for name in sorted(names)[:_MOST_KEYS]:
        try:
            stored = json.loads(_whole(directory / "keys" / name))
            if stored["kdf"] != "scrypt":
                raise ValueError(f"unknown key derivation {stored['kdf']!r}")
            derived = hashlib.scrypt(
                password.encode(),
                salt=base64.b64decode(stored["salt"]),
                n=stored["N"],
                r=stored["r"],
                p=stored["p"],
                dklen=64,
                maxmem=_MOST_SCRYPT_MEMORY,
            )
            master = json.loads(Key(derived[:32], derived[32:48], derived[48:]).open(base64.b64decode(stored["data"])))
            return Key(
                *(base64.b64decode(part) for part in (master["encrypt"], master["mac"]["k"], master["mac"]["r"]))
            )
        except InvalidSignature:
            continue
        except (ValueError, KeyError, TypeError, OverflowError, binascii.Error) as error:
            raise RepositoryError(f"{directory}: key {name} cannot be read: {error!r}", remedy=_SOUND) from None
    if not names:
        raise RepositoryError(
            f"{directory}: there is no key", remedy="Check the path; `restic init` makes a repository."
        )
    raise PassphraseError(
        f"{directory}: the password is wrong",
        remedy="Check RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND or RESTIC_PASSWORD.",
    )


def _file(node: dict[str, Any]) -> File:
    """Return the file that a node of a tree describes; raise KeyError, TypeError or ValueError if it describes none."""
    size, content = node.get("size", 0), node.get("content") or []
    if not isinstance(size, int) or size < 0 or not isinstance(node["name"], str):
        raise ValueError("a file has no name or size")
    return File(node["name"], size, tuple(content))


def _digests(ids: Any) -> Digests:
    """Return ids in hexadecimal as digests; raise ValueError if any is not one."""
    if not all(len(each) == 64 for each in ids):
        raise ValueError("an id is not 64 digits long")
    return np.frombuffer(bytes.fromhex("".join(ids)), ">u8").astype(np.uint64).reshape(-1, 4)


def _columns(pack: int, blobs: list[dict[str, Any]]) -> npt.NDArray[np.uint32]:
    """Return the figures of a pack's blobs as an index keeps them; raise ValueError if one is out of all bounds."""
    figures = [(pack, each["offset"], each["length"], each.get("uncompressed_length", 0)) for each in blobs]
    table = np.array(figures, np.int64).reshape(-1, 4)
    if bool((table < 0).any()) or bool((table >> 32).any()) or bool((table[:, 2:] > _LARGEST_BLOB).any()):
        raise ValueError("an offset or length is out of bounds")
    if bool((table[:, 2] < _OVERHEAD).any()):
        raise ValueError("a blob is shorter than its own MAC")
    return table.astype(np.uint32)


def _packs(index: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the packs that an index lists, with their blobs; a name that could lead elsewhere is no pack's."""
    for each in index.get("packs") or []:
        if not _ID.fullmatch(each["id"]):
            raise ValueError("a pack's id is none")
        yield each["id"], each["blobs"]


def listing(directory: Path) -> list[str]:
    """Return the names in a directory of the repository that are ids."""
    try:
        return [each.name for each in directory.iterdir() if _ID.fullmatch(each.name)]
    except OSError as error:
        raise RepositoryError(
            f"{directory}: cannot be read: {error.strerror}", remedy="Check the repository's path and permissions."
        ) from None


def _whole(path: Path) -> bytes:
    """Return the content of a file of the repository."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise DamagedSnapshotError(
            f"{path}: is gone", remedy="Was it removed by forget or prune a moment ago? Try again."
        ) from None
    except OSError as error:
        raise RepositoryError(
            f"{path}: cannot be read: {error.strerror}", remedy="Check the repository's disk and permissions."
        ) from None
    if len(content) > _LARGEST_FILE:
        raise DamagedSnapshotError(f"{path}: is beyond all bounds", remedy=_SOUND)
    return content
