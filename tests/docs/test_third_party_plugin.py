"""The plugin on the hooks page is a package that installs, and that blockferry then asks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pages_support import Page

PAGE = Page("hooks.md")
MIB = 1 << 20


def file_on_page(name: str) -> str:
    """Return the code block that the page introduces with the file's name."""
    match = re.search(rf"`{re.escape(name)}`:\n\n```\w+\n(.*?)```", PAGE.text, re.DOTALL)
    assert match, f"docs/hooks.md shows no {name}"
    return match[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin, installed by pip, without a network, into a directory of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "blockferry_swap.py"):
        (source / name).write_text(file_on_page(name))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture
def swap_area(tmp_path: Path) -> Path:
    image = tmp_path / "swap.img"
    with image.open("wb") as file:
        file.write(os.urandom(4 * MIB))
    subprocess.run(["mkswap", "--quiet", "--pagesize", "4096", str(image)], check=True, capture_output=True)
    return image


def used(image: Path, **environment: str) -> dict[str, object]:
    done = subprocess.run(
        [Path(sys.executable).with_name("blockferry"), "used", str(image), "--json"],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def test_with_the_plugin_only_the_header_of_a_swap_area_is_in_use(installed: Path, swap_area: Path) -> None:
    answer = used(swap_area, PYTHONPATH=str(installed))
    assert answer["extents"] == [[0, 4096]]
    assert answer["method"] == "the header of the swap area"


def test_without_the_plugin_all_of_a_swap_area_counts_as_used(swap_area: Path) -> None:
    assert used(swap_area)["used_bytes"] == 4 * MIB


def test_the_reason_why_the_plugin_declined_reaches_the_user(installed: Path, swap_area: Path) -> None:
    subprocess.run(["mkswap", "--quiet", "--pagesize", "65536", str(swap_area)], check=True, capture_output=True)
    answer = used(swap_area, PYTHONPATH=str(installed))
    assert answer["used_bytes"] == 4 * MIB
    assert "pages of another size" in str(answer["tier_reason"])
