"""What this package uses of DeepSpeed's engine, in one place, with types.

`resize/` and `checkpoint/` work on the state inside it: they are given `TrainingEngine.deepspeed`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from homodistil.engine.batch_size import set_micro_batch_size
from homodistil.engine.optimizer import cool_down, rewarm


class TrainingEngine:
    """Trains a module with AdamW: forward, `accumulate` for each micro-batch, `update` once per optimizer step.

    Args:
        deepspeed: a live `DeepSpeedEngine` with the optimizer and learning-rate schedule of engine/optimizer.py.
    """

    def __init__(self, deepspeed: Any) -> None:
        self.deepspeed = deepspeed

    # -- a step

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward on one micro-batch. At stage 3 parameters are gathered only inside it."""
        return self.deepspeed(*inputs)

    def accumulate(self, loss: Tensor) -> None:
        """Backward of one micro-batch. After the last one of a step the gradients are reduced over the ranks.

        Args:
            loss: scalar, the mean over this micro-batch; the mean over micro-batches and ranks is taken here.
        """
        backward(self.deepspeed, loss)
        if not self.is_update_due:
            self.deepspeed.step()  # DeepSpeed wants one call for each micro-batch; this one only counts

    @property
    def is_update_due(self) -> bool:
        """Whether the micro-batch that is being worked on is the last one of its step."""
        return self.deepspeed.is_gradient_accumulation_boundary()

    def update(self) -> bool:
        """Clip, AdamW, learning rate: one optimizer step from what has been accumulated. Every rank calls it.

        Returns:
            False if the weights stayed as they were: DeepSpeed leaves a step out when a gradient is not finite, as
            under fp16 after an overflow. The same on every rank.
        """
        self.deepspeed.step()
        return self.is_applied

    @property
    def is_applied(self) -> bool:
        """Whether the last `update` changed the weights."""
        return bool(self.deepspeed.was_step_applied())

    # -- what there is to know

    @property
    def module(self) -> nn.Module:
        """The module that is trained. At stage 3 its parameters are empty outside of its forward."""
        return self.deepspeed.module

    @property
    def micro_batch_size(self) -> int:
        """Sequences per micro-batch and rank."""
        return self.deepspeed.train_micro_batch_size_per_gpu()

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step and rank."""
        return self.deepspeed.gradient_accumulation_steps()

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.zero_optimization_stage()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return self.deepspeed.get_lr()[0]

    @property
    def gradient_norm(self) -> float | Tensor | None:
        """Global L2 norm of the last step's gradients before clipping; None where DeepSpeed has not computed one."""
        return self.deepspeed.get_global_grad_norm()

    @property
    def has_dynamic_loss_scale(self) -> bool:
        """fp16 with a scale that searches its place: a step left out now and then is part of that."""
        return self.deepspeed.fp16_enabled() and self.deepspeed.dynamic_loss_scale()

    # -- what changes on the way

    def set_micro_batch_size(self, sequences: int) -> None:
        """More sequences at once, fewer accumulation steps. See `batch_size.set_micro_batch_size`."""
        set_micro_batch_size(self.deepspeed, sequences)

    def rewarm(self) -> None:
        """Lower the learning rate for the next `train.rewarm_steps` updates."""
        rewarm(self.deepspeed.lr_scheduler)

    def cool_down(self, steps: int) -> None:
        """Let the learning rate fall to 1/steps of its value over the next `steps` updates."""
        cool_down(self.deepspeed.lr_scheduler, steps)

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the module, and free what the engine holds."""
        self.deepspeed.destroy()


def backward(deepspeed: Any, loss: Tensor) -> None:
    """DeepSpeed's `backward`, with the loss scale of fp16 in it at every stage.

    DeepSpeed 0.19 multiplies the loss in ZeRO's wrappers only. Those of stage 0 divide the gradients by the scale all
    the same: steps would be as good as zero.
    """
    if deepspeed.fp16_enabled() and not deepspeed.zero_optimization():
        loss = loss.float() * deepspeed.optimizer.loss_scale
    deepspeed.backward(loss)
