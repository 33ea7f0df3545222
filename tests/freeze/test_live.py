"""Volumes that nothing holds still: refused, with all reasons, unless the user takes them as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockferry.errors import UnstableVolumeError
from blockferry.hookspecs import FreezeOptions
from blockferry.snapshot import Stability
from conftest import Mount
from freeze_support import hold, make_image

pytestmark = pytest.mark.root


def test_a_mounted_image_is_refused_with_every_reason(tmp_path: Path, mount: Mount) -> None:
    store = mount(make_image(tmp_path / "store.img", "ext4", 64 << 20))  # one without reflinks
    image = make_image(store / "guest.img", "ext4", 16 << 20)
    place = mount(image)
    with pytest.raises(UnstableVolumeError) as raised:
        hold(image).__enter__()
    reasons = raised.value.message.splitlines()
    assert reasons[0] == f"{image}: in use, and nothing can make it hold still:"
    assert [reason.split(":")[0] for reason in reasons[1:]] == [
        "- offline",
        "- lvm",
        "- reflink",
        "- fsfreeze",
        "- live",
    ]
    assert f"mounted read-write at {place}" in reasons[1]
    assert "--allow-live" in raised.value.remedy
    assert "--fsfreeze" in raised.value.remedy


def test_it_is_read_as_it_is_if_the_user_says_so(tmp_path: Path, mount: Mount) -> None:
    store = mount(make_image(tmp_path / "store.img", "ext4", 64 << 20))
    image = make_image(store / "guest.img", "ext4", 16 << 20)
    mount(image)
    with hold(image, FreezeOptions(allow_live=True)) as frozen:
        assert frozen.stability is Stability.LIVE
        assert frozen.method == "live"
        assert frozen.volume.path == str(image)


def test_what_holds_still_is_not_read_live(tmp_path: Path) -> None:
    image = make_image(tmp_path / "idle.img", "ext4", 16 << 20)
    with hold(image, FreezeOptions(allow_live=True)) as frozen:
        assert frozen.stability is Stability.OFFLINE
