"""A borg 1.2 or 1.4 that is one binary: `borg create --sparse` reads the image through FUSE. Nothing is reused by id.

The archive is the same as the worker's: three ordinary files, the image in chunks of a fixed size. What is in use is
read and compressed anew each time; borg stores only what it does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockferry.blockmap import BlockMap, Kind
from blockferry.fuse import mounted
from blockferry.layers import CutLayer, Layer
from blockferry.repository import Advance, Base, plan
from blockferry.snapshot import MAP_NAME, RECORD_NAME, Record, Snapshot, Stored
from blockferry_borg.archives import IMAGE_NAME, archive_name, comment_for
from blockferry_borg.by_command import CommandRepository, follow, removed_on_failure
from blockferry_borg.command import Borg, literal
from blockferry_borg.sender import Content
from blockferry_borg.tree import LayerTree


class FirstSeriesWords:
    """The commands of borg 1: an archive is `REPOSITORY::NAME`, and BORG_REPO is the repository if none is named."""

    def list_archives(self) -> list[str]:
        """Print the archives, with their comments, as JSON."""
        return ["list", "--json", "--format", "{comment}"]

    def extract(self, archive: str, item: str) -> list[str]:
        """Print an item's bytes."""
        return ["extract", "--stdout", f"::{archive}", item]

    def mount(self, archive: str) -> list[str]:
        """Mount an archive; the mount point follows."""
        return ["mount", "--foreground", f"::{archive}"]

    def rename(self, archive: str, name: str) -> list[str]:
        """Give an archive another name."""
        return ["rename", f"::{archive}", name]

    def delete(self, archive: str) -> list[str]:
        """Delete an archive."""
        return ["delete", f"::{archive}"]

    def described_in(self, archive: str) -> str:
        """Return the archive itself."""
        return archive


class StandaloneRepository(CommandRepository):
    """Implements `blockferry.repository.Repository` by the commands of borg 1."""

    def __init__(self, borg: Borg) -> None:
        super().__init__(borg, FirstSeriesWords())

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, bases: Sequence[Base], advance: Advance
    ) -> Stored:
        """Store an image as one archive; what is the same is read like everything else, so `source` must have it."""
        name, comment = archive_name(record, self.borg.environment), comment_for(record)
        unfinished = f"{name}.checkpoint"
        data = plan(block_map, record, bases).extents(Kind.DATA, Kind.SAME)
        files = {
            RECORD_NAME: Content(record.to_json()),
            MAP_NAME: Content(block_map.to_bytes()),
            IMAGE_NAME: CutLayer(source, data),
        }
        tree = LayerTree(files, counted=IMAGE_NAME)
        options = ["--json", "--sparse", "--files-cache", "disabled", "--chunker-params", f"fixed,{record.unit}"]
        with removed_on_failure(self, unfinished):
            with (
                mounted(tree, name=record.volume) as path,
                self.borg.start(
                    "create",
                    *options,
                    "--compression",
                    self.borg.environment.compression(),
                    "--comment",
                    literal(comment),
                    f"::{unfinished}",
                    *files,
                    directory=path,
                ) as running,
            ):
                follow(running, tree, advance, data.total)
                stored = running.json()["archive"]["stats"]["deduplicated_size"]
            self.borg.run(*self.words.rename(unfinished, name))
        return Stored(Snapshot.of(record, name), stored)
