"""A group of files on a real filesystem into a real repository, and back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockferry.groups.backup import back_up_group
from blockferry.groups.definition import Group
from blockferry.manager import plugin_manager, repository_named
from commands_support import Depot
from groups_support import Quiet, make_tree, state_of
from volumes_support import make_image, run

Mount = Callable[..., Path]

pytestmark = pytest.mark.root


def back_up(depot: Depot, top: Path) -> str:
    """Store all files below a directory, as `blockferry backup` does."""
    group = Group.parse("small", {"volume": str(top)}, "test")
    with pytest.MonkeyPatch.context() as patch:
        for name, text in depot.env.items():
            patch.setenv(name, text)
        with contextlib.closing(repository_named(plugin_manager(), depot.reference)) as repository:
            done = back_up_group(group, repository, since="latest", progress=Quiet())
    assert done.problems == ()
    return done.result.snapshot.id


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_files_come_back_as_they_were(filesystem: str, depot: Depot, mount: Mount, tmp_path: Path) -> None:
    image = make_image(tmp_path / "volume.img", 400 << 20)
    run(f"mkfs.{filesystem}", "-q", image)
    place = mount(image, "loop")
    top = make_tree(place / "top")
    first = back_up(depot, top)
    before = state_of(top)
    (top / "new").write_bytes(os.urandom(5000))
    (top / "sparse").unlink()
    with (top / "big").open("r+b") as file:
        file.write(b"changed")
    back_up(depot, top)
    for snapshot, expected in ((first, before), ("latest", state_of(top))):
        to = place / f"to-{snapshot}"
        assert depot.ferry("files", snapshot, "--to", to, "--json").json()["problems"] == []
        assert state_of(to) == expected
