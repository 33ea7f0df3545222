"""Files of environment variables, as the tools that have them read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockferry.config.dotenv import read_environment
from blockferry.errors import UsageError

TEXT = r"""
# a comment
A=plain  # and why
export B = 'literal $A'
C="quoted $A\n"
D=${A}-$B
E=
F=a#b
G: yaml
H=\$A
"""


def test_values_are_read_as_by_the_tools(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(TEXT)
    assert read_environment(str(file)) == {
        "A": "plain",
        "B": "literal $A",
        "C": "quoted plain\n",
        "D": "plain-literal $A",
        "E": "",
        "F": "a#b",
        "G": "yaml",
        "H": "$A",
    }


def test_what_is_no_variable_is_refused_without_being_shown(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("A=1\nhunter2\n")
    with pytest.raises(UsageError, match=r"\.env:2: is not NAME=VALUE") as caught:
        read_environment(str(file))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_environment(str(tmp_path / "none"))
