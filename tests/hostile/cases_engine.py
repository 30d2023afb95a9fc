"""DeepSpeed's JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from case import Case, Workspace


def entry(name: str, key: str, value: object, *says: str) -> Case:
    """One top-level entry."""

    def build(w: Workspace) -> list[str]:
        w.set_engine(**{key: value})
        return w.train()

    return Case(name, build, says=["--deepspeed", key, *says])


def raw(name: str, content: str | bytes, *says: str) -> Case:
    """The whole file, on one rank: every rank reads it by itself, before the ranks join."""

    def build(w: Workspace) -> list[str]:
        w.engine.write_bytes(content.encode() if isinstance(content, str) else content)
        return w.train()

    return Case(name, build, says=["--deepspeed", *says], ranks=1)


def instead(name: str, make: Callable[[Workspace], str], *says: str) -> Case:
    """Something else than a file."""
    return Case(name, lambda w: w.train("--deepspeed", make(w)), says=["--deepspeed", *says])


def _fifo(w: Workspace) -> str:
    os.mkfifo(w.folder / "pipe.json")
    return str(w.folder / "pipe.json")


def _huge(w: Workspace) -> str:
    (w.folder / "huge.json").write_text(json.dumps({"bf16": {"enabled": True}, "x": "y" * 2_000_000}))
    return str(w.folder / "huge.json")


ZERO = "zero_optimization"
CASES = [
    entry("engine_unknown_entry", "zero_optimisation", {"stage": 2}, "did you mean 'zero_optimization'"),
    entry("engine_unknown_scalar", "gradient_acumulation_steps", 2, "did you mean 'gradient_accumulation_steps'"),
    entry("engine_unknown_nested", ZERO, {"stage": 2, "overlap_com": True}, "overlap_com: found true", "no field"),
    entry("engine_unknown_in_bf16", "bf16", {"enabledd": True}, "bf16.enabledd"),
    entry("engine_section_is_true", "bf16", True, "bf16: found true"),
    entry("engine_section_is_a_number", ZERO, 2, "found 2"),
    entry("engine_section_is_a_text", ZERO, "stage 2", "found"),
    entry("engine_section_is_a_list", ZERO, [{"stage": 2}], "found a list"),
    entry("engine_section_is_empty", ZERO, {}, "an empty section"),
    entry("engine_fp16_is_empty", "fp16", {}, "an empty section"),
    entry("engine_section_is_null", "bf16", None, "bf16"),
    entry("engine_stage_is_a_word", ZERO, {"stage": "two"}, "zero_optimization.stage", "'two'".replace("'", '"')),
    entry("engine_stage_4", ZERO, {"stage": 4}, "zero_optimization.stage: found 4"),
    entry("engine_stage_negative", ZERO, {"stage": -1}, "zero_optimization.stage: found -1"),
    entry("engine_stage_is_a_list", ZERO, {"stage": [2]}, "zero_optimization.stage"),
    entry("engine_bucket_negative", ZERO, {"stage": 2, "reduce_bucket_size": -1}, "reduce_bucket_size: found -1"),
    entry("engine_bucket_zero", ZERO, {"stage": 2, "allgather_bucket_size": 0}, "allgather_bucket_size: found 0"),
    entry("engine_bucket_huge", ZERO, {"stage": 2, "reduce_bucket_size": 1e30}, "allowed are 1 .. 1e+11"),
    entry("engine_bucket_is_a_text", ZERO, {"stage": 2, "reduce_bucket_size": "5e8"}, 'found "5e8"'),
    entry("engine_enabled_is_a_number", "bf16", {"enabled": 7}, "bf16.enabled: found 7"),
    entry("engine_loss_scale_is_a_text", "fp16", {"enabled": False, "loss_scale": "big"}, "fp16.loss_scale"),
    entry("engine_bool_as_text", "wall_clock_breakdown", "yes", "true or false"),
    entry("engine_bool_as_number", "prescale_gradients", 1, "true or false"),
    entry("engine_number_as_text", "gradient_predivide_factor", "2", "a number"),
    entry("engine_allreduce_op_unknown", "gradient_allreduce_op", "median", "gradient_allreduce_op"),
    entry("engine_offload_device_unknown", ZERO, {"stage": 2, "offload_optimizer": {"device": "tape"}}, "device"),
    entry("engine_offload_is_true", ZERO, {"stage": 2, "offload_optimizer": True}, "offload_optimizer"),
    entry("engine_dtype_unknown", "communication_data_type", "fp7", "communication_data_type"),
    entry("engine_wandb_not_installed", "wandb", {"enabled": True}, "needs wandb", "pip install wandb"),
    entry("engine_comet_not_installed", "comet", {"enabled": True}, "needs comet_ml"),
    entry("engine_csv_monitor_wrong", "csv_monitor", {"enabled": "often"}, "csv_monitor.enabled"),
    entry("engine_tensorboard_is_true", "tensorboard", True, "tensorboard"),
    entry("engine_checkpoint_is_a_list", "checkpoint", ["last"], "found a list"),
    entry("engine_flops_profiler_is_true", "flops_profiler", True, "flops_profiler"),
    entry("engine_enabled_is_no", "bf16", {"enabled": "no"}, 'bf16.enabled: found "no"', "true and false"),
    entry("engine_stage_is_true", ZERO, {"stage": True}, "zero_optimization.stage: found true"),
    entry("engine_steps_per_print_is_a_text", "steps_per_print", "10", 'found "10"'),
    entry("engine_predivide_zero", "gradient_predivide_factor", 0, "found 0"),
    entry("engine_predivide_with_zero2", "gradient_predivide_factor", 2.0, "allowed is 1"),
    entry("engine_unknown_in_activation_checkpointing", "activation_checkpointing", {"foo": 1}, "foo", "no field"),
    entry("engine_unknown_in_flops_profiler", "flops_profiler", {"foo": 1}, "foo"),
    entry("engine_aio_is_a_text", "aio", {"block_size": "x"}, "aio.block_size"),
    Case(
        "engine_batch_in_both_places",
        lambda w: (w.set_engine(train_batch_size=64), w.train())[1],
        says=["train_batch_size: the DeepSpeed JSON says 64"],
    ),
    raw("engine_key_twice", '{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', '"bf16" twice'),
    raw("engine_field_twice", '{"bf16": {"enabled": true, "enabled": false}}', '"enabled" twice'),
    raw("engine_nan", '{"gradient_clipping": NaN}', "holds NaN"),
    raw("engine_infinity", '{"gradient_predivide_factor": -Infinity}', "holds -Infinity"),
    raw("engine_number_overflows", '{"gradient_predivide_factor": 1e999}', "holds 1e999"),
    raw("engine_digits", '{"steps_per_print": ' + "9" * 5000 + "}", "is not valid JSON"),
    raw("engine_deeply_nested", '{"bf16": ' + "[" * 100_000, "nested too deeply"),
    raw("engine_deeply_nested_objects", '{"bf16": ' * 5000, "nested too deeply"),
    raw("engine_is_a_list", '[{"bf16": {"enabled": true}}]', "holds a list"),
    raw("engine_is_a_number", "3", "holds 3"),
    raw("engine_is_empty", "", "is not valid JSON"),
    raw("engine_is_yaml", "bf16:\n  enabled: true\n", "is not valid JSON"),
    raw("engine_not_utf8", b'{"bf16": "\xff"}', "not UTF-8"),
    raw("engine_byte_order_mark", b'\xef\xbb\xbf{"bf16": {"enabled": true}}', "is not valid JSON"),
    raw("engine_nul", b'{"bf16"\x00: {"enabled": true}}', "is not valid JSON"),
    raw("engine_comment", '{// mine\n"bf16": {"enabled": true}}', "is not valid JSON"),
    instead("engine_is_a_pipe", _fifo, "a pipe or device"),
    instead("engine_is_dev_zero", lambda w: "/dev/zero", "a pipe or device"),
    instead("engine_is_a_folder", lambda w: str(w.text), "is a folder"),
    instead("engine_is_nowhere", lambda w: "/nowhere/ds.json", "cannot read '/nowhere/ds.json'"),
    instead("engine_is_huge", _huge, "bytes, allowed are"),
    instead("engine_name_of_5000_characters", lambda w: "/" + "n" * 5000, "cannot read"),
    instead("engine_name_is_misspelt", lambda w: "zero22", "found 'zero22'", "did you mean 'zero2'?"),
    Case(
        "print_config_with_a_broken_engine",
        lambda w: (w.engine.write_text("{"), w.train("--print_config"))[1],
        says=["--deepspeed", "is not valid JSON"],
    ),
    Case(
        "print_config_with_an_engine_that_is_nowhere",
        lambda w: w.train("--deepspeed", "/nowhere/ds.json", "--print_config"),
        says=["--deepspeed: cannot read"],
    ),
]
