"""The pages that describe what the code defines name exactly what it defines."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockferry import hookspecs
from blockferry.blockmap import BlockMap, Kind
from blockferry.extents import ExtentSet
from blockferry.manager import plugin_manager
from blockferry.snapshot import Record
from pages_support import Page

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def section(text: str, heading: str) -> str:
    return re.split(r"^#", text.partition(f"{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def specs() -> dict[str, list[str]]:
    found = inspect.getmembers(hookspecs, inspect.isfunction)
    return {name: list(inspect.signature(spec).parameters) for name, spec in found if name.startswith("blockferry_")}


def test_every_hook_is_documented_with_its_arguments_in_order_of_the_specs() -> None:
    documented = re.findall(r"^### (blockferry_\w+)\((.*)\)$", page("hooks.md"), re.MULTILINE)
    in_source_order = re.findall(r"^def (blockferry_\w+)\(", Path(hookspecs.__file__).read_text(), re.MULTILINE)
    assert [name for name, _arguments in documented] == in_source_order
    assert {name: arguments.split(", ") for name, arguments in documented} == specs()


@pytest.mark.parametrize("name", sorted(specs()))
def test_each_argument_of_a_hook_is_explained(name: str) -> None:
    arguments = specs()[name]
    explained = section(page("hooks.md"), f"### {name}({', '.join(arguments)})")
    assert re.findall(r"^`(\w+)`\n: ", explained, re.MULTILINE) == arguments


@pytest.mark.parametrize("name", sorted(specs()))
def test_the_page_says_of_each_hook_whether_the_first_answer_ends_it(name: str) -> None:
    options = getattr(plugin_manager().hook, name).spec.opts
    text = section(page("hooks.md"), f"### {name}({', '.join(specs()[name])})")
    said = "Stops at the first answer" in text.replace("\n", " ")
    assert said == options["firstresult"]


def test_the_format_page_lists_the_fields_of_the_record() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section(page("format.md"), "## `blockferry.json`"), re.MULTILINE)
    assert sorted(rows) == sorted(field.name for field in dataclasses.fields(Record))


def test_the_format_page_lists_the_kinds_of_runs() -> None:
    rows = re.findall(r"^\| (\d) \| (\w+) \|", section(page("format.md"), "## `blockferry.map`"), re.MULTILINE)
    assert {int(number): name for number, name in rows} == {kind.value: kind.name.lower() for kind in Kind}


@pytest.mark.parametrize("name", ["README.md", "changelog/README.md"])
def test_links_of_the_pages_that_sphinx_does_not_see_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert [target for target in targets if not (ROOT / name).parent.joinpath(target).exists()] == []


def test_the_script_on_the_format_page_prints_a_stored_map(tmp_path: Path) -> None:
    block_map = BlockMap.build(
        1 << 30,
        data=ExtentSet.from_pairs([(0, 4096), (1 << 20, 1 << 21)]),
        same=ExtentSet.from_pairs([(1 << 29, 1 << 20)]),
    )
    stored, script = tmp_path / "blockferry.map", tmp_path / "print_map.py"
    stored.write_bytes(block_map.to_bytes())
    script.write_text(Page("format.md").block("python"))
    printed = subprocess.run([sys.executable, script, stored], check=True, capture_output=True, text=True).stdout
    assert printed == block_map.to_lines()


def test_the_architecture_page_has_a_place_for_every_module() -> None:
    packages = [ROOT / "plugin" / "blockferry", ROOT / "adapters"]
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for package in packages
        for path in package.iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    listed = set(re.findall(r"`(\w+(?:/|\.py))`", page("architecture.md")))
    assert listed == there
