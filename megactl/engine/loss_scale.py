"""The loss scale of fp16 training, and the end of a run that only skips.

fp16 gradients below 2^-24 are lost and those above 65504 are infinite (Micikevicius et al. 2018, section 3.2). So backward starts
from the loss times a scale; what it leaves in the main gradients is divided by it with the factor that AdamW applies anyway, and
the norm, clipping and the log see gradients without it. A norm that is not finite, on whichever rank, skips the step everywhere.

The dynamic scale moves by Megatron-LM's rule: times 2 after `window` steps without overflow, which also restores `hysteresis`
overflows that only skip; from the last of them on, each halves it, down to `minimum`. All of it is device tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megactl.config.schema import Training
from megactl.errors import RunError

GROWTH, BACKOFF = 2.0, 0.5


class LossScale:
    """The scale of a resolved run: dynamic, constant, or 1 where nothing is scaled.

    Which of them the settings alone say, not the precision: verification scales float64, where a power of 2 changes no bit.
    """

    def __init__(self, training: Training, device: torch.device) -> None:
        self.is_dynamic = training.loss_scale == 0.0 and training.initial_loss_scale is not None
        self._minimum, self._window = training.min_loss_scale or 1.0, float(training.loss_scale_window or 1000)
        self._hysteresis = float(training.loss_scale_hysteresis or 1)
        start = training.initial_loss_scale if self.is_dynamic else training.loss_scale or 1.0
        # Scale, steps without overflow since it last moved, overflows that are left until it falls.
        self._state = torch.zeros(3, dtype=torch.float64, device=device)
        self._fill(start, 0.0, self._hysteresis)

    def _fill(self, *values: float) -> None:
        for index, value in enumerate(values):
            self._state[index].fill_(value)

    @property
    def scale(self) -> Tensor:
        """The scale of the next step, 0-d float64: a view, which `update` changes."""
        return self._state[0]

    def scaled(self, gradient: Tensor) -> Tensor:
        """What backward starts from instead of `gradient`, the gradient of the loss."""
        return gradient * self.scale

    def unscaled(self, factor: Tensor) -> Tensor:
        """`factor` of the main gradients (0-d float64) with the division by the scale folded in."""
        return factor / self.scale

    def update(self, overflow: Tensor) -> None:
        """Move the scale after a step; `overflow` (0-d) is not 0 where it was skipped. Without effect on a scale that is constant."""
        if not self.is_dynamic:
            return
        scale, good, left = self._state
        zero, good, left = torch.zeros_like(good), good + 1.0, (left - 1.0).clamp(min=0.0)
        fallen = torch.where(left > 0.0, scale, (scale * BACKOFF).clamp(min=self._minimum))
        grown = torch.stack([scale * GROWTH, zero, torch.full_like(left, self._hysteresis)])
        kept = torch.stack([scale, good, self._state[2]])
        after_good = torch.where(good >= self._window, grown, kept)
        self._state.copy_(torch.where(overflow != 0, torch.stack([fallen, zero, left]), after_good))

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, None where the scale does not move. Waits for the device."""
        if not self.is_dynamic:
            return None
        scale, good, left = self._state.tolist()
        return {"scale": scale, "good_steps": int(good), "hysteresis": int(left)}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from a checkpoint's `state`. One that has none (of a run in another precision) leaves the start as it is."""
        if self.is_dynamic and state is not None:
            # The settings may have changed in between: they bound what the checkpoint says.
            left = min(float(state["hysteresis"]), self._hysteresis)
            self._fill(max(float(state["scale"]), self._minimum), float(state["good_steps"]), left)


class SkipWatch:
    """Ends a run whose steps are all skipped although the loss scale cannot fall any further. It reads what the trainer logs."""

    def __init__(self, training: Training) -> None:
        dynamic = training.loss_scale == 0.0 and training.initial_loss_scale is not None
        self._floor = (training.min_loss_scale or 1.0) if dynamic else math.inf
        self._is_fp16 = training.precision == "fp16"
        # 0: no limit. A few bad micro-batches may be passed over; fifty steps, the default, are not chance.
        self._most = training.max_skipped_iterations or math.inf
        self._count = 0

    def see(self, iteration: int, *, skipped: bool, loss_scale: float) -> None:
        """Note one step. Raises RunError at the last of `max_skipped_iterations` in a row; the weights are those before the first."""
        self._count = self._count + 1 if skipped and loss_scale <= self._floor else 0
        if self._count >= self._most:
            first = iteration - self._count + 1
            message = f"iterations {first} to {iteration} were skipped one after another: their gradients are not finite"
            message += f", and the loss scale of {loss_scale:g} does not fall any further" if self._is_fp16 else ""
            wider = ", or use --precision bf16, which has the range of fp32" if self._is_fp16 else ""
            hint = f"continue from an earlier checkpoint with a smaller --lr{wider}; --max-skipped-iterations sets the limit"
            raise RunError(message, hint)
