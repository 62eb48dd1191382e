"""The operators megactl compiles for itself, each with a reference in plain torch. `MEGACTL_OPS=auto|compiled|torch` chooses."""

from megactl.engine.ops.adamw import adamw_, adamw_many_
from megactl.engine.ops.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_backward_, cross_entropy_forward
from megactl.engine.ops.gelu import bias_gelu, bias_gelu_backward, bias_gelu_forward
from megactl.engine.ops.gradients import clip_gradients_, scale_, squared_norm
from megactl.engine.ops.library import describe, use_compiled
from megactl.engine.ops.norm import (
    add_layer_norm,
    add_layer_norm_forward,
    add_rms_norm,
    add_rms_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from megactl.engine.ops.philox import INITIALISATION_STEP, dropout_add, dropout_add_rows, normal_, philox_bits_, stream_of
from megactl.engine.ops.rotary import rotary_qkv, rotary_qkv_backward
from megactl.engine.ops.softmax import masked_softmax, masked_softmax_backward
from megactl.engine.ops.swiglu import swiglu, swiglu_backward

__all__ = [
    "INITIALISATION_STEP",
    "adamw_",
    "adamw_many_",
    "add_layer_norm",
    "add_layer_norm_forward",
    "add_rms_norm",
    "add_rms_norm_forward",
    "bias_gelu",
    "bias_gelu_backward",
    "bias_gelu_forward",
    "clip_gradients_",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "cross_entropy_forward",
    "describe",
    "dropout_add",
    "dropout_add_rows",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "masked_softmax",
    "masked_softmax_backward",
    "normal_",
    "philox_bits_",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotary_qkv",
    "rotary_qkv_backward",
    "scale_",
    "squared_norm",
    "stream_of",
    "swiglu",
    "swiglu_backward",
    "use_compiled",
]
