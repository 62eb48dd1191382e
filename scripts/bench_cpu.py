#!/usr/bin/env python3
"""Times the demo's model on the CPU: megactl in several layouts beside the same model in plain eager PyTorch, in one run.

    .venv/bin/python scripts/bench_cpu.py [--rounds 3] [--steps 20] [--output results.jsonl]

Every contestant does whole optimizer steps (forward, backward, clipping, AdamW) of the same 16 sequences of 128 tokens and may use
two cores: plain PyTorch and megactl on one rank with two threads, two ranks with one thread each, four ranks with one each.
They take turns, round by round, so that a machine that speeds up or slows down does so for all. Reported is the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

SEQ, HIDDEN, LAYERS, HEADS, VOCAB, BATCH, MICRO = 128, 128, 4, 4, 2048, 16, 8
LAYOUTS = {
    "megactl tp1 pp1 dp1": (1, 1, 1),
    "megactl dp2": (1, 1, 2),
    "megactl tp2": (2, 1, 1),
    "megactl pp2": (1, 2, 1),
    "megactl tp2 pp2": (2, 2, 1),
}


def plain_torch_steps(steps: int) -> list[float]:
    """Seconds of each step of a hand-written GPT with autograd, clip_grad_norm_ and fused AdamW, on two threads."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(2)
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
            self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, s, h = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, HEADS, h // HEADS).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h)
            x = x + self.out(y)
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(SEQ, HIDDEN)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(HIDDEN)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            hidden = self.tokens(x) + self.positions(torch.arange(SEQ))
            for block in self.blocks:
                hidden = block(hidden)
            logits = F.linear(self.norm(hidden), self.tokens.weight)
            return F.cross_entropy(logits.view(-1, VOCAB), y.reshape(-1))

    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1))

    def step() -> None:
        for start in range(0, BATCH, MICRO):
            part = tokens[start : start + MICRO]
            (model(part[:, :-1], part[:, 1:]) * MICRO / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, steps)


def megactl_steps(layout: tuple[int, int, int], steps: int, rank: int, port: int) -> list[float]:
    """Seconds of each step of megactl's training step on this rank of a (tp, pp, dp) layout."""
    import torch
    import torch.distributed as dist

    from megactl.config import schema
    from megactl.config.validate import resolve
    from megactl.engine.data import BatchLoader, MockDataset
    from megactl.engine.mesh import build_mesh
    from megactl.engine.training_step import TrainingStep

    tp, pp, dp = layout
    world = tp * pp * dp
    torch.set_num_threads(2 if world == 1 else 1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    run = schema.Run(
        model=schema.Model(num_layers=LAYERS, hidden_size=HIDDEN, num_heads=HEADS, vocab_size=VOCAB),
        parallel=schema.Parallel(tensor_parallel=tp, pipeline_parallel=pp),
        training=schema.Training(micro_batch_size=MICRO, global_batch_size=BATCH, seq_length=SEQ, device="cpu"),
        data=schema.Data(mock_data=True),
    )
    run = resolve(run, world_size=world).run
    mesh = build_mesh(run.parallel, torch.device("cpu"))
    engine = TrainingStep(run, mesh)
    data = MockDataset(BATCH, seq_length=SEQ, vocab_size=VOCAB, seed=0, stream=0)
    loader = BatchLoader(data, MICRO, mesh.dp.rank, mesh.dp.size, eod=None)
    done = iter(range(1, 1_000_000))

    def step() -> None:
        engine.step(next(done), lambda index: loader.micro_batch(0, index), global_batch_size=BATCH, learning_rate=1e-3).loss.item()

    return timed(step, steps)


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Seconds of each of `steps` calls, after five that are not counted."""
    for _ in range(5):
        step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def in_children(world: int, work: Callable[[int], list[float]]) -> list[float]:
    """Run work(rank) in forked processes and return rank 0's seconds."""
    readers = []
    for rank in range(world):
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, json.dumps(work(rank)).encode())
            os._exit(0)
        os.close(write)
        readers.append(read)
    texts = [os.fdopen(read).read() for read in readers]
    for _ in range(world):
        if os.waitstatus_to_exitcode(os.wait()[1]):
            raise SystemExit("a rank failed")
    return json.loads(texts[0])


def main() -> None:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    # Imported before the forks, which then share it.
    import torch  # noqa: F401

    import megactl.engine.training_step  # noqa: F401

    seconds: dict[str, list[float]] = {"plain eager PyTorch": [], **{name: [] for name in LAYOUTS}}
    for turn in range(arguments.rounds):
        seconds["plain eager PyTorch"] += in_children(1, lambda _: plain_torch_steps(arguments.steps))
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            port = 21000 + os.getpid() % 5000 + 10 * turn + number
            world = layout[0] * layout[1] * layout[2]
            seconds[name] += in_children(world, lambda rank, layout=layout, port=port: megactl_steps(layout, arguments.steps, rank, port))
    base = statistics.median(seconds["plain eager PyTorch"])
    print("| contestant | median step (ms) | tokens/s | speed relative to plain PyTorch |\n|---|---:|---:|---:|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median * 1e3:.1f} | {BATCH * SEQ / median:.0f} | {base / median:.2f} |")
        if arguments.output:
            with open(arguments.output, "a") as file:
                file.write(json.dumps({"contestant": name, "median_s": median, "seconds": values}) + "\n")


if __name__ == "__main__":
    main()
