"""Which fused kernel scaled_dot_product_attention takes."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

from megactl.config.schema import Run

# torch asks FlashAttention-2 first; on Hopper and later cuDNN's kernels take about half its time. Those that cannot take an input (a
# dtype, a mask, a head width, a CPU) are passed over, and the last one can always.
ORDER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
# cuDNN's backward under a mask gives NaN for a query whose scores are large (cuDNN 9.19: fp16 from about 100 on, bf16 from 1000).
MASKED_ORDER = ORDER[1:]


def preferred_attention(*, masked: bool) -> AbstractContextManager[None]:
    """Inside it scaled_dot_product_attention tries the kernels in `ORDER`, or in `MASKED_ORDER` where it is given masks."""
    return sdpa_kernel(list(MASKED_ORDER if masked else ORDER), set_priority=True)


def gives_masks(run: Run) -> bool:
    """Whether the run's attention is given masks: of padding, or of other documents."""
    return run.model.architecture == "bert" or run.data.reset_attention_mask
