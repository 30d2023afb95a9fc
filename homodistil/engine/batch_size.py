"""The micro-batch of a live DeepSpeed engine: more sequences at once, fewer accumulation steps, same global batch.

DeepSpeed (0.19) keeps these numbers in `engine._config`, whose public setters leave one thing behind: ZeRO's optimizers
remember the accumulation steps of their construction, and read them under CPU offload.
"""

from __future__ import annotations


def set_micro_batch_size(engine, micro_batch_size: int) -> None:
    """Change the sequences of a micro-batch, and with them the accumulation steps. Every rank calls it.

    Only right after `engine.step()` at a gradient accumulation boundary (or before the first step).

    Raises:
        ValueError: the ranks cannot share the global batch evenly, or the count of micro-steps would lie between two
            boundaries: with accumulation steps that divide the former ones it never does.
        RuntimeError: gradients wait for a step, or DeepSpeed did not take the new values.
    """
    global_batch_size, num_ranks = engine.train_batch_size(), engine.dp_world_size
    steps, rest = divmod(global_batch_size, micro_batch_size * num_ranks)
    if rest:
        raise ValueError(f"micro-batch of {micro_batch_size} on {num_ranks} ranks does not divide {global_batch_size}")
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise RuntimeError("micro-batch: gradients wait for a step; change it only right after engine.step()")
    if engine.micro_steps % steps:
        raise ValueError(f"{engine.micro_steps} micro-steps done are no multiple of {steps} accumulation steps")
    engine.set_train_micro_batch_size(micro_batch_size)  # changes the global batch, which the next call sets right
    engine.set_train_batch_size(global_batch_size)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = steps
    _check_taken(engine, global_batch_size, micro_batch_size, steps)


def _check_taken(engine, global_batch_size: int, micro_batch_size: int, steps: int) -> None:
    """Before a step goes wrong with half of the values."""
    found_and_expected = {
        "train_batch_size": (engine.train_batch_size(), global_batch_size),
        "train_micro_batch_size_per_gpu": (engine.train_micro_batch_size_per_gpu(), micro_batch_size),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), steps),
        # Asked of the engine itself: it is what decides when it takes a step.
        "is_gradient_accumulation_boundary": (engine.is_gradient_accumulation_boundary(), steps == 1),
    }
    for name, (actual, expected) in found_and_expected.items():
        if actual != expected:
            raise RuntimeError(f"deepspeed: {name} is {actual} after it was set to {expected}")
