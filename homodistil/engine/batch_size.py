"""Changes the micro-batch size of a live DeepSpeed engine at a constant global batch size.

DeepSpeed (0.19) keeps the batch sizes in `engine._config` and has public setters for them. ZeRO's optimizers, however,
keep the accumulation steps that they were constructed with, and read them under CPU offload; they are updated here.
"""

from __future__ import annotations


def set_micro_batch_size(engine, micro_batch_size: int) -> None:
    """Change the sequences per micro-batch and rank, and with them the accumulation steps. Every rank calls it.

    Call it only right after `engine.step()` at a gradient accumulation boundary, or before the first step.

    Raises:
        ValueError: the global batch size is not a multiple of micro-batch size x ranks, or `engine.micro_steps` is not
            a multiple of the new accumulation steps (it always is if these divide the old ones).
        RuntimeError: accumulated gradients have not been applied yet, or DeepSpeed did not take the new values.
    """
    global_batch_size, num_ranks = engine.train_batch_size(), engine.dp_world_size
    steps, rest = divmod(global_batch_size, micro_batch_size * num_ranks)
    if rest:
        raise ValueError(f"micro-batch of {micro_batch_size} on {num_ranks} ranks does not divide {global_batch_size}")
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise RuntimeError("micro-batch: gradients wait for a step; change it only right after engine.step()")
    if engine.micro_steps % steps:
        raise ValueError(f"{engine.micro_steps} micro-steps done are no multiple of {steps} accumulation steps")
    engine.set_train_micro_batch_size(micro_batch_size)  # also changes the global batch, which the next call restores
    engine.set_train_batch_size(global_batch_size)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = steps
    _check_taken(engine, global_batch_size, micro_batch_size, steps)


def _check_taken(engine, global_batch_size: int, micro_batch_size: int, steps: int) -> None:
    """Raise RuntimeError unless the engine has all new values, before a step is taken with only some of them."""
    found_and_expected = {
        "train_batch_size": (engine.train_batch_size(), global_batch_size),
        "train_micro_batch_size_per_gpu": (engine.train_micro_batch_size_per_gpu(), micro_batch_size),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), steps),
        # The engine decides with this when it takes a step.
        "is_gradient_accumulation_boundary": (engine.is_gradient_accumulation_boundary(), steps == 1),
    }
    for name, (actual, expected) in found_and_expected.items():
        if actual != expected:
            raise RuntimeError(f"deepspeed: {name} is {actual} after it was set to {expected}")
