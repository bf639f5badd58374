"""A stand-in for torchvision, for tests of SGLang on a CPU. See `peerload.testing.sglang_stubs`."""

from peerload.testing.sglang_stubs.absent import stand_in

stand_in(__name__, "0.28.0")
