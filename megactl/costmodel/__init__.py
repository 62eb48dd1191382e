"""What a run will cost: parameters, FLOPs, hardware peaks, memory. No torch; the one home of these definitions."""

from megactl.costmodel.flops import Utilization, hardware_flops, model_flops, model_flops_per_token, seed_tflops, utilization
from megactl.costmodel.hardware import Gpu, find_gpu, peak_tflops
from megactl.costmodel.memory import Layout, MemoryEstimate, estimate_memory, estimate_stages
from megactl.costmodel.parameters import has_sentence_head, padded_vocab, parameter_parts, rank_parameters, split_layers, total_parameters

__all__ = [
    "Gpu",
    "Layout",
    "MemoryEstimate",
    "Utilization",
    "estimate_memory",
    "estimate_stages",
    "find_gpu",
    "hardware_flops",
    "has_sentence_head",
    "model_flops",
    "model_flops_per_token",
    "padded_vocab",
    "parameter_parts",
    "peak_tflops",
    "rank_parameters",
    "seed_tflops",
    "split_layers",
    "total_parameters",
    "utilization",
]
