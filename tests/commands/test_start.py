"""How the command begins: without threads that nobody asked for, and without a trace of that in what it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STARTED = """
import os
from blockferry.cli.start import _no_algebra
with _no_algebra():
    import numpy
print(len(os.listdir("/proc/self/task")), os.environ.get("OPENBLAS_NUM_THREADS"))
"""


@pytest.mark.parametrize("given", [None, "1"])
def test_numpy_starts_no_threads_and_the_environment_stays_the_users(given: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    env |= {"OPENBLAS_NUM_THREADS": given} if given else {}
    said = subprocess.run([sys.executable, "-c", STARTED], env=env, check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["1", str(given)]
