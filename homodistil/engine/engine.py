"""The part of DeepSpeed's engine that this package uses, with types.

`resize/` and `checkpoint/` work on the state inside the engine, so they get `TrainingEngine.deepspeed`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from homodistil.engine.batch_size import set_micro_batch_size
from homodistil.engine.optimizer import cool_down, rewarm, set_width_share


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
            self.deepspeed.step()  # DeepSpeed requires one call per micro-batch; before the boundary it only counts

    @property
    def is_update_due(self) -> bool:
        """Whether the current micro-batch is the last one of its optimizer step."""
        return self.deepspeed.is_gradient_accumulation_boundary()

    def update(self) -> bool:
        """One optimizer step with the accumulated gradients: clipping, AdamW, learning rate. Every rank calls it.

        Returns:
            Whether the weights changed, the same on every rank. DeepSpeed skips a step if a gradient is not finite, as
            after an fp16 overflow.
        """
        self.deepspeed.step()
        return self.is_applied

    @property
    def is_applied(self) -> bool:
        """Whether the last `update` changed the weights."""
        return bool(self.deepspeed.was_step_applied())

    # -- properties

    @property
    def module(self) -> nn.Module:
        """The module that is trained. At ZeRO stage 3 its parameters are empty outside its forward and backward."""
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
        """Global L2 norm of the gradients of the last step before clipping; None if DeepSpeed has not computed it."""
        return self.deepspeed.get_global_grad_norm()

    @property
    def has_dynamic_loss_scale(self) -> bool:
        """Whether this is fp16 with dynamic loss scaling, where a skipped step from time to time is normal."""
        return self.deepspeed.fp16_enabled() and self.deepspeed.dynamic_loss_scale()

    # -- changes during training

    def set_micro_batch_size(self, sequences: int) -> None:
        """Change the sequences per micro-batch and rank; see `batch_size.set_micro_batch_size`."""
        set_micro_batch_size(self.deepspeed, sequences)

    def set_width_share(self, share: float) -> None:
        """Multiply the learning rate at the present widths with `share`, in (0, 1]."""
        set_width_share(self.deepspeed.lr_scheduler, share)

    def rewarm(self) -> None:
        """Lower the learning rate for the next `train.rewarm_steps` updates."""
        rewarm(self.deepspeed.lr_scheduler)

    def cool_down(self, steps: int) -> None:
        """Let the learning rate fall to 1/steps of its value over the next `steps` updates."""
        cool_down(self.deepspeed.lr_scheduler, steps)

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks from the module, and free the memory of the engine."""
        self.deepspeed.destroy()


def backward(deepspeed: Any, loss: Tensor) -> None:
    """DeepSpeed's `backward`, with the fp16 loss scale applied at every ZeRO stage.

    DeepSpeed 0.19 multiplies the loss by the scale at stages 1 to 3 only. The fp16 optimizers of stage 0 nevertheless
    divide the gradients by it, so that without this correction the updates would be close to zero.
    """
    if deepspeed.fp16_enabled() and not deepspeed.zero_optimization():
        loss = loss.float() * deepspeed.optimizer.loss_scale
    deepspeed.backward(loss)
