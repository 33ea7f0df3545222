"""No block on a page is there that nothing holds true: it is run by a test, or read by who reads such files."""

from __future__ import annotations

import configparser
import json
import re
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

from blockferry.config import resticprofile
from blockferry.config.configuration import load_configuration
from blockferry.config.reference import ForeignReference
from blockferry.errors import UsageError
from blockferry.manager import plugin_manager
from pages_support import PAGES, ROOT, RUN, SHOWN, Block, accept, blocks_of, said_in_passing, words_of

WRITTEN_BY_HAND = sorted(PAGES.keys() - {"commands.md"})
"""The others are what the commands say of themselves, which test_commands.py and test_manual.py look at."""
BLOCKS = [block for name in WRITTEN_BY_HAND for block in blocks_of(name)]
TESTS = [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]


def ini(text: str) -> None:
    """Read a unit; keys may stand there more than once."""
    configparser.ConfigParser(strict=False, interpolation=None).read_string(text)


READ: dict[str, Callable[[str], object]] = {
    "yaml": YAML(typ="safe").load,
    "json": json.loads,
    "toml": tomllib.loads,
    "xml": ElementTree.fromstring,
    "ini": ini,
}


def of_language(*languages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [each for each in BLOCKS if each.language in languages], ids=str)


def test_every_block_is_run_or_read_or_shown() -> None:
    assert [str(block) for block in BLOCKS if block.language not in {*RUN, *READ, *SHOWN}] == []


def test_a_page_with_blocks_to_be_run_is_taken_by_a_test_that_runs_them() -> None:
    """`Page("x.md").blocks()` has all of them: a test unpacks these, and fails when there is one more."""
    taken = set(re.findall(r'\b(?:Page|do)\("([\w-]+\.md)"', "\n".join(TESTS)))
    assert sorted({each.page for each in BLOCKS if each.language in RUN} - taken) == []


@pytest.fixture(autouse=True)
def an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pages about shared volumes have in the environment."""
    monkeypatch.setenv("BLOCKFERRY_INDEX", "redis://10.0.0.5/0")


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
def test_every_command_line_is_accepted(name: str) -> None:
    for block in blocks_of(name):
        for words in block.command_lines():
            assert accept(words), block


@pytest.mark.parametrize("name", sorted(PAGES.keys() - {"format.md"}))
def test_every_command_that_the_text_names_is_there(name: str) -> None:
    """Without what it is to be applied to, as often as not. On the format's page stand the first lines of files."""
    for said in said_in_passing(name):
        try:
            accept([word for word in words_of(said) if word != "--help"])
        except click.MissingParameter:
            pass
        except click.UsageError as error:
            pytest.fail(f"{name}: blockferry {said}: {error}")


@of_language(*READ)
def test_every_block_of_settings_is_read(block: Block) -> None:
    assert READ[block.language](block.text) not in (None, {}, []) or block.language == "ini"


@of_language("yaml")
def test_every_configuration_is_understood(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, said = tmp_path / "config.yaml", YAML(typ="safe").load(block.text)
    file.write_text(block.text)
    if isinstance(said.get("groups"), list):
        assert said["groups"][0]["rules"]  # Prometheus's, which test_textfile.py has promtool read
    elif said.get("version") == "1":
        profile = resticprofile.profile_of(ForeignReference("resticprofile", str(file), ""))
        assert profile
    elif "constants" in said:
        borgmatic = Path(sys.executable).with_name("borgmatic")
        if not borgmatic.exists():
            pytest.skip("no borgmatic: scripts/bootstrap --test installs it")
        monkeypatch.setenv("BLOCKFERRY_BORGMATIC", str(borgmatic))
        if "repositories" not in said:
            file.write_text(block.text + "repositories: [{path: /srv/backup/borg}]\n")
        assert load_configuration(plugin_manager(), str(file)).volumes
    else:
        load_configuration(plugin_manager(), str(file))


def test_scripts_and_variables_that_the_pages_name_are_there() -> None:
    """Those on the page about systemd are fields in the journal, and test_journal.py's."""
    sources = [path.read_text() for folder in ("plugin", "adapters") for path in (ROOT / folder).rglob("*.py")]
    known = set(re.findall(r"BLOCKFERRY_\w+", "\n".join(sources)))
    for name in WRITTEN_BY_HAND:
        text = PAGES[name].read_text()
        assert [each for each in re.findall(r"\bscripts/\w+", text) if not (ROOT / each).exists()] == [], name
        assert name == "systemd.md" or set(re.findall(r"\bBLOCKFERRY_[A-Z_]*[A-Z]\b", text)) <= known, name


@pytest.mark.parametrize(
    "text",
    [
        "blockferry restore latest",
        "# blockferry backup /dev/sda --frobnicate",
        "x=$(blockferry show 1 2)",
        "blockferry doctor && blockferry frobnicate",
        "host a                  host b\n# blockferry doctor     # blockferry frobnicate",
        "30 2 * * *  root  blockferry backup data --fsfreeze often",
    ],
)
def test_a_wrong_command_line_would_be_noticed(text: str) -> None:
    with pytest.raises(click.UsageError):
        for words in Block("x.md", 1, "text", text).command_lines():
            accept(words)


def test_a_wrong_configuration_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError):
        block = Block("x.md", 1, "yaml", "volumes: {vm: {paht: /srv/vm.img}}")
        test_every_configuration_is_understood(block, tmp_path, monkeypatch)
