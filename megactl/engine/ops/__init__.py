"""The operators megactl compiles for itself, each with a reference in plain torch. `MEGACTL_OPS=auto|compiled|torch` chooses."""

from megactl.engine.ops.adamw import adamw_
from megactl.engine.ops.gelu import bias_gelu, bias_gelu_backward, bias_gelu_forward
from megactl.engine.ops.library import describe, use_compiled
from megactl.engine.ops.philox import INITIALISATION_STEP, dropout_add, normal_, philox_bits_, stream_of
from megactl.engine.ops.softmax import masked_softmax, masked_softmax_backward

__all__ = [
    "INITIALISATION_STEP",
    "adamw_",
    "bias_gelu",
    "bias_gelu_backward",
    "bias_gelu_forward",
    "describe",
    "dropout_add",
    "masked_softmax",
    "masked_softmax_backward",
    "normal_",
    "philox_bits_",
    "stream_of",
    "use_compiled",
]
