"""A coordinator that takes all hosts as far as they come in a stage, says `there`, and then stands.

python cluster_coordinator.py INDEX VOLUME SIZE STAGE
"""

from __future__ import annotations

import sys
import time

from blockferry.cluster.coordinator import coordinated
from blockferry.manager import log_index_named, plugin_manager


def stand(index: str, volume: str, size: int) -> None:
    """Stand until killed."""
    with coordinated(log_index_named(plugin_manager(), index), volume, size, []) as coordinator:
        coordinator.hold()
        sys.stdout.write("held\n")
        sys.stdout.flush()
        time.sleep(120)


if __name__ == "__main__":
    stand(sys.argv[1], sys.argv[2], int(sys.argv[3]))
