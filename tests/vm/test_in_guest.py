"""The other files of this directory pass in a guest: some of their tests in one boot, or all, a boot a file.

One file alone, with all that it prints: `scripts/vm -- .venv/bin/python -m pytest -p no:cacheprovider tests/vm/FILE`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTSIDE = {Path(__file__).name, "test_ocfs2.py", "test_power_cut.py", "test_shutdown.py"}
FILES = sorted(str(path) for path in HERE.glob("test_*.py") if path.name not in OUTSIDE)
FULL = os.environ.get("BLOCKFERRY_TEST_GUEST") == "full"
BOOTS = {Path(file).stem: [file] for file in FILES} if FULL else {"some": ["-m", "not thorough", *FILES]}


@pytest.fixture(scope="session", autouse=True)
def vm() -> None:
    """Get what a guest takes, or skip."""
    done = subprocess.run([str(ROOT / "scripts/vm"), "--prepare"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        pytest.skip(f"no guest can be had ({last}): run scripts/vm --prepare on Debian, with a network")


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(1800)  # a guest is emulated
@pytest.mark.parametrize("boot", BOOTS)
def test_everything_passes_in_a_guest(boot: str) -> None:
    inside = [sys.executable, "-m", "pytest", "-q", "--durations=0", "-p", "no:cacheprovider", *BOOTS[boot]]
    options = ["--systemd"] if boot == "test_systemd" else []
    command = [str(ROOT / "scripts/vm"), *options, "--", *inside]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
