"""Groups of files in another tool's job: what is read the second time, and the files that come back."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

import pytest

from commands_support import new_depot, run
from export_support import MIB, SEGMENT, Host, job

pytestmark = pytest.mark.root


def test_a_group_is_exported_read_where_it_changed_and_its_files_come_back(
    host: Host, sharing: Path, tmp_path: Path
) -> None:
    top = sharing / "group"
    top.mkdir()
    for number in range(8):
        (top / f"file {number}").write_bytes(os.urandom(3 * MIB))
    (top / "link").symlink_to("file 1")
    host.configure(f"groups: {{mail: {{volume: {sharing}, paths: [{top}]}}}}")
    depot, read = new_depot("restic", tmp_path / "repository"), []
    for name in ("first", "second"):
        said = host.export("mail")
        assert said["volumes"][0]["problems"] == 0
        assert job(depot, host.at, name).code == 0
        read.append(host.release()["bytes_read"])
        if name == "first":
            (top / "file 3").write_bytes(os.urandom(MIB))
    assert read[0] > 24 * MIB
    assert read[1] <= 3 * SEGMENT
    back = tmp_path / "back"
    depot.stock("restore", "latest", "--tag", "second", "--target", back)
    host.ferry("files", "latest", "--to", tmp_path / "files", "--repo", f"dir:{back}", "--json").json()
    found = tmp_path / "files" / "group"
    compared = filecmp.dircmp(top, found)
    assert (compared.left_only, compared.right_only) == ([], [])
    assert filecmp.cmpfiles(top, found, compared.common_files, shallow=False)[1:] == ([], [])
    run("test", "-L", found / "link")
    shutil.rmtree(top)
