"""vLLM's platform while a model is built that no kernel will ever run: this host's, or a CUDA host's on one that has none.

What a layer's parameters are before post-processing is up to its quantization method, whatever kernel serves it. So a kernel
counts as usable if it could serve the layer on some processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers import sparse_attn_indexer
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability, PlatformEnum, UnspecifiedPlatform

#: Questions to vLLM's CUDA library about what a GPU can do, which a library built for CPUs lacks.
_CUDA_QUESTIONS: Final = (
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_group_gemm_supported",
    "mxfp4_experts_quant_supported",
)


class _Cuda(CpuPlatform):
    """A CPU's platform, by which models can be built here, that answers as one of an H100 does when it is asked what it is."""

    _enum = PlatformEnum.CUDA

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        del device_id
        return DeviceCapability(9, 0)

    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:  # noqa: ANN401 - vLLM's
        """Attention has no weights: a backend for dense attention stands for one for sparse attention."""
        dense = attn_selector_config._replace(use_sparse=False)
        return str(super().get_attn_backend_cls(selected_backend, dense, num_heads))


def has_cuda() -> bool:
    return bool(current_platform.is_cuda())


@contextmanager
def some_platform() -> Iterator[None]:
    """A vLLM built for GPUs knows no platform where there is none, and configures nothing without one: a CPU's will do."""
    with _platform(CpuPlatform if type(current_platform) is UnspecifiedPlatform else type(current_platform)):
        yield


@contextmanager
def cuda_platform() -> Iterator[None]:
    """As on a CUDA host: its lists of kernels, and its answers."""
    if has_cuda():
        yield
        return
    with _platform(_Cuda), ExitStack() as stack:
        for name in _CUDA_QUESTIONS:
            if not hasattr(torch.ops._C, name):
                setattr(torch.ops._C, name, lambda *_: True)
                stack.callback(delattr, torch.ops._C, name)
        stack.callback(setattr, sparse_attn_indexer, "has_deep_gemm", sparse_attn_indexer.has_deep_gemm)
        sparse_attn_indexer.has_deep_gemm = lambda: True
        yield


@contextmanager
def _platform(kind: type) -> Iterator[None]:
    found = type(current_platform)
    current_platform.__class__ = kind
    try:
        yield
    finally:
        current_platform.__class__ = found


@contextmanager
def any_linear_kernel() -> Iterator[None]:
    """Accept kernels that could serve a layer if this host's processor were another one."""
    honest = linear.is_supported_and_can_implement_kernel
    linear.is_supported_and_can_implement_kernel = lambda kernel, config, _capability: kernel.can_implement(config)
    try:
        yield
    finally:
        linear.is_supported_and_can_implement_kernel = honest


@contextmanager
def any_experts_kernel() -> Iterator[None]:
    """The same for layers of experts."""
    honest = FusedMoEExperts.is_supported_config

    def anywhere(*arguments: object) -> tuple[bool, str | None]:
        accepted, reason = honest(*arguments)
        return (True, None) if reason is not None and "current device" in reason else (accepted, reason)

    FusedMoEExperts.is_supported_config = staticmethod(anywhere)
    try:
        yield
    finally:
        FusedMoEExperts.is_supported_config = staticmethod(honest)
