"""A group of files on a real filesystem into a real repository, and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from commands_support import Depot
from groups_support import back_up, make_tree, state_of
from volumes_support import make_image, run

Mount = Callable[..., Path]

pytestmark = pytest.mark.root


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_files_come_back_as_they_were(filesystem: str, depot: Depot, mount: Mount, tmp_path: Path) -> None:
    image = make_image(tmp_path / "volume.img", 400 << 20)
    run(f"mkfs.{filesystem}", "-q", image)
    place = mount(image, "loop")
    top = make_tree(place / "top")
    first = back_up(depot, top).id
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
