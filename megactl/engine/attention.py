"""Which fused kernel scaled_dot_product_attention takes."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

# torch asks FlashAttention-2 first; on Hopper and later cuDNN's kernels take about half its time. Those that cannot take an input (a
# dtype, a mask, a head width, a CPU) are passed over, and the last one can always.
ORDER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def preferred_attention() -> AbstractContextManager[None]:
    """Inside it scaled_dot_product_attention tries the kernels in `ORDER`."""
    return sdpa_kernel(list(ORDER), set_priority=True)
