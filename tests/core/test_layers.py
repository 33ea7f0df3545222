"""Layers and stacks: every byte comes from where it should, or is zero."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.errors import VolumeError
from blockferry.extents import ExtentSet
from blockferry.layers import BaseLayer, CutLayer, FileLayer, Stack

SIZE = 200


class Bytes(BaseLayer):
    """A layer of plain bytes that has only some of them."""

    def __init__(self, content: bytes, extents: ExtentSet) -> None:
        self.content, self.size, self.extents = content, len(content), extents

    def read_into(self, offset, buffer):
        assert self.extents.covers(offset, offset + len(buffer)), "a layer is asked only for what it has"
        buffer[:] = self.content[offset : offset + len(buffer)]


@st.composite
def layers(draw):
    found = []
    for number in range(draw(st.integers(0, 4))):
        pairs = draw(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 60)), max_size=5))
        found.append(Bytes(bytes([number + 1]) * SIZE, ExtentSet.from_pairs(pairs).clip(0, SIZE)))
    return found


@given(layers(), st.integers(0, SIZE), st.integers(0, SIZE))
def test_the_first_layer_that_has_a_byte_wins(stacked, start, end):
    buffer = bytearray(b"\xff" * max(0, end - start))
    Stack(stacked, SIZE).read_into(start, memoryview(buffer))
    for position, found in enumerate(buffer, start):
        owners = [layer.content[0] for layer in stacked if layer.extents.covers(position, position + 1)]
        assert found == (owners[0] if owners else 0)


@given(
    st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 30)), max_size=6),
    st.integers(0, SIZE),
    st.integers(0, SIZE),
    st.integers(0, 40),
)
def test_what_is_cut_off_reads_as_zero(pairs, start, end, gap):
    wanted = ExtentSet.from_pairs(pairs).clip(0, SIZE)
    whole = Bytes(bytes(range(1, SIZE + 1)), ExtentSet.whole(SIZE))
    buffer = bytearray(b"\xff" * max(0, end - start))
    CutLayer(whole, wanted, gap=gap).read_into(start, memoryview(buffer))
    for position, found in enumerate(buffer, start):
        assert found == (position + 1 if wanted.covers(position, position + 1) else 0)


def test_streaming_gives_the_extents_in_order_in_bounded_pieces(tmp_path):
    path = tmp_path / "image"
    content = os.urandom(10_000)
    path.write_bytes(content)
    wanted = ExtentSet.from_pairs([(100, 50), (1000, 5000), (9999, 1)])
    with path.open("rb") as image:
        layer = FileLayer(image.fileno(), len(content))
        pieces = [(offset, bytes(piece)) for offset, piece in layer.stream(wanted, 1024)]
    assert all(len(piece) <= 1024 for _offset, piece in pieces)
    assert all(content[offset : offset + len(piece)] == piece for offset, piece in pieces)
    assert ExtentSet.from_pairs([(offset, len(piece)) for offset, piece in pieces]) == wanted
    assert layer.bytes_read == wanted.total


def test_a_volume_that_shrank_is_an_error_and_not_zeros(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x" * 5000)
    with path.open("rb") as image:
        layer = FileLayer(image.fileno(), 8192, name=str(path))
        with pytest.raises(VolumeError, match="ends at 5000, but had 8192"):
            layer.read_into(4096, memoryview(bytearray(4096)))
