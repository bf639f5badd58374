"""Models that an engine can't build without memory, and the operator's arguments of engines."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from peerload.engines.twin import _Bounded, built, checked  # noqa: E402
from peerload.errors import ConfigError, LayoutError  # noqa: E402
from peerload.tracing.blame import told  # noqa: E402


class Looks(nn.Module):
    """Its constructor looks at a value."""

    def __init__(self, device: str, features: int = 64) -> None:
        super().__init__()
        scale = torch.ones(1, device=device)
        self.scale = float(scale.item())
        self.weight = nn.Parameter(torch.empty(features, 1024, device=device))


def test_a_model_whose_constructor_looks_at_values_is_built_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = built(lambda device: nn.Linear(3, 4, device=device), "engine 1.0")
        assert model.weight.is_meta
        assert not caplog.messages
        model = built(Looks, "engine 1.0")
    assert not model.weight.is_meta
    (message,) = caplog.messages
    assert (
        "engine 1.0 can't build this model without memory, so it is built in 0.3 MB of it (RuntimeError: Tensor.item()" in message
    )
    assert "at tests/unit/test_twin.py:" in message


def test_what_fails_in_memory_too_is_the_engines_own_error() -> None:
    def make(device: str) -> nn.Module:
        raise AssertionError(f"heads on {device}")

    with pytest.raises(AssertionError, match="heads on cpu"):
        built(make, "engine 1.0")


def test_more_memory_than_there_is_is_refused() -> None:
    """Nobody touches it: what is asked for is counted."""

    def layers(device: str) -> nn.Module:
        return nn.ModuleList(Looks(device, features=1 << 18) for _ in range(10_000))

    for make in (layers, lambda device: Looks(device, features=1 << 40)):
        with pytest.raises(LayoutError, match=r"takes more than the .* GB that are free here") as refused:
            built(make, "engine 1.0")
        assert "--layers" in refused.value.next_step
    with pytest.raises(LayoutError, match="takes more"), _Bounded(1 << 20):
        torch.empty(1 << 21, dtype=torch.uint8)
    with _Bounded(1 << 20) as made:
        kept: list[Tensor] = [torch.empty(1000, dtype=torch.uint8), torch.empty(1 << 21, device="meta")]
        kept.append(kept[0][:500])
    assert made.nbytes == 1000


def test_arguments_that_an_engine_lacks_are_named() -> None:
    def known(model: str, dtype: str = "", quantization: str = "") -> None:
        """An engine's configuration."""

    ours = {"model": "say it with --model"}
    assert checked("engine 1.0", {"dtype": "auto"}, known, ours) == {"dtype": "auto"}
    with pytest.raises(ConfigError, match=r"engine 1\.0 has no argument quantisation") as refused:
        checked("engine 1.0", {"quantisation": 1}, known, ours)
    assert refused.value.next_step == "did you mean quantization?"
    with pytest.raises(ConfigError, match="engine argument model is set by peerload") as refused:
        checked("engine 1.0", {"model": 1}, known, ours)
    assert refused.value.next_step == "say it with --model"


def test_an_error_is_told_with_its_line() -> None:
    heads = 3
    with pytest.raises(AssertionError) as caught:
        assert not heads % 2
    text = told(caught.value)
    assert f"at tests/unit/{Path(__file__).name}:" in text
    assert text.endswith("(assert not heads % 2)")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(3).copy_(torch.empty(4))
    assert "must match the size" in told(caught.value)
    assert told(caught.value).endswith("(torch.empty(3).copy_(torch.empty(4)))")
