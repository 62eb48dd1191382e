"""Small checkpoints of every layout, made with torch the way their systems make them, and what torch says is in them."""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

HIDDEN, LAYERS, VOCAB, SEQ = 16, 4, 256, 32


def arguments(**changes) -> argparse.Namespace:
    """The arguments that Megatron-LM keeps in its checkpoints, those that matter here."""
    base = dict(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=4 * HIDDEN, padded_vocab_size=VOCAB,
        max_position_embeddings=SEQ, seq_length=SEQ, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, bf16=True, fp16=False,
        swiglu=False, save="/gone", data_path=["a", "b"], lr=1e-4, params_dtype=torch.bfloat16,
    )  # fmt: skip
    return argparse.Namespace(**{**base, **changes})


def gpt_stage(tp: int, pp: int, stage: int, dtype=torch.bfloat16) -> OrderedDict:
    """One rank's weights of a GPT in Megatron-LM's names: layers counted from 0 in each stage, the tied head again on the last one."""
    h, found = HIDDEN, OrderedDict()
    if stage == 0:
        found["embedding.word_embeddings.weight"] = torch.randn(VOCAB // tp, h, dtype=dtype)
        found["embedding.position_embeddings.weight"] = torch.randn(SEQ, h, dtype=dtype)
    for layer in range(LAYERS // pp):
        name = f"decoder.layers.{layer}."
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            found |= {f"{name}{norm}.weight": torch.ones(h, dtype=dtype), f"{name}{norm}.bias": torch.zeros(h, dtype=dtype)}
        for part, (rows, columns, bias) in {
            "linear_qkv": (3 * h // tp, h, 3 * h // tp), "linear_proj": (h, h // tp, h),
            "linear_fc1": (4 * h // tp, h, 4 * h // tp), "linear_fc2": (h, 4 * h // tp, h),
        }.items():  # fmt: skip
            found[f"{name}{part}.weight"] = torch.randn(rows, columns, dtype=dtype)
            found[f"{name}{part}.bias"] = torch.zeros(bias, dtype=dtype)
    if stage == pp - 1:
        found |= {"decoder.final_layernorm.weight": torch.ones(h, dtype=dtype), "decoder.final_layernorm.bias": torch.zeros(h, dtype=dtype)}
        if pp > 1:
            found["word_embeddings_for_head.weight"] = torch.randn(VOCAB // tp, h, dtype=dtype)
    return found


def rng_states() -> list[dict]:
    """The state of every generator, as Megatron-LM keeps it."""
    return [{
        "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }]  # fmt: skip


def adam(weights: dict) -> dict:
    """Adam's state and the master copy, in Megatron-LM's form."""
    values = list(weights.values())
    return {
        "optimizer": {
            "state": {i: {"step": 3, "exp_avg": torch.zeros(v.shape), "exp_avg_sq": torch.zeros(v.shape)} for i, v in enumerate(values)},
            "param_groups": [{"lr": 1e-4, "params": list(range(len(values)))}],
        },
        "grad_scaler": {"scale": torch.tensor([1.0])},
        "fp32_from_fp16_params": [[v.float() for v in values]],
    }


def megatron(root: Path, *, tp: int = 2, pp: int = 2, distributed: bool = False, iteration: int = 1000, legacy: bool = False) -> Path:
    """A Megatron-LM folder with its pointer. `distributed`: the distributed optimizer's file beside; `legacy`: the format before zip."""
    folder = root / f"iter_{iteration:07d}"
    args = arguments(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, use_distributed_optimizer=distributed)
    for t in range(tp):
        for p in range(pp):
            rank = folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            rank.mkdir(parents=True)
            weights = gpt_stage(tp, pp, p)
            state = {"args": args, "checkpoint_version": 3.0, "iteration": iteration, "model": weights, "rng_state": rng_states(),
                     "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 64}}  # fmt: skip
            if distributed:
                count = sum(v.numel() for v in weights.values())
                buffer = {key: torch.zeros(count) for key in ("param", "exp_avg", "exp_avg_sq")} | {"numel_unpadded": count}
                optim = {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): buffer}}
                torch.save(optim, rank / "distrib_optim.pt")
            else:
                state["optimizer"] = adam(weights)
            torch.save(state, rank / "model_optim_rng.pt", _use_new_zipfile_serialization=not legacy)
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def deepspeed_pipeline(root: Path, *, tp: int = 2, pp: int = 2, dp: int = 2, zero: int = 1, bf16: bool = False, step: int = 500) -> Path:
    """Megatron-DeepSpeed with a pipeline: a file for each layer and tp rank, one for each rank's optimizer (ZeRO 1: and replica)."""
    folder = root / f"global_step{step}"
    folder.mkdir(parents=True)
    args = arguments(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    for t in range(tp):
        whole = gpt_stage(tp, 1, 0)
        pieces: dict[int, OrderedDict] = {1: OrderedDict(), LAYERS + 4: OrderedDict()}
        for name, value in whole.items():
            index = 1 if name.startswith("embedding") else LAYERS + 4 if "final" in name else 3 + int(name.split(".")[2])
            pieces.setdefault(index, OrderedDict())[name.rpartition("layers.")[2]] = value
        for index, piece in pieces.items():
            torch.save(piece, folder / f"layer_{index:02d}-model_{t:02d}-model_states.pt")
        for p in range(pp):
            mp, count = p * tp + t, sum(v.numel() for v in gpt_stage(tp, pp, p).values())
            top = {"module": None, "args": args, "global_steps": step, "dp_world_size": dp, "mp_world_size": tp * pp, "ds_version": "0.9",
                   "ds_config": {"zero_optimization": {"stage": zero}}, "random_rng_state": random.getstate()}  # fmt: skip
            if not zero:
                top["optimizer"] = {"fp32_groups": [[torch.zeros(count)]], "optimizer_state_dict": {"state": {
                    0: {"exp_avg": torch.zeros(count), "exp_avg_sq": torch.zeros(count)}}, "param_groups": []}}  # fmt: skip
            torch.save(top, folder / f"mp_rank_{mp:02d}_model_states.pt")
            for d in range(dp if zero else 0):
                share = torch.zeros(count // dp + (count % dp if d == dp - 1 else 0))
                state = {"zero_stage": 1, "partition_count": dp, "single_partition_of_fp32_groups": [share.clone()]}
                state["base_optimizer_state"] = [{"exp_avg": share.clone(), "exp_avg_sq": share.clone()}]
                name = ("bf16_" if bf16 else "") + f"zero_pp_rank_{d}_mp_rank_{mp:02d}_optim_states.pt"
                torch.save({"optimizer_state_dict": state, "ds_version": "0.9"}, folder / name)
    (root / "latest").write_text(folder.name)
    return folder


def deepspeed_flat(root: Path, *, zero: int, dp: int = 2, step: int = 20) -> Path:
    """DeepSpeed without a pipeline, ZeRO 0 to 3."""
    folder = root / f"global_step{step}"
    folder.mkdir(parents=True)
    weights = gpt_stage(1, 1, 0)
    count = sum(v.numel() for v in weights.values())
    top = {"dp_world_size": dp, "mp_world_size": 1, "global_steps": step, "ds_config": {"zero_optimization": {"stage": zero}}}
    if zero < 3:
        optimizer = {"optimizer": adam(weights)} if not zero else {}
        torch.save(top | {"module": weights} | optimizer, folder / "mp_rank_00_model_states.pt")
    for d in range(dp if zero else 0):
        share = count // dp + (count % dp if d == 0 else 0)
        moments = {key: torch.zeros(share) for key in ("exp_avg", "exp_avg_sq")}
        if zero == 3:
            shapes = [OrderedDict((name, value.shape) for name, value in weights.items())]
            empty = OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in weights)
            path = folder / f"zero_pp_rank_{d}_mp_rank_00_model_states.pt"
            torch.save(top | {"module": empty, "param_shapes": shapes}, path)
            state = {"zero_stage": 3, "partition_count": dp, "fp32_flat_groups": [torch.zeros(share)], "optimizer_state_dict": {
                "state": {0: {"step": 3, **moments}}, "param_groups": []}}  # fmt: skip
        else:
            state = {
                "zero_stage": zero,
                "single_partition_of_fp32_groups": [torch.zeros(share)],
                "base_optimizer_state": {"state": {0: moments}},
            }
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{d}_mp_rank_00_optim_states.pt")
    (root / "latest").write_text(folder.name)
    return folder


def universal(root: Path, *, step: int = 20) -> Path:
    """ds_to_universal's output."""
    folder = root / f"global_step{step}_universal"
    for name, value in gpt_stage(1, 1, 0).items():
        (folder / "zero" / name).mkdir(parents=True)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            torch.save({"param": value.float(), "cat_dim": 0}, folder / "zero" / name / f"{state}.pt")
    torch.save({"module": None, "args": arguments(), "iteration": step}, folder / "mp_rank_00_model_states.pt")
    (root / "latest_universal").write_text(folder.name)
    return folder


def huggingface(root: Path, *, shards: int = 2, kind: str = "safetensors") -> Path:
    """A sharded Hugging Face folder with the Trainer's files."""
    from safetensors.torch import save_file

    root.mkdir(parents=True, exist_ok=True)
    weights = gpt_stage(1, 1, 0)
    stem, names = {"safetensors": "model", "bin": "pytorch_model"}[kind], list(weights)
    index: dict = {"metadata": {"total_size": sum(v.nbytes for v in weights.values())}, "weight_map": {}}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{kind}"
        part = {name: weights[name] for name in names[shard::shards]}
        index["weight_map"] |= dict.fromkeys(part, file)
        save_file(part, root / file, metadata={"format": "pt"}) if kind == "safetensors" else torch.save(part, root / file)
    (root / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    config = {"model_type": "gpt2", "n_layer": LAYERS, "n_embd": HIDDEN, "n_head": 4, "vocab_size": VOCAB, "n_positions": SEQ}
    (root / "config.json").write_text(json.dumps(config))
    (root / "trainer_state.json").write_text(json.dumps({"global_step": 77}))
    torch.save({"state": adam(weights)["optimizer"]["state"], "param_groups": []}, root / "optimizer.pt")
    torch.save({"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}, root / "rng_state.pth")
    return root


def distributed(root: Path, *, megatron_keys: bool = True, iteration: int = 7) -> Path:
    """A DCP folder as one process writes it; with Megatron-LM's keys and files, or FSDP's."""
    import warnings

    import torch.distributed.checkpoint as dcp

    folder = root / (f"iter_{iteration:07d}" if megatron_keys else "step-7")
    weights = gpt_stage(1, 1, 0)
    state: dict = {(name if megatron_keys else f"model.{name}"): value for name, value in weights.items()}
    for name, value in weights.items():
        for kind in ("exp_avg", "exp_avg_sq", "fp32_param")[: 3 if megatron_keys else 2]:
            state[f"optimizer.state.{kind}.{name}" if megatron_keys else f"optim.state.{name}.{kind}"] = torch.zeros(value.shape)
    state["rng_state/shard_0_0"] = rng_states()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    if megatron_keys:
        torch.save({"args": arguments(), "iteration": iteration, "checkpoint_version": 3.0}, folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
        (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


class Makers:
    """The functions above, for tests that cannot import this file by name."""

    arguments, gpt_stage, adam, rng_states = map(staticmethod, (arguments, gpt_stage, adam, rng_states))
    megatron, deepspeed_pipeline, deepspeed_flat = map(staticmethod, (megatron, deepspeed_pipeline, deepspeed_flat))
    universal, huggingface, distributed = map(staticmethod, (universal, huggingface, distributed))


@pytest.fixture(scope="session")
def make():
    return Makers
