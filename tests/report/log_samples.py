"""Lines of every era and system, written for the tests in the shapes that their sources print; and mutations of them."""

from __future__ import annotations

import random

TAIL = "number of skipped iterations:   0 | number of nan iterations:   0 |"

# One iteration line of each era: (text, iteration, total, seconds, loss or None, TFLOPs or None).
ERAS: dict[str, tuple[str, int, int, float, float | None, float | None]] = {
    "2019": (
        " iteration      100/  500000 | elapsed time per iteration (ms): 512.3 | learning rate: 1.500E-04 | lm loss: 6.543210E+00 |"
        " loss scale: 65536.0 |",
        *(100, 500000, 0.5123, 6.54321, None),
    ),
    "1.1.5": (
        f" iteration        7/    1000 | elapsed time per iteration (ms): 120345.6 | learning rate: 3.750E-05 | lm loss: 1.103311E+01 |"
        f" loss scale: 1024.0 | {TAIL}",
        *(7, 1000, 120.3456, 11.03311, None),
    ),
    "2021": (
        f" iteration        5/     500 | consumed samples:         2560 | elapsed time per iteration (ms): 3526.4 |"
        f" learning rate: 9.375E-05 | global batch size:   512 | lm loss: 9.812345E+00 | loss scale: 8192.0 | grad norm: 3.412 | {TAIL}",
        *(5, 500, 3.5264, 9.812345, None),
    ),
    "2021-bert": (
        " iteration       20/ 1000000 | consumed samples:           80 | elapsed time per iteration (ms): 140.6 |"
        " learning rate: 2.020E-08 | global batch size:     4 | lm loss: 1.005022E+01 | sop loss: 8.174902E-01 | loss scale: 32768.0 |"
        " grad norm: 217.199 | num zeros: 12.0 | params norm: 231.044 | number of skipped iterations:   2 |"
        " number of nan iterations:   0 |",
        *(20, 1000000, 0.1406, 10.05022, None),
    ),
    "2024": (
        f" [2024-04-01 10:11:12] iteration       10/    1000 | consumed samples:         1920 | elapsed time per iteration (ms): 2204.8 |"
        f" throughput per GPU (TFLOP/s/GPU): 431.7 | learning rate: 1.500000E-04 | global batch size:   192 | lm loss: 8.012345E+00 |"
        f" loss scale: 1.0 | grad norm: 1.102 | {TAIL}",
        *(10, 1000, 2.2048, 8.012345, 431.7),
    ),
    "2026": (
        f" [2026-03-01 10:11:12.123456] iteration        7/    1000 | consumed samples:         1344 | skipped samples:          192 |"
        f" elapsed time per iteration (ms): 2204.8 | throughput per GPU (TFLOP/s/GPU): 431.7 | energy per GPU (J/iter/GPU): 1201.4 |"
        f" power per GPU (W/GPU): 544.9 | learning rate: 1.500000E-04 | global batch size:   192 | lm loss: 8.012345E+00 |"
        f" loss scale: 1.0 | grad norm: 1.102 | num zeros: 2274 | params norm: 231.044 | {TAIL}",
        *(7, 1000, 2.2048, 8.012345, 431.7),
    ),
    "bloom": (
        f"[default7]: iteration    12345/  115311 | consumed samples:      9841584 | consumed tokens:  20155564032 |"
        f" elapsed time per iteration (s): 105.22 | learning rate: 5.969E-05 | global batch size:  2048 | lm loss: 2.463556E+00 |"
        f" grad norm: 0.174 | num zeros: 0.0 | curriculum seqlen:  2048 | {TAIL} samples per second: 19.463 | TFLOPs: 149.02 |",
        *(12345, 115311, 105.22, 2.463556, 149.02),
    ),
    "deepspeed-3d": (
        f" iteration        2/    1000 | consumed samples:         2048 | elapsed time per iteration (ms): 141096.8 |"
        f" learning rate: 3.750E-05 | global batch size:  1024 | lm-loss: 1.244502E+01 | loss scale: -1.0 | grad norm: 0.000 |"
        f" num zeros: 0.0 | {TAIL}",
        *(2, 1000, 141.0968, 12.44502, None),
    ),
    "without-end": (
        f"31:  iteration       10/infinity | consumed samples: 40 | elapsed time per iteration (s): 7.2310 | lm loss: 3.1E+00 | {TAIL}",
        *(10, -1, 7.231, 3.1, None),
    ),
    "skipped": (
        " iteration       10/    1000 | consumed samples:           40 | elapsed time per iteration (ms): 2152.2 |"
        " learning rate: 0.000E+00 | global batch size:     4 | loss scale: 8388608.0 | number of skipped iterations:  10 |"
        " number of nan iterations:   0 |",
        *(10, 1000, 2.1522, None, None),
    ),
    "megactl": (
        f" [2026-11-21 08:14:03] iteration        2/       6 | consumed samples:            8 | elapsed time per iteration (ms): 215.8 |"
        f" throughput per GPU (TFLOP/s/GPU): 0.0063 | learning rate: 2.250000E-04 | global batch size:     4 | lm loss: 5.471813E+00 |"
        f" loss scale: 1.0 | grad norm: 2.789 | {TAIL} tokens/s: 1186.2 | ETA: n/a |",
        *(2, 6, 0.2158, 5.471813, 0.0063),
    ),
}

OTHERS = (
    "time (ms) | forward-compute: 193.77 | backward-compute: 73.02 | optimizer: 63.01 | batch-generator: 25.27",
    "time (ms) | save-checkpoint: 38376.49",
    "(min, max) time across ranks (ms):",
    "    save-checkpoint ................................: (1234.56, 1240.01)",
    "    forward-backward ...............................: 1809.42",
    "[Rank 0] (after 5 iterations) memory (MB) | allocated: 9735.1 | max allocated: 12860.2 | reserved: 14262.0 | max reserved: 14262.0",
    " validation loss at iteration 1000 | lm loss value: 7.012345E+00 | lm loss PPL: 1.110301E+03 | ",
    "------------------------ arguments ------------------------",
    "  tensor_model_parallel_size ...................... 4",
    "-------------------- end of arguments ---------------------",
    "using world size: 64, data-parallel-size: 1, tensor-model-parallel size: 4, pipeline-model-parallel size: 16 ",
    " > number of parameters on (tensor, pipeline) model parallel rank (0, 3): 805560320",
    "RANK=4 STAGE=1 LAYERS=4 [7, 11) STAGE_PARAMS=8 (8M) TOTAL_PARAMS=5245 (5M) UNIQUE_PARAMS=52004716544 (52004.717M)",
    "[2021-05-27 21:32:10,180] [INFO] [logging.py:60:log_dist] [Rank 0] step=10, skipped=3, lr=[0.0001, 0.0001], mom=[(0.9, 0.999)]",
    "steps: 10 loss: 8.1234 iter time (s): 136.100 samples/sec: 7.524",
    "epoch=0/micro_step=40/global_step=10, RunningAvgSamplesPerSec=25.02, CurrSamplesPerSec=25.70, MaxMemAllocated=38.49GB",
    "MA 2.34 GB         Max_MA 3.81 GB         CA 5.4 GB         Max_CA 5 GB ",
    "[utils.py:597:see_memory_usage] CPU Virtual Memory:  used = 40.02 GB, percent = 21.4%",
    "[2021-05-26 04:38:20,032] [INFO] [config.py:759:print]   json = {",
    '    "train_batch_size": 64, "zero_optimization": {"stage": 3}',
    "}",
    "Training/evaluation parameters TrainingArguments(output_dir=out, per_device_train_batch_size=4, fsdp_config={'a': (1, 2)},)",
    "\r  6%|6         | 1/16 [00:58<14:41, 58.76s/it]\r 12%|#2        | 2/16 [02:00<13:54, 59.61s/it]",
    "{'loss': 1.306, 'grad_norm': 0.512, 'learning_rate': 1.2195121951219514e-06, 'epoch': 0.01}",
    "{'train_runtime': 919.0933, 'train_samples_per_second': '1.088', 'train_loss': 8.1, 'epoch': 1.0}",
    '{"iteration": 3, "consumed_samples": 24, "loss": 5.4, "seconds": 0.2, "time": 1795248843.357}',
    "RuntimeError: CUDA out of memory. Tried to allocate 1.50 GiB (GPU 0; 31.75 GiB total capacity)",
    "slurmstepd: error: *** JOB 1999616 ON r6i4n5 CANCELLED AT 2021-05-27T21:42:11 DUE TO TIME LIMIT ***",
    "Killing subprocess 12345",
    "+ CMD='pretrain_gpt.py --num-layers 64 --hidden-size 8192 --micro-batch-size 4'",
    "r6i4n5:40816:41078 [3] NCCL INFO comm 0x1529a8001060 rank 13 nranks 16 cudaDev 3 busId 8a000 - Init COMPLETE",
    "",
)

LINES = (*(era[0] for era in ERAS.values()), *OTHERS)
_PIECES = (
    "|",
    ":",
    " ",
    "nan",
    "-inf",
    "1e999",
    "\x1b[1;31m",
    "\x1b]0;t\x07",
    "\x1b",
    "\r",
    "iteration 5/ 10 |",
    "...: ",
    "%|",
    "(",
    "{",
    "}",
    "é",
    "\0",
)


def mutated(draw: random.Random) -> bytes:
    """One line, or two that ranks wrote over each other, with some bytes cut, changed, repeated or put in; without a line break."""
    line = bytearray(draw.choice(LINES).encode())
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        place = draw.randrange(len(line) + 1)
        action = draw.randrange(6)
        if action == 0:
            del line[place : place + draw.randrange(1, 40)]
        elif action == 1:
            line[place:place] = draw.choice(_PIECES).encode(draw.choice(("utf-8", "latin-1")), "replace")
        elif action == 2:
            line[place:place] = draw.choice(LINES).encode()
        elif action == 3 and line:
            line[min(place, len(line) - 1)] = draw.randrange(256)
        elif action == 4:
            line[place:place] = line[place : place + draw.randrange(60)] * draw.randrange(4)
        else:
            line[place:place] = bytes([draw.choice(b"0123456789.eE+-")]) * draw.randrange(30)
    return bytes(line)


def mutated_text(lines: int, seed: int) -> bytes:
    """So many mutated lines, with all kinds of line ends."""
    draw = random.Random(seed)
    return b"".join(mutated(draw) + draw.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")) for _ in range(lines))
