"""The other files of this directory pass, each in a guest of its own.

One alone, with all that it prints: `scripts/vm -- .venv/bin/python -m pytest -p no:cacheprovider tests/vm/FILE`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted(path.name for path in HERE.glob("test_*.py") if path.name != Path(__file__).name)


@pytest.fixture(scope="session", autouse=True)
def vm() -> None:
    """Get what a guest takes, or skip."""
    done = subprocess.run([str(ROOT / "scripts/vm"), "--prepare"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        pytest.skip(f"no guest can be had ({last}): run scripts/vm --prepare on Debian, with a network")


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(600)  # a guest is emulated
@pytest.mark.parametrize("file", FILES)
def test_all_tests_of_a_file_pass_in_a_guest(file: str) -> None:
    inside = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    command = [str(ROOT / "scripts/vm"), "--", *inside]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
