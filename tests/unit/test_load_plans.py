"""Which sources a load plans with, once it has doubts."""

from __future__ import annotations

import numpy as np

from peerload.config import Config
from peerload.deadline import Deadline
from peerload.geometry import Box
from peerload.load import Job, Member, _Run
from peerload.manifest import Binding, Catalog, Endpoint, Layout, ModelKey, Offer, Piece, Pieces, SourceId, TensorSpec
from peerload.plan import Wants

PLAIN, DERIVED = TensorSpec("a", "F32", (4,)), TensorSpec("p by vllm 1 tp1 ep1 pp1 rank 0", "F32", (4,))


def layout(*tensors: TensorSpec) -> Layout:
    """Each tensor whole, in a buffer of its own."""
    pieces = [Piece(row, Box.whole((4,)), row, 0, (4,)) for row in range(len(tensors))]
    names = tuple(f"buffer {row}" for row in range(len(tensors)))
    return Layout(Catalog.of(tensors), names, np.full(len(tensors), 16, np.int64), Pieces.of(pieces, 1))


def offer(instance: str, held: Layout) -> Offer:
    address = 4096 + 64 * np.arange(len(held.buffer_names))
    return Offer(held, Binding(SourceId(instance, 0, "1"), address, (Endpoint("local", b""),)))


def test_a_seed_that_was_wrong_is_not_asked_again_for_what_the_engine_can_derive() -> None:
    target, address = layout(PLAIN, DERIVED), np.array([4096, 8192], np.int64)
    disk, liar = offer("disk", layout(PLAIN)), offer("liar", layout(PLAIN, DERIVED))
    run = _Run(
        Job(ModelKey("m"), target, address, [], Member("t"), {}, Config(), reserve=[disk], derives=True), Deadline.after(10)
    )
    run.offers, run.suspicion["liar"] = [liar], 1000
    plan = run.plan(Wants.of(target))
    assert {source.instance for source in plan.bytes_by_source} == {"disk"}
    assert run.left == {DERIVED.name}
