"""Which lines of a log are looked at: fixed strings, and what a line that holds one of them is.

A new format starts here with its anchors: seven bytes at least, or two that are very rare together; see docs/logs.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Kind:
    """What a line holds, a bit each; one line can hold several. The scanner acts on the first group itself (csrc/native/log_scanner.h).

    Plain numbers: an IntFlag would take most of the time that a line costs.
    """

    ITERATION = 1 << 0
    TIMER_LINE = 1 << 1
    ACROSS_RANKS = 1 << 2
    BLOCK = 1 << 4
    REWIND = 1 << 5
    START = 1 << 6
    INTERRUPTION = 1 << 7
    FIRST = 1 << 8

    ARGUMENTS = 1 << 10
    WORLD = 1 << 11
    PARAMETERS = 1 << 12
    MEMORY = 1 << 13
    EVALUATION = 1 << 14
    CHECKPOINT = 1 << 15
    DATE = 1 << 16
    DEEPSPEED = 1 << 17
    DEEPSPEED_CONFIG = 1 << 18
    DEEPSPEED_STEP = 1 << 19
    HF_ARGUMENTS = 1 << 20
    HF_PROGRESS = 1 << 21
    HF_LOG = 1 << 22
    HF_METRICS = 1 << 23
    HF_INFO = 1 << 24
    TRACE = 1 << 25
    ACTIVATIONS = 1 << 26
    METRICS_LINE = 1 << 27
    SUMMARY = 1 << 28
    VOCABULARY = 1 << 29
    EVENT = 1 << 30
    DEGREES = 1 << 31


ACTED_ON = Kind.ITERATION | Kind.TIMER_LINE | Kind.ACROSS_RANKS | Kind.START | Kind.INTERRUPTION


class Anchor(NamedTuple):
    """A fixed string; `follow` lines behind it belong to it, at most up to and with the one that holds `until` ("": no such line)."""

    text: bytes
    kinds: int
    follow: int = 0
    until: bytes = b""


# Bounds on blocks: Megatron-LM has some 600 arguments, DeepSpeed's json some 150 lines.
_ARGUMENT_LINES, _JSON_LINES, _REPR_LINES, _METRIC_LINES, _TIMER_LINES = 3000, 400, 250, 30, 50

_BLOCKS = (
    Anchor(b"- arguments -", Kind.ARGUMENTS | Kind.START, _ARGUMENT_LINES, b"end of arguments"),
    Anchor(b"TrainingArguments(", Kind.HF_ARGUMENTS, _REPR_LINES),
    Anchor(b" json = {", Kind.DEEPSPEED_CONFIG, _JSON_LINES),
    Anchor(b"train metrics *****", Kind.HF_METRICS | Kind.EVENT, _METRIC_LINES),
    # Its lines are read by the scanner and are no notes.
    Anchor(b"time across ranks (ms)", Kind.ACROSS_RANKS, _TIMER_LINES),
)

_LINES: tuple[tuple[int, tuple[bytes, ...]], ...] = (
    (Kind.ITERATION, (b"elapsed time per iteration",)),
    (Kind.TIMER_LINE, (b"time (ms) |",)),
    (Kind.WORLD | Kind.START, (b"using world size",)),
    (Kind.DEGREES, (b"data_parallel_size: ",)),
    (
        Kind.PARAMETERS,
        (b"number of parameters on", b"STAGE_PARAMS=", b"total parameters ", b"trainable parameters", b"number of parameters in billions"),
    ),
    (Kind.MEMORY, (b"memory (MB)", b"Max_MA ", b"CPU Virtual Memory:", b"MaxMemAllocated=")),
    (Kind.EVALUATION | Kind.INTERRUPTION, (b" loss at iteration", b" loss at the end")),
    (
        Kind.CHECKPOINT | Kind.INTERRUPTION,
        (b"saving checkpoint at", b"saved checkpoint ", b"/checkpoints/step-", b"Saving model checkpoint"),
    ),
    (Kind.DATE, (b"] datetime",)),
    (Kind.DEEPSPEED | Kind.START, (b"DeepSpeed info: version",)),
    (Kind.DEEPSPEED_CONFIG, (b":print] ",)),
    (Kind.DEEPSPEED_STEP, (b"iter time (s):", b"SamplesPerSec=", b"], mom=[")),
    (Kind.HF_PROGRESS, (b"%|",)),
    (Kind.HF_LOG, (b"{'loss': ", b"'eval_loss'")),
    (Kind.HF_LOG | Kind.EVENT, (b"'train_runtime'",)),
    (
        Kind.HF_INFO,
        (
            b"Running training *****",
            b"ization steps =",
            b"Total train batch size",
            b"Instantaneous batch size",
            b"Accumulation steps =",
            b"Overriding config: ",
        ),
    ),
    (Kind.TRACE, (b"--num-layers", b"--model_name_or_path", b"--model_type", b"NNODES=", b"GPUS_PER_NODE=")),
    (Kind.ACTIVATIONS, (b"Partition Activations ", b"Memory Checkpointing ")),
    (Kind.METRICS_LINE, (b'"consumed_samples": ', b'{"kind": "eval"')),
    (Kind.SUMMARY, (b"Effective Tera Flops", b"Checkpoint Save GB", b"MODEL_TFLOP/s/GPU")),
    (Kind.VOCABULARY, (b"padded vocab (size:",)),
    (
        Kind.EVENT,
        (
            *(b"out of memory", b"OutOfMemory", b"oom-kill", b"oom_kill", b"ut Of Memory", b"ut of memory: Kill", b"OUT_OF_MEMORY"),
            *(b"return code = -9", b"exitcode: -9", b"exitcode  : -9", b"(SIGKILL)", b"Cannot allocate memory", b"allocate memory:"),
            *(b"CANCELLED AT", b"NODE FAILURE", b"PREEMPTION", b"ECC error", b"NVRM: Xid", b"illegal memory access", b"Bus error"),
            *(b"Segmentation fault", b"launch failure", b"device-side assert", b"L error in:", b"Watchdog caught", b"DistBackendError"),
            *(b"ncclSystemError", b"ncclInternalError", b"ncclRemoteError", b"ncclUnhandledCudaError", b"Connection closed by"),
            *(b"initializing process group", b"AssertionError", b"Error: ", b"error: ", b"Exception: ", b"ChildFailedError"),
            *(b"Traceback (most recent", b"KeyboardInterrupt", b"core dumped", b"terminate called", b"already at minimum"),
            *(b"found NaN in", b"found Inf in", b"Killing subprocess", b"received SIGTERM", b"[exiting program", b"after training is done"),
            *(b"Training completed.", b"Did not save the model", b"OVERFLOW!"),
        ),
    ),
)

ANCHORS: tuple[Anchor, ...] = (*_BLOCKS, *(Anchor(text, kinds) for kinds, texts in _LINES for text in texts))


def anchors_for(timers: Iterable[str] | None) -> tuple[Anchor, ...]:
    """The anchors of a scanner that keeps only these timers (None: all): of the lines of timers it looks at those that name one."""
    if timers is None:
        return ANCHORS
    others = (anchor for anchor in ANCHORS if anchor.kinds != Kind.TIMER_LINE)
    return (*others, *(Anchor(name.encode(), Kind.TIMER_LINE) for name in timers))


# What logs are full of: the compiled scanner looks for anchors by those of their bytes that are not in here.
COMMON = (
    b" iteration | consumed samples: | consumed tokens: | elapsed time per iteration (s): | throughput per GPU (TFLOP/s/GPU): |"
    b" learning rate: | global batch size: | lm loss: | sop loss: | loss scale: | grad norm: | num zeros: | params norm: |"
    b"| number of skipped iterations: | number of nan iterations: | samples per second: | TFLOPs: | tokens/s: | ETA: |"
    b" | forward-compute: | forward-recv: | forward-send: | backward-compute: | backward-send: | backward-recv: |"
    b" forward-backward-send-forward-backward-recv: | backward-send-forward-recv: | backward-params-all-reduce: |"
    b" backward-embedding-all-reduce: | layernorm-grads-all-reduce | embedding-grads-all-reduce | all-grads-sync | params-all-gather |"
    b" optimizer-copy-to-main-grad: | optimizer-unscale-and-check-inf: | optimizer-clip-main-grad: | optimizer-count-zeros: |"
    b" optimizer-inner-step: | optimizer-copy-main-to-model-params: | optimizer: | batch-generator: |"
    b" NCCL INFO Channel : Trees via P2P/IPC/read/NET/IB comm rank nranks cudaDev busId Init COMPLETE threadThresholds coll channels"
    b" [INFO] [WARNING] [default0]: .py: UserWarning: FutureWarning: DeprecationWarning: warnings.warn( torch.distributed rank "
    b" > loading doc-idx mapping from shuffle-idx sample-idx .npy loaded indexed file in seconds total number of samples: documents:"
    b" reading building dataset index creating numpy buffer view finished training validation test model layers "
    b" setting environment variable process default system being overloaded please further tune performance application needed "
    b"******** -------- ======== ........ ment ation mapping optimized called total training trainer loss"
    b" ParallelTransformerLayer tensor pipeline data parallel group initialized with the and for using this will file data config "
)
