"""A block node of a running machine as a volume: what `query-named-block-nodes` says of it."""

from __future__ import annotations

from typing import Any

from blockferry.errors import VolumeError
from blockferry.qemu.name import DiskName
from blockferry.qemu.qmp import Monitor, connected
from blockferry.volume import Volume, default_name


def discover(disk: DiskName, name: str) -> Volume:
    """Return the disk as a volume; its filesystem is known once it holds still.

    Raise VolumeError if the machine has no such node, or one that the guest does not write to.
    """
    with connected(disk.socket) as monitor:
        node = node_of(monitor, disk)
    if node["ro"]:
        # After an external snapshot the guest writes to another node, and this one is its backing file.
        raise VolumeError(
            f"{disk}: this node is read-only: the backing file of what the guest uses, or a medium",
            remedy="Name the node that the guest writes to (query-block lists it as inserted).",
        )
    return Volume(
        path=str(disk),
        name=name or default_name(str(disk)),
        size=int(node["image"]["virtual-size"]),
        block_size=512,
        is_device=False,
        filesystem="",
        identity={"image": str(node["image"]["filename"])},
    )


def node_of(monitor: Monitor, disk: DiskName) -> dict[str, Any]:
    """Return what the machine says of a block node; VolumeError, naming those that there are, if it has none."""
    nodes: list[dict[str, Any]] = monitor.execute("query-named-block-nodes", flat=True)
    found = next((node for node in nodes if node.get("node-name") == disk.node), None)
    if found is None:
        names = ", ".join(sorted(str(node["node-name"]) for node in nodes if not node["node-name"].startswith("#")))
        raise VolumeError(
            f"{disk.socket}: the machine has no block node {disk.node}",
            remedy=f"It has {names}." if names else "Give its disk a node name (-blockdev ...,node-name=NAME).",
        )
    return found
