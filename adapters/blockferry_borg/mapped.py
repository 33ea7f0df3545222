"""borg 2: `borg create --map` is told what every byte is, and takes what is the same from the base's archive.

A map goes with exactly one input file, so a snapshot is two archives: `NAME` has `volume.img`, and `NAME.description`
has `blockferry.json` and `blockferry.map`. The description is stored first; without the image it means nothing.
By hand: `borg extract NAME` gives the image, `borg extract NAME.description` what describes it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from blockferry.blockmap import BlockMap, Kind
from blockferry.fuse import mounted
from blockferry.layers import CutLayer, Layer
from blockferry.repository import Advance, Base, plan
from blockferry.snapshot import MAP_NAME, RECORD_NAME, Record, Snapshot, Stored
from blockferry_borg.archives import IMAGE_NAME, archive_name, comment_for
from blockferry_borg.by_command import CommandRepository, follow, removed_on_failure
from blockferry_borg.command import Borg, literal
from blockferry_borg.tree import LayerTree

DESCRIPTION = ".description"


class SecondSeriesWords:
    """The commands of borg 2: archives go by their names, BORG_REPO is the repository."""

    def list_archives(self) -> list[str]:
        """Print the archives, with their comments, as JSON."""
        return ["repo-list", "--json", "--format", "{comment}"]

    def extract(self, archive: str, item: str) -> list[str]:
        """Print an item's bytes."""
        return ["extract", "--stdout", archive, item]

    def mount(self, archive: str) -> list[str]:
        """Mount an archive; the mount point follows."""
        return ["mount", "--foreground", "--match-archives", f"id:{archive}"]

    def rename(self, archive: str, name: str) -> list[str]:
        """Give an archive another name."""
        return ["rename", archive, name]

    def delete(self, archive: str) -> list[str]:
        """Delete an archive."""
        return ["delete", archive]

    def described_in(self, archive: str) -> str:
        """Return the archive beside that of the image."""
        return archive + DESCRIPTION


class MappedRepository(CommandRepository):
    """Implements `blockferry.repository.Repository` by the commands of borg 2."""

    capabilities = frozenset({"reuse", "concurrent"})

    def __init__(self, borg: Borg) -> None:
        super().__init__(borg, SecondSeriesWords())

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, bases: Sequence[Base], advance: Advance
    ) -> Stored:
        """Store an image and its description as two archives; borg takes chunks over from one base at most."""
        name, comment = archive_name(record, self.borg.environment), comment_for(record)
        unfinished, description = f"{name}.checkpoint", self.words.described_in(name)
        planned = plan(block_map, record, bases)
        used = planned.extents(Kind.DATA, Kind.SAME)
        tree = LayerTree({IMAGE_NAME: CutLayer(source, used)}, counted=IMAGE_NAME)
        with tempfile.TemporaryDirectory() as made, removed_on_failure(self, unfinished, description):
            stored = self._store_description(Path(made), record, block_map, description)
            (Path(made) / "map").write_text(planned.to_lines())
            options = ["--json", "--files-cache", "disabled", "--map", str(Path(made) / "map")]
            options += ["--compression", self.borg.environment.compression()]
            options += ["--chunker-params", f"fixed,{record.unit}", "--comment", literal(comment)]
            if bases:
                (base,) = bases
                options += ["--reuse-from", base.snapshot.archive]
            with (
                mounted(tree, name=record.volume) as path,
                self.borg.start("create", *options, unfinished, IMAGE_NAME, directory=path) as running,
            ):
                follow(running, tree, advance, planned.extents(Kind.DATA).total)
                stored += _grown(running.json())
            self.borg.run(*self.words.rename(unfinished, name))
        return Stored(Snapshot.of(record, name), stored)

    def _store_description(self, directory: Path, record: Record, block_map: BlockMap, archive: str) -> int:
        """Store the record and the map; return the bytes by which the repository grew."""
        (directory / RECORD_NAME).write_bytes(record.to_json())
        (directory / MAP_NAME).write_bytes(block_map.to_bytes())
        options = ["--json", "--files-cache", "disabled", "--compression", self.borg.environment.compression()]
        with self.borg.start("create", *options, archive, RECORD_NAME, MAP_NAME, directory=directory) as running:
            running.wait()
            running.check(warnings_are_errors=True)
            return _grown(running.json())


def _grown(printed: dict[str, dict[str, dict[str, dict[str, int]]]]) -> int:
    """Return the bytes that a `borg create --json` of borg 2 says it wrote to the repository."""
    return printed["archive"]["stats"]["store_stats"]["backend_store_volume"]
