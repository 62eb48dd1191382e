#!/usr/bin/env python3
"""Trains the model of a megactl run again in plain PyTorch: the same data in the same order, the same initial weights, its own code.

    PYTHONPATH=. python3 scripts/bench_gpu/plain_loss.py RUN_DIR --output plain.jsonl [--iterations 300] [--compile] [--jitter 1e-4]

RUN_DIR is a run directory of `megactl train`, finished or not: its config.toml says everything. Read through megactl are the batches
(megactl.engine.data), the initial weights (drawn anew from the seed) and the learning rate of each iteration. The model is
plain_models.py, gradients are autograd's, the optimizer is torch.optim.AdamW. One process, one device, whatever layout the run had.

Arithmetic is that of the run: in bf16 weights and activations are bf16, and masters, moments and the sum of the gradients over
micro-batches fp32. (One rounding is left: autograd gives a micro-batch's weight gradient in bf16, megactl's matrix products in fp32.)

--jitter EPSILON multiplies every initial weight by 1 + EPSILON * N(0, 1): how far two such runs drift apart is what rounding alone does,
and the yardstick for the distance between plain PyTorch and megactl. Writes one JSON line an iteration, like metrics.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from plain_models import PlainModel, Shape
from torch import Tensor

from megactl.config import schema, store
from megactl.config.prepare import prepare
from megactl.config.schema import Run
from megactl.config.validate import Resolved
from megactl.engine.data import BatchLoader, build_datasets
from megactl.engine.data.batch import Batch
from megactl.engine.mesh import build_mesh
from megactl.engine.optimizer import learning_rate
from megactl.engine.training_step import TrainingStep

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def resolved_run(run_dir: Path, device: torch.device) -> Resolved:
    """The run as one process on `device` would have it, with the global batch size that it had."""
    loaded = store.read(run_dir)
    with (run_dir / store.FILE_NAME).open("rb") as file:
        derived = tomllib.load(file).get("derived", {})
    training = loaded.run.training
    size = training.global_batch_size or derived["training.global_batch_size"]
    training = dataclasses.replace(training, global_batch_size=size, nproc=1, device=device.type)
    run = dataclasses.replace(loaded.run, training=training, parallel=schema.Parallel(data_parallel=1))
    run = dataclasses.replace(run, logging=dataclasses.replace(run.logging, run_dir=str(run_dir)))
    return prepare(dataclasses.replace(loaded, run=run), os.environ, dry_run=True)[0]


def check(run: Run) -> None:
    """End the program where plain_models.py does not do what the run does."""
    model, data = run.model, run.data
    problems = {
        f"dropout ({model.hidden_dropout}, {model.attention_dropout})": model.hidden_dropout or model.attention_dropout,
        f"precision {run.training.precision}": run.training.precision not in DTYPES,
        "--reset-attention-mask": data.reset_attention_mask,
    }
    wrong = [name for name, holds in problems.items() if holds]
    if wrong:
        raise SystemExit(f"plain_loss: the run has {', '.join(wrong)}, which the plain models have not")


def shape_of(run: Run) -> Shape:
    """The run's model."""
    model = run.model
    encoder = model.architecture == "bert"
    return Shape(
        layers=model.num_layers, hidden=model.hidden_size, heads=model.num_heads, ffn=model.ffn_size or 4 * model.hidden_size,
        vocab=model.vocab_size, rows=-(-model.vocab_size // 128) * 128, positions=model.max_positions, epsilon=model.layernorm_epsilon,
        gelu="tanh" if model.gelu == "tanh" else "none", tied=not model.untie_embeddings, encoder=encoder,
        post=getattr(model, "norm_position", "pre") == "post", sentence=encoder and model.sentence_head is not False,
    )  # fmt: skip


def initial_weights(run: Run, device: torch.device) -> dict[str, Tensor]:
    """megactl's initial weights by name, before any rounding, without padding rows."""
    engine = TrainingStep(run, build_mesh(run.parallel, device))
    return {name: tensor.clone() for name, (_, tensor) in engine.weights().items()}


def batches(run: Run, resolved: Resolved) -> Iterator[list[Batch]]:
    """The micro-batches of each iteration."""
    eod = next((item.value for item in resolved.derived if item.key == "eod"), None)
    wanted = {"train": resolved.batch.consumed_after(run.training.iterations)}
    dataset = build_datasets(run, wanted, run.model.vocab_size, eod, log=lambda text: print(text, file=sys.stderr)).train
    loader = BatchLoader(
        dataset, run.training.micro_batch_size, 0, 1, eod=eod,
        reset_position_ids=run.data.reset_position_ids, reset_attention_mask=False, eod_mask_loss=run.data.eod_mask_loss,
    )  # fmt: skip
    consumed = 0
    for _ in range(run.training.iterations):
        yield [loader.micro_batch(consumed, index) for index in range(resolved.batch.micro_batches(consumed))]
        consumed += resolved.batch.at(consumed)


class PlainTraining:
    """Model, fp32 (or fp64) masters and torch's AdamW."""

    def __init__(self, run: Run, weights: dict[str, Tensor], device: torch.device, *, compiled: bool) -> None:
        self.run, self.device = run, device
        dtype = DTYPES[run.training.precision]
        self.model = PlainModel(shape_of(run)).to(device, dtype)
        named = dict(self.model.named_parameters())
        if set(named) != set(weights):
            raise SystemExit(f"plain_loss: parameters differ: {sorted(set(named) ^ set(weights))}")
        self.params = list(named.values())
        self.masters = [torch.nn.Parameter(_padded(weights[name], parameter.shape)) for name, parameter in named.items()]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        config = run.optimizer
        decayed, rest = ([m for m in self.masters if (m.ndim > 1) == wanted] for wanted in (True, False))
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.epsilon, weight_decay=config.weight_decay, fused=True
        )
        self.write_params()
        self.forward = torch.compile(self.model) if compiled else self.model

    @torch.no_grad()
    def write_params(self) -> None:
        """Round the masters into the weights that the model computes with."""
        for parameter, master in zip(self.params, self.masters, strict=True):
            parameter.copy_(master)

    def step(self, held: list[Batch], rate: float) -> dict[str, Any]:
        """One iteration: the mean losses over the global batch, and the gradient's norm before clipping."""
        held = [batch.to(self.device) for batch in held]
        counts = [sum(batch.loss_mask.sum() for batch in held).clamp(min=1.0)]
        if self.model.shape.sentence:
            counts.append(torch.tensor(float(sum(len(batch.tokens) for batch in held)), device=self.device))
        counts, sums = torch.stack(counts), 0.0
        for batch in held:
            part = self._losses(batch)
            (part / counts).sum().backward()
            sums = sums + part.detach()
            for parameter, master in zip(self.params, self.masters, strict=True):
                master.grad.add_(parameter.grad)
                parameter.grad = None
        losses = (sums / counts).tolist()
        limit = self.run.optimizer.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.masters, limit).item()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.write_params()
        parts = dict(zip(("lm_loss", "sentence_loss"), losses, strict=False)) if len(losses) > 1 else {}
        return {"loss": sum(losses), **parts, "grad_norm": norm}

    def _losses(self, batch: Batch) -> Tensor:
        encoder = (batch.token_types, batch.padding_mask, batch.sentence_labels)
        return self.forward(batch.tokens, batch.position_ids, batch.labels, batch.loss_mask, *encoder)


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    out = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    out[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return out


def train(arguments: argparse.Namespace) -> None:
    """Run the iterations and write a line for each."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    resolved = resolved_run(arguments.run_dir, device)
    run = resolved.run
    check(run)
    weights = initial_weights(run, device)
    generator = torch.Generator(device).manual_seed(arguments.jitter_seed)
    if arguments.jitter:
        for tensor in weights.values():
            tensor.mul_(1.0 + arguments.jitter * torch.randn(tensor.shape, generator=generator, device=device, dtype=tensor.dtype))
    training = PlainTraining(run, weights, device, compiled=arguments.compile)
    del weights
    last = min(run.training.iterations, arguments.iterations or run.training.iterations)
    with arguments.output.open("w") as file:
        for iteration, held in enumerate(batches(run, resolved), start=1):
            started = time.perf_counter()
            rate = learning_rate(run.optimizer, resolved.warmup_iterations, iteration)
            record = {"iteration": iteration, **training.step(held, rate), "learning_rate": rate, "seconds": time.perf_counter() - started}
            file.write(json.dumps(record) + "\n")
            file.flush()
            if iteration % arguments.log_interval == 0 or iteration in (1, last):
                shown = {key: round(value, 6) for key, value in record.items()}
                print(shown, flush=True)
            if iteration == last:
                break


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iterations", type=int, help="end after so many (default: the run's)")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--jitter-seed", type=int, default=0)
    parser.add_argument("--log-interval", type=int, default=50)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
