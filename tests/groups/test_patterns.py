"""borg's own module gives the verdicts: the same patterns and paths, the same answers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.errors import UsageError
from blockferry.groups.patterns import Rules, Selection, Verdict
from borg_support import BORGS, missing

BORG = """
import argparse, json, re, sys, warnings
warnings.simplefilter("ignore")
from borg.patterns import *
for line in sys.stdin:
    kind, lines, paths = json.loads(line)
    matcher = PatternMatcher(fallback=True)
    try:
        if kind == "rules":
            roots, commands = [], []
            load_pattern_file(lines, roots, commands)
            matcher.add_inclexcl(commands)
            assert not roots
        else:
            matcher.add_includepaths(lines)
    except (ValueError, re.error, argparse.ArgumentTypeError) as error:
        print(json.dumps(None), flush=True)
        continue
    print(json.dumps([(bool(matcher.match(path)), matcher.recurse_dir) for path in paths]), flush=True)
"""
Oracle = Callable[[str, list[str], list[str]], "list[tuple[bool, bool]] | None"]


@pytest.fixture(scope="module")
def borg() -> Iterator[Oracle]:
    """borg 1.4's own verdicts: whether a path is included, and whether to go on below it; None if it refuses a line."""
    if why := missing("1.4"):
        pytest.skip(why)
    interpreter = Path(BORGS["1.4"]).read_text().splitlines()[0].removeprefix("#!")
    with subprocess.Popen(
        [interpreter, "-c", BORG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(kind: str, lines: list[str], paths: list[str]) -> list[tuple[bool, bool]] | None:
            print(json.dumps([kind, lines, paths]), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            return answer and [tuple(each) for each in answer]

        yield ask
        process.stdin.close()


AS_BORG = {
    Verdict.INCLUDE: (True, True),
    Verdict.EXCLUDE: (False, True),
    Verdict.EXCLUDE_NO_RECURSE: (False, False),
}
FEW = ["a", "b", "a.tmp"]
NAMES = [*FEW, "ab", ".cache", "b.tmp", "ab*", "[a]", "é", "\udcff", "a\udcffb", "x y", "a\nb", "-"]
WILD = ["*", "**", "?", "[ab]", "[!a]", "[^a]", "[]a]", "[!]]", "[", "[]", "[z-a]", "*.tmp", "*a", "?.*", ".", "..", ""]
EXPRESSIONS = [
    "a",
    "^a",
    "a$",
    r"\.tmp$",
    "^a/",
    "(a|b)/",
    "(?i)A",
    r"(a)\1",
    "(",
    "[[a]",
    "",
    "^/",
    r"[^/]+\Z",
    "\udcff",
]
COMMANDS = st.sampled_from(["+ ", "- ", "! ", "+", "-", "!  "])
OTHER_LINES = st.sampled_from(["P fm", "P re", "P pp", "p sh", "", "# a", " "])

# Mostly of few names, so that patterns and paths meet.
names = st.one_of(st.sampled_from(FEW), st.sampled_from(FEW), st.sampled_from(NAMES))
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
globs = st.builds(
    lambda pieces, lead, trail: lead + "/".join(pieces) + trail,
    st.lists(
        st.one_of(names, st.sampled_from(WILD), st.text("ab*?[]!^/.-\\\udcff", max_size=6)), min_size=1, max_size=4
    ),
    st.sampled_from(["", "/", "//", "**/", "*", "*/"]),
    st.sampled_from(["", "", "/", "//", "*", "/*", "/**"]),
)
patterns = st.one_of(
    globs,
    st.builds("{}:{}".format, st.sampled_from(["sh", "fm", "pp", "pf"]), globs),
    st.sampled_from(EXPRESSIONS).map("re:{}".format),
    paths.map("pf:{}".format),
)
lines = st.lists(st.one_of(st.builds("{}{}".format, COMMANDS, patterns), OTHER_LINES), min_size=1, max_size=6)


def ours(rules: list[str], asked: list[str]) -> list[tuple[bool, bool]] | None:
    try:
        read = Rules.parse(rules)
    except UsageError:
        return None
    return [AS_BORG[read.verdict(path)] for path in asked]


@settings(max_examples=600, deadline=None)
@given(lines, st.lists(paths, min_size=1, max_size=6))
def test_rules_say_of_any_path_what_borg_says(borg: Oracle, rules: list[str], asked: list[str]) -> None:
    assert ours(rules, asked) == borg("rules", rules, asked)


@settings(max_examples=300, deadline=None)
@given(st.lists(patterns, min_size=1, max_size=3), st.lists(paths, min_size=1, max_size=6))
def test_a_selection_is_what_borg_extracts(borg: Oracle, named: list[str], asked: list[str]) -> None:
    try:
        selection = Selection.parse(named)
    except UsageError:
        assert borg("paths", named, asked) is None
        return
    assert [selection.matches(path) for path in asked] == [included for included, _ in borg("paths", named, asked)]


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("- *.tmp", ["a.tmp", "a.tmp/b"], ["d/a.tmp"]),
        ("- **/*.tmp", ["a.tmp", "d/a.tmp", "d/e/a.tmp/b"], ["d/a.tmpl"]),
        ("- **/.cache", [".cache", "d/.cache", "d/.cache/e"], ["d/x.cache"]),
        ("- fm:*/.cache", ["d/.cache", "d/e/.cache/f"], [".cache"]),
        ("- fm:*.tmp", ["d/a.tmp", "d/e.tmp/f"], ["d/a.tmpl"]),
        ("- sh:home/*/mail/", ["home/a/mail/x"], ["home/a/mail", "home/a/b/mail/x"]),
        ("- pp:/home/a/", ["home/a", "home/a/b"], ["home/ab"]),
        ("- pf:/home/a", ["home/a"], ["home/a/b"]),
        (r"- re:\.(iso|img)$", ["a.iso", "d/b.img"], ["d/b.img/c"]),
    ],
)
def test_each_style_matches_as_its_page_says(pattern: str, matching: list[str], other: list[str]) -> None:
    rules = Rules.parse([pattern])
    assert {rules.verdict(path) for path in matching} == {Verdict.EXCLUDE}
    assert {rules.verdict(path) for path in other} == {Verdict.INCLUDE}


def test_the_first_line_that_matches_counts_and_full_paths_come_before_all() -> None:
    rules = Rules.parse(["+ home/a", "! home", "- pf:home/a/secret"])
    assert rules.verdict("/home/a/b") is Verdict.INCLUDE
    assert rules.verdict("home/b") is Verdict.EXCLUDE_NO_RECURSE
    assert rules.verdict("home/a/secret") is Verdict.EXCLUDE


def test_names_that_are_no_utf8_match_like_any_other() -> None:
    path = os.fsdecode(b"d/\xff\xfe.tmp")
    rules = Rules.parse(["- **/??.tmp"])
    assert rules.verdict(path) is Verdict.EXCLUDE
    assert Selection.parse([path]).matches(path + "/below")


def test_no_rules_are_false_and_include_everything() -> None:
    rules = Rules.parse(["", "# only a remark", "P fm"])
    assert not rules
    assert rules.verdict("a") is Verdict.INCLUDE


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("R /home", "`paths`"),
        ("r /home", "`paths`"),
        ("home", "does not begin with"),
        ("-", "says nothing"),
        ("- re:(", "unterminated"),
        ("- sh:[z-a]", "bad character range"),
        ("- re:a{99999999999999999999}", "too large"),
        ("- xx:home", "no such style"),
        ("P glob", "no such style"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Rules.parse(["+ home", line])
    assert f"pattern 2, {line!r}" in caught.value.message
    assert words in caught.value.message


def test_a_selection_knows_which_of_its_patterns_met_nothing() -> None:
    selection = Selection.parse(["home/a", "pf:etc/fstab", "missing", "pf:missing/too"])
    assert selection.matches("home/a/b") and selection.matches("etc/fstab")
    assert not selection.matches("etc")
    assert selection.unmet() == ["missing", "pf:missing/too"]


def test_a_pattern_that_means_what_another_has_selected_already_has_met_something() -> None:
    selection = Selection.parse(["mail/ann", "sh:**/*.odt", "pf:mail/ann/letter.odt", "mail/ann/other"])
    assert selection.matches("mail/ann/letter.odt") and selection.matches("mail/ann/inbox")
    assert selection.unmet() == ["mail/ann/other"]


def test_without_patterns_everything_is_selected() -> None:
    selection = Selection.parse([])
    assert not selection
    assert selection.matches("anything")
