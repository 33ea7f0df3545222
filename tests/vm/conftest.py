"""What is tested under a stock Debian kernel: `test_in_guest.py` boots it and has it run the other files here."""

from __future__ import annotations

import os

import pytest

IN_GUEST = "BLOCKFERRY_VM" in os.environ

# A guest may do anything to its disks; the machine itself is left alone even if its kernel has all it takes.
collect_ignore_glob = ["test_in_guest.py"] if IN_GUEST else ["test_[!i]*.py", "test_i[!n]*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vm: boots a guest by scripts/vm")
