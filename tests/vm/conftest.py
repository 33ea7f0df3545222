"""What is tested under a stock Debian kernel: `test_in_guest.py` boots it and has it run the other files here.

`test_power_cut.py` boots one by itself, and kills it, `test_shutdown.py` one that it shuts down; `test_ocfs2.py` boots
two.
"""

from __future__ import annotations

import os
from pathlib import Path

IN_GUEST = "BLOCKFERRY_VM" in os.environ

# A guest may do anything to its disks; the machine itself is left alone even if its kernel has all it takes.
OUTSIDE = {"test_in_guest.py", "test_ocfs2.py", "test_power_cut.py", "test_shutdown.py"}
collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if (path.name in OUTSIDE) == IN_GUEST]
