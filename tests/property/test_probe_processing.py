"""Probes of what an engine does after loading: tensors replaced, repacked, removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

torch = pytest.importorskip("torch")
from probed import MIXED, Plain, specs  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from peerload.errors import LayoutError  # noqa: E402
from peerload.tracing.probe.decoded import told_boxes  # noqa: E402
from peerload.tracing.probe.run import changes, probe  # noqa: E402


def after(finish: Callable[[Plain], object], dtype: str = "BF16") -> tuple[str, str]:
    catalog = specs(w=(dtype, (4, 6)))

    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        model.load(weights, lambda w: {"p": w["w"]})

    loaded = probe(lambda: Plain(p=(dtype, (4, 6))), load, catalog)
    processed = probe(lambda: Plain(p=(dtype, (4, 6))), load, catalog, finish=finish)
    return changes(loaded, processed)["p"]


def replaced(model: Plain, tensor: Tensor) -> None:
    model.p = nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize(
    ("finish", "kind"),
    [
        (lambda m: None, "unchanged"),
        (lambda m: replaced(m, m.p.data.t()), "unchanged"),  # the same bytes
        (lambda m: replaced(m, m.p.data.t().contiguous()), "permuted"),
        (lambda m: replaced(m, torch.nn.functional.pad(m.p.data, (0, 2))), "permuted"),
        (lambda m: replaced(m, m.p.data / m.p.data.max()), "opaque"),
        (lambda m: replaced(m, torch.empty(0)), "gone"),
        (lambda m: delattr(m, "p"), "gone"),
        (lambda m: replaced(m, torch.ones(3)), "constant"),
        (lambda m: replaced(m, m.p.data[: 2 + int(m.p.data[0, 0]) % 2]), "opaque"),  # a shape out of a value
    ],
)
def test_what_post_processing_did(finish: Callable[[Plain], object], kind: str) -> None:
    assert after(finish)[0] == kind


def test_nibbles_are_followed_through_a_repack() -> None:
    """Rows of eight packed numbers, made into columns: no 32-bit word survives, every nibble does."""
    catalog = specs(q=("I32", (2, 3)), scale=("BF16", (3,)))

    def unpacked(words: Tensor) -> Tensor:
        return torch.stack([words >> 4 * i & 15 for i in range(8)], dim=-1).reshape(words.shape[0], -1)

    def packed(nibbles: Tensor) -> Tensor:
        rows = nibbles.reshape(nibbles.shape[0], -1, 8).long()
        word = sum(rows[..., i] << 4 * i for i in range(8))
        return torch.where(word >= 2**31, word - 2**32, word).int()

    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        model.load(weights, lambda w: {"p": w["q"], "s": w["scale"]})

    def finish(model: Plain) -> None:
        model.p = nn.Parameter(packed(unpacked(model.p.data).reshape(2, 3, 8).transpose(0, 1).reshape(6, 8)), requires_grad=False)
        model.r = nn.Parameter(packed(unpacked(model.p.data).flip(1)), requires_grad=False)

    def build() -> Plain:
        return Plain(p=("I32", (2, 3)), s=("BF16", (3,)))

    whole = probe(build, load, catalog, finish=finish)
    assert whole.buffers["r"].kind == "opaque"
    probed = probe(build, load, catalog, finish=finish, bits=4)
    seen = probed.buffers["r"]
    assert (seen.kind, seen.split) == ("copy", 8)
    nibbles = torch.arange(48).reshape(2, 3, 8).transpose(0, 1).reshape(6, 8)
    assert probed.buffers["p"].ids.tolist() == nibbles.flatten().tolist()
    assert seen.ids.tolist() == nibbles.flip(1).flatten().tolist()
    assert probed.buffers["s"].kind == "copy"
    assert "boxes of 4-bit units: q[" in told_boxes(probed, seen)
    assert probed.numbering.name(9) == "q[0, 1] bits 4:8"


def test_a_package_that_post_processing_lacks_is_said() -> None:
    def finish(model: Plain) -> None:
        raise ModuleNotFoundError("No module named 'kernels'")

    with pytest.raises(LayoutError, match=r"post-processing fails .*: ModuleNotFoundError: No module named 'kernels' at tests/"):
        probe(lambda: Plain(p=("BF16", (3,))), lambda model, weights: None, MIXED, finish=finish)
