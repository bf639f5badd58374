from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from peerload.errors import ManifestError
from peerload.model.boxes import Box
from peerload.model.catalog import Catalog, ModelKey, Parallel, TensorSpec
from peerload.model.layout import Constant, Layout, Piece, Pieces
from peerload.model.offer import Binding, Offer, SourceId

CATALOG = Catalog.of([TensorSpec("scale", "F32", ()), TensorSpec("w", "BF16", (4, 6)), TensorSpec("tied", "BF16", (4, 6))])


def rows(**changes: object) -> Pieces:
    """The scale, and w's right half transposed; one column of the second row may be replaced."""
    scale = Piece(0, Box((), ()), 0, 0, ())
    half = Piece(1, Box((0, 3), (4, 6)), 1, 4, (2, 8))
    return Pieces.of([scale, half._replace(**changes)], CATALOG.width)


def layout(pieces: Pieces | None = None, **changes: object) -> Layout:
    return dataclasses.replace(
        Layout(CATALOG, ("scales", "w"), np.array([4, 28]), rows() if pieces is None else pieces), **changes
    )


def test_a_layout_reads_back_as_it_was_written() -> None:
    made = layout()
    assert made.describe(1) == "w[0:4, 3:6]"
    assert made.describe(0) == "scale[]"
    assert made.tensor_of(1) == TensorSpec("w", "BF16", (4, 6))
    assert made.piece_nbytes.tolist() == [4, 24]
    assert made.nbytes == 28
    assert CATALOG.width == 2
    assert CATALOG.nbytes == 4 + 48 + 48
    assert CATALOG.row["w"] == 1
    assert CATALOG.shape.tolist() == [[1, 1], [4, 6], [4, 6]]
    assert list(CATALOG) == [CATALOG[i] for i in range(3)]


def test_catalogs_are_equal_by_content() -> None:
    assert Catalog.of(list(CATALOG)) == CATALOG
    assert Catalog.of(reversed(list(CATALOG))) != CATALOG


def test_columns_can_not_be_written_through() -> None:
    source = np.array([4, 28])
    made = layout(buffer_nbytes=source)
    source[0] = 99
    assert made.buffer_nbytes.tolist() == [4, 28]
    for column in (made.buffer_nbytes, made.pieces.offset, made.pieces.start, CATALOG.itemsize):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no model name": (lambda: ModelKey(""), "model.name"),
    "no ranks": (lambda: Parallel(tp=0), "parallel.tp"),
    "a name twice": (lambda: Catalog.of([CATALOG[1], CATALOG[1]]), "catalog.names"),
    "an unknown dtype": (lambda: Catalog.of([TensorSpec("w", "F7", (1,))]), r"catalog\[w\].dtype"),
    "an empty tensor": (lambda: Catalog.of([TensorSpec("w", "F32", (3, 0))]), r"catalog\[w\].shape"),
    "nine dimensions": (lambda: Catalog.of([TensorSpec("w", "F32", (1,) * 9)]), "catalog.shapes"),
    "a tensor that isn't there": (lambda: layout(rows(tensor=3)), r"pieces\[1\].tensor"),
    "a negative tensor": (lambda: layout(rows(tensor=-1)), r"pieces\[1\].tensor"),
    "a buffer that isn't there": (lambda: layout(rows(buffer=2)), r"pieces\[1\].buffer"),
    "a box outside its tensor": (lambda: layout(rows(box=Box((0, 4), (4, 7)))), r"pieces\[1\].stop.*outside the tensor"),
    "an offset past the end": (lambda: layout(rows(offset=5)), r"pieces\[1\].offset.*outside its buffer"),
    "a negative offset": (lambda: layout(rows(offset=-1)), r"pieces\[1\].offset"),
    "a stride below the buffer": (lambda: layout(rows(strides=(-2, 8))), r"pieces\[1\].offset"),
    "rows on each other": (lambda: layout(rows(strides=(2, 6))), r"pieces\[1\].stride"),
    "boxes of another width": (lambda: layout(Pieces.of([], 3)), r"pieces.start.*3 dimensions"),
    "a negative size": (lambda: layout(buffer_nbytes=np.array([4, -1])), r"buffers\[1\].nbytes"),
    "a size too few": (lambda: layout(buffer_nbytes=np.array([4])), "layout.buffers"),
    "a constant outside": (lambda: layout(constants=(Constant(1, 20, (5,), (2,), b"\0\0"),)), r"constants\[0\].offset"),
    "a constant without a buffer": (lambda: layout(constants=(Constant(7, 0, (), (), b"\0"),)), r"constants\[0\].buffer"),
    "a constant of no bytes": (lambda: layout(constants=(Constant(0, 0, (), (), b""),)), r"constants\[0\]"),
    "an alias of nothing": (lambda: layout(aliases={"head": "w"}), r"aliases\[head\]"),
    "a negative address": (lambda: binding([0, -1]), r"binding.address\[1\]"),
    "an address too few": (lambda: Offer(layout(), binding([0])), "binding.address"),
    "a digest too few": (lambda: Offer(layout(), binding([0, 64], digests=np.zeros(1, np.uint64))), "binding.digests"),
}


def binding(address: list[int], **more: object) -> Binding:
    return dataclasses.replace(Binding(SourceId("seed", 0, "1"), np.array(address), ()), **more)


@pytest.mark.parametrize("name", BAD)
def test_what_contradicts_itself_can_not_be_constructed_and_the_field_is_named(name: str) -> None:
    make, field = BAD[name]
    with pytest.raises(ManifestError, match=field):
        make()


def test_pieces_and_constants_must_not_share_a_byte() -> None:
    layout().prove_disjoint()
    for extra in (
        {"constants": (Constant(1, 26, (), (), b"\0\0"),)},
        {"constants": (Constant(1, 0, (), (), b"\0\0"), Constant(1, 1, (), (), b"\0\0"))},
    ):
        with pytest.raises(ManifestError, match="share a byte"):
            layout(**extra).prove_disjoint()


def test_tied_names_describe_the_same_bytes() -> None:
    both = Pieces.of([Piece(t, Box((0, 0), (4, 6)), 0, 0, (12, 2)) for t in (1, 2)], 2)
    untied = Layout(CATALOG, ("w",), np.array([48]), both)
    with pytest.raises(ManifestError, match=r"w\[0:4, 0:6\] and tied\[0:4, 0:6\] share a byte"):
        untied.prove_disjoint()
    tied = dataclasses.replace(untied, aliases={"tied": "w"})
    tied.prove_cover()
    assert tied.written.tolist() == [0]


def test_every_byte_has_a_stated_origin() -> None:
    with pytest.raises(ManifestError, match=r"buffers\[w\]: 4 bytes"):
        layout().prove_cover()
    layout(constants=(Constant(1, 0, (2,), (2,), b"\0\0"),)).prove_cover()
