"""A stand-in for SGLang's kernels, for tests on a CPU. See `peerload.testing.sglang_stubs`."""

from peerload.testing.sglang_stubs.absent import stand_in

stand_in(__name__, "0.4.10")
