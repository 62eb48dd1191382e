"""Names that users of Megatron-LM and DeepSpeed reach for and that this version does not have: what to do instead of each.

A misspelt name gets the nearest one; for these the nearest one would mislead (`--sp` is not a typing error for `--tp`).
"""

from __future__ import annotations

from megactl.config.names import nearest, normal

_LATER = "is not part of this version"

# Keys are in the form of `settings.normal`. A test keeps this table free of names that the schema has.
ABSENT: dict[str, tuple[str, str]] = {
    "num_layers_per_virtual_pipeline_stage": ("is given as chunks a rank here", "use --vpp N, with N = layers / (pp x layers per chunk)"),
    "recompute_activations": ("is a value of --recompute here", "use --recompute selective"),
    "checkpoint_activations": ("is a value of --recompute here", "use --recompute full"),
    "activations_checkpoint_method": ("is --recompute-method here", "use --recompute full with --recompute-method"),
    "activations_checkpoint_num_layers": ("is --recompute-layers here", "use --recompute full with --recompute-layers"),
    "checkpoint_num_layers": ("is --recompute-layers here", "use --recompute full with --recompute-layers"),
    "checkpoint_in_cpu": ("is a value of --offload here", "use --recompute full with --offload activations"),
    "cpu_offload": ("is a value of --offload here", "use --offload optimizer"),
    "optimizer_cpu_offload": ("is a value of --offload here", "use --offload optimizer"),
    "offload_optimizer": ("is a value of --offload here", "use --offload optimizer"),
    "offload_param": ("is a value of --offload here", "use --zero 3 with --offload parameters"),
    "scattered_embeddings": ("is part of sequence parallelism here", "use --sp"),
    "use_distributed_optimizer": ("is called --zero here", "use --zero 1"),
    "zero_stage": ("is called --zero here", "use --zero 0, 1, 2 or 3"),
    "bf16": ("is a value of --precision here", "use --precision bf16"),
    "fp32": ("is a value of --precision here", "use --precision fp32"),
    "fp16": ("is a value of --precision here", "use --precision fp16"),
    "learning_rate": ("is called --lr here", "use --lr"),
    "max_steps": ("is called --iterations here", "use --iterations"),
    "steps": ("is called --iterations here", "use --iterations"),
    "d_model": ("is called --hidden here", "use --hidden"),
    "block_size": ("is called --seq-length here", "use --seq-length"),
    "context_length": ("is called --seq-length here", "use --seq-length"),
    "train_samples": ("is not how the length of a run is set here", "use --iterations"),
    "epochs": ("is not how the length of a run is set here", "use --iterations"),
    "lr_decay_samples": ("is counted in iterations here", "use --lr-decay-iterations"),
    "lr_warmup_samples": ("is counted in iterations here", "use --warmup N"),
    "lr_warmup_fraction": ("is a share of --warmup here", "use --warmup P%, such as --warmup 1%"),
    "save": ("is the run directory here", "use --run-dir"),
    "output_dir": ("is the run directory here", "use --run-dir"),
    "dropout": ("is two settings here", "use --hidden-dropout and --attention-dropout"),
    "batch_size": ("is two settings here", "use --micro-batch-size and --global-batch-size"),
    "gradient_accumulation_steps": ("follows from the batch sizes here", "set --global-batch-size to micro-batch-size x dp x steps"),
    "gas": ("follows from the batch sizes here", "set --global-batch-size to micro-batch-size x dp x steps"),
    "model_parallel_size": ("is two settings here", "use --tp and --pp"),
    "world_size": ("follows from the layout here", "use --nproc for the ranks of this machine, or start with torchrun or srun"),
    "num_gpus": ("follows from the layout here", "use --nproc for the ranks of this machine, or start with torchrun or srun"),
    "gpus": ("follows from the layout here", "use --nproc for the ranks of this machine, or start with torchrun or srun"),
    "vocab_file": (
        "is part of the tokenizer here",
        "use --tokenizer FOLDER, with vocab.json and merges.txt in it, or a vocab.txt",
    ),
    "merge_file": ("is part of the tokenizer here", "use --tokenizer FOLDER, with vocab.json and merges.txt in it"),
    "tokenizer_type": ("is part of the tokenizer here", "use --tokenizer byte, a tokenizer.json, vocab.txt or .model, or a folder"),
    "tokenizer_model": ("is part of the tokenizer here", "use --tokenizer FILE.model"),
    "group_query_attention": ("follows from the number of key and value heads here", "use --kv-heads N"),
    "use_rotary_position_embeddings": ("is a value of --position-embedding here", "use --position-embedding rope"),
    "use_rope_scaling": ("is a factor here", "use --rope-scaling-factor 8, as Llama 3.1 does, or 32, as 3.2"),
    "rope_scaling": ("is a factor here", "use --rope-scaling-factor 8, as Llama 3.1 does, or 32, as 3.2"),
    "rotary_seq_len_interpolation_factor": (_LATER, "use --rope-scaling-factor, which leaves short wavelengths alone"),
    "rotary_interleaved": (_LATER, "leave it out: a head's two halves are turned against each other, as in Hugging Face's Llama"),
    "kv_channels": ("follows from the model here", "leave it out: a head is hidden / heads wide"),
    "head_dim": ("follows from the model here", "leave it out: a head is hidden / heads wide"),
    "hidden_act": ("is called --activation here", "use --activation gelu or --activation swiglu"),
    "hidden_activation": ("is called --activation here", "use --activation gelu or --activation swiglu"),
    "add_qkv_bias": (_LATER, "use --bias for biases in all matrices of the layers"),
    "qk_layernorm": (_LATER, "leave it out: queries and keys are not normalised"),
    "rms_norm": ("is a value of --normalization here", "use --normalization rmsnorm"),
    "num_experts": (_LATER, "leave it out: models are dense"),
    "bert_no_binary_head": ("is called --no-sentence-head here", "use --no-sentence-head"),
    "bert_binary_head": ("is called --sentence-head here", "use --sentence-head"),
    "apply_residual_connection_post_layernorm": (_LATER, "use --norm-position post for LayerNorm after each residual"),
    "num_tokentypes": ("follows from the model here", "use --model bert, which has two token types"),
    "use_flash_attn": ("is a value of --attention here", "use --attention sdpa"),
    "optimizer": ("has one choice here, AdamW", "leave it out"),
    "momentum": ("belongs to an optimizer that is not here", "AdamW has --beta1 and --beta2"),
    "deepspeed_config": ("is not read here", "write the settings into a TOML file for --config"),
}


# Words that people write for a choice that has another name here; the nearest spelling would mislead (half is not a slip for bf16).
_CHOICES: dict[str, str] = {
    **dict.fromkeys(("float16", "half"), "fp16"),
    **dict.fromkeys(("amp", "fp8", "bfloat16", "mixed"), "bf16"),
    **dict.fromkeys(("float32", "float", "single", "full", "tf32"), "fp32"),
    **dict.fromkeys(("float64", "double"), "fp64"),
    **dict.fromkeys(("gpu", "nvidia"), "cuda"),
    **dict.fromkeys(("interleaved", "1f1b_interleaved", "pipedream", "pipedream_flush"), "1f1b"),
    **dict.fromkeys(("zb1p", "zbh1", "zero_bubble", "zb"), "zb-h1"),
    **dict.fromkeys(("zb2p", "zbh2"), "zb-h2"),
    **dict.fromkeys(("zbv", "zbvzerobubble"), "zb-v"),
    **dict.fromkeys(("core_attention", "core_attn"), "selective"),
    **dict.fromkeys(("a2a", "ulysses"), "all-to-all"),
    **dict.fromkeys(("p2p",), "ring"),
    **dict.fromkeys(("flash", "fused", "flash_attention", "cudnn"), "sdpa"),
    **dict.fromkeys(("eager", "local", "reference", "core"), "unfused"),
    **dict.fromkeys(("gpt2", "gpt3", "llama", "decoder"), "gpt"),
    **dict.fromkeys(("roberta", "albert", "megatron_bert", "encoder"), "bert"),
    **dict.fromkeys(("post_ln", "post_layernorm", "after"), "post"),
    **dict.fromkeys(("pre_ln", "pre_layernorm", "before"), "pre"),
    **dict.fromkeys(("learned_absolute", "absolute"), "learned"),
    **dict.fromkeys(("rotary", "llama3"), "rope"),
    **dict.fromkeys(("rms", "rms_norm", "root_mean_square"), "rmsnorm"),
    **dict.fromkeys(("ln", "layer_norm"), "layernorm"),
    **dict.fromkeys(("silu", "swish", "glu", "swi_glu"), "swiglu"),
    **dict.fromkeys(("true", "yes", "1", "on"), "auto"),
    **dict.fromkeys(("false", "no", "0", "off"), "never"),
}


def meant_choice(value: str, choices: tuple[str, ...]) -> str | None:
    """The choice that `value` most likely means: another system's word for it, else the nearest spelling, else None."""
    known = _CHOICES.get(normal(value))
    return known if known in choices else nearest(value, choices)


def absent(name: str) -> tuple[str, str] | None:
    """(rule, what to do instead) for a flag or key that other systems have and this version has not, else None."""
    return ABSENT.get(normal(name))
