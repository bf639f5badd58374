"""Which sources a load plans with: those it can read and trust, and for which it waits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from peerload.config import Config
from peerload.deadline import Deadline
from peerload.errors import PlanError
from peerload.integrity.claims import Claims, Measured
from peerload.integrity.verdict import compare
from peerload.job.exchange import Group
from peerload.job.load import Job, _Run
from peerload.job.rank import Member, Rank
from peerload.job.tally import Tally
from peerload.model.boxes import Box
from peerload.model.catalog import Catalog, ModelKey, TensorSpec
from peerload.model.layout import Layout, Piece, Pieces
from peerload.model.offer import Binding, Endpoint, Offer, SourceId
from peerload.planning.wants import Wants
from peerload.transport.files import FilesTransport
from peerload.transport.local import LocalTransport
from peerload.transport.process import boot_id

PLAIN, OTHER = TensorSpec("a", "F32", (4,)), TensorSpec("b", "F32", (4,))
CONFIG = Config()
DERIVED = TensorSpec("p by vllm 1 tp1 ep1 pp1 rank 0", "F32", (4,))


def layout(*tensors: TensorSpec, **more: object) -> Layout:
    """Each tensor whole, in a buffer of its own."""
    pieces = [Piece(row, Box.whole((4,)), row, 0, (4,)) for row in range(len(tensors))]
    names, sizes = tuple(f"buffer {row}" for row in range(len(tensors))), np.full(len(tensors), 16, np.int64)
    return Layout(Catalog.of(tensors), names, sizes, Pieces.of(pieces, 1), **more)  # type: ignore[arg-type]


def offer(instance: str, held: Layout, transport: str = "local", host: str = "", changes: int = 0, rank: int = 0) -> Offer:
    address = 4096 + 64 * np.arange(len(held.buffer_names))
    digests = np.zeros(len(held.pieces), np.uint64)
    source = SourceId.new(instance, rank, changes)
    return Offer(held, Binding(source, address, (Endpoint(transport, b""),), digests=digests, host=host))


def run_of(wanted: Layout, *, reserve: Sequence[Offer] = (), derives: bool = False, config: Config = CONFIG) -> _Run:
    address = 4096 + 64 * np.arange(len(wanted.buffer_names))
    with closing(LocalTransport(1)) as local, closing(FilesTransport()) as files:
        transports = {"local": local, "files": files}
    job = Job(Rank(ModelKey("m"), wanted, address, [], Member("t"), config), reserve, derives)
    deadline = Deadline.after(10)
    return _Run(job, transports, Group("t", 0, 1, None, deadline), deadline, Tally())


def test_a_seed_that_was_wrong_is_not_asked_again_for_what_the_engine_can_derive() -> None:
    disk, liar = offer("disk", layout(PLAIN), "files"), offer("liar", layout(PLAIN, DERIVED))
    run = run_of(layout(PLAIN, DERIVED), reserve=[disk], derives=True)
    run.sources.see([liar])
    run.sources.suspicion["liar"] = 1000
    plan = run.plan(Wants.of(run.ledger.layout))
    assert {source.instance for source in plan.bytes_by_source} == {"disk"}
    assert run.sources.left == {DERIVED.name}


def test_sources_out_of_reach_are_left_out_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    here, unknown = offer("here", layout(PLAIN), host=boot_id()), offer("unknown", layout(PLAIN))
    far = [offer(f"far{i}", layout(PLAIN, OTHER), host="another") for i in range(20)]
    pigeons = offer("pigeons", layout(PLAIN), "pigeons")
    run = run_of(layout(PLAIN, OTHER))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run.sources.see([here, *far, unknown, pigeons])
    assert [o.source.instance for o in run.sources.offers] == ["here", "unknown"]
    (line,) = [r.getMessage() for r in caplog.records]
    assert "leaves out 21 sources" in line
    with pytest.raises(PlanError) as error:
        run.plan(Wants.of(run.ledger.layout))
    assert "far0/rank 0: is on another host, and offers local only" in str(error.value)
    assert "pigeons/rank 0: it offers pigeons, here is local, files" in {str(r) for r in error.value.refusals}


def test_a_peer_under_the_name_of_the_own_checkpoint_is_left_out() -> None:
    """When it fails, the checkpoint is still there."""
    disk = offer("disk", layout(PLAIN), "files")
    twin = replace(disk, binding=replace(disk.binding, endpoints=(Endpoint("local", b""),)))
    run = run_of(layout(PLAIN), reserve=[disk])
    run.sources.see([twin])
    assert run.sources.offers == []
    assert list(run.plan(Wants.of(run.ledger.layout)).offers) == [disk]


def test_ranks_that_have_not_changed_yet_are_left_out() -> None:
    run = run_of(layout(PLAIN))
    run.sources.see(
        [offer("a", layout(PLAIN), changes=2), offer("a", layout(PLAIN), changes=1, rank=1), offer("b", layout(PLAIN))]
    )
    assert [(o.source.instance, o.source.rank) for o in run.sources.offers] == [("a", 0), ("b", 0)]


def test_what_is_waited_for() -> None:
    gone = {OTHER.name: "rewritten by post-processing"}
    whole, disk = layout(PLAIN, OTHER, DERIVED), offer("disk", layout(PLAIN, OTHER), "files")

    def enough(*there: Offer, **more: object) -> bool:
        run = run_of(whole, **more)  # type: ignore[arg-type]
        return run.sources.suffice(Wants.of(whole), there)

    complete, kept = offer("s", whole), offer("s", layout(PLAIN, ignored=gone))
    lacking = offer("s", layout(PLAIN))
    assert enough(complete)
    assert not enough(replace(complete, binding=replace(complete.binding, digests=None)))
    assert not enough(offer("s", whole, host="another"))
    assert not enough()
    assert not enough(reserve=[disk], derives=True)  # nobody is there
    assert not enough(offer("s", layout(PLAIN, OTHER)))
    assert enough(offer("s", layout(PLAIN, OTHER)), derives=True)  # the caller makes what is derived
    assert enough(kept, reserve=[disk], derives=True)  # no seed will have it again, and the disk has
    assert not enough(kept, derives=True)
    assert not enough(kept, reserve=[disk])
    assert not enough(kept, reserve=[disk], derives=True, config=Config(fallback="fail"))
    assert not enough(lacking, reserve=[disk], derives=True)  # a rank of it that isn't there yet


def test_what_is_half_received_and_then_left_counts_for_nothing() -> None:
    wanted = layout(PLAIN, DERIVED)
    run = run_of(wanted, derives=True, config=Config(verify="off"))
    number = run.ledger.numbers([SourceId("s", 0, "1")])
    run.ledger.add(np.array([0, 1]), np.array([[0], [0]]), np.array([[4], [2]]), number[[0, 0]])
    run.sources.see([offer("s", layout(PLAIN))])
    plan = run.plan(Wants(wanted, np.array([1]), np.array([[2]]), np.array([[4]])))
    assert len(plan) == 0
    none, boxes = np.zeros(0, np.int64), np.zeros((0, 1), np.int64)
    nothing = Measured(wanted.catalog, none, none, boxes, boxes, np.zeros(0, np.uint64), none, ())
    receipt = run.receipt(compare(Claims.of(wanted.catalog, []), nothing))
    assert (receipt.needed_nbytes, receipt.unverified_nbytes, receipt.left) == (16, 16, (DERIVED.name,))
    assert receipt.sources["s/rank 0"].nbytes == 16


def test_what_the_engine_was_to_derive_stays_so_when_a_seed_that_has_it_comes_later() -> None:
    """A part of it that came before counts for nothing any more, and would not be read again."""
    wanted = layout(PLAIN, DERIVED)
    run = run_of(wanted, derives=True, config=Config(verify="off"))
    rest = Wants(wanted, np.array([0, 1]), np.array([[0], [2]]), np.array([[4], [4]]))
    with pytest.raises(PlanError):
        run.plan(rest)  # nobody has either of them
    run.sources.see([offer("s", wanted)])
    plan = run.plan(rest)
    assert run.sources.left == {DERIVED.name}
    assert plan.wants.piece.tolist() == [0]
