"""Builds the engine from DeepSpeed's JSON and the run config: process group, "auto" values, optimizer, LR schedule."""

from __future__ import annotations

import atexit
import datetime
import os
import warnings
from pathlib import Path

import torch
from torch import distributed, nn

from homodistil.config.schema import OptimizerConfig, TrainConfig
from homodistil.distributed.free_port import free_port
from homodistil.distributed.launcher_env import adopt_launcher_variables, check_rank_variables
from homodistil.engine.ds_config import is_enabled
from homodistil.engine.ds_config_file import check_engine_json, read_engine_json
from homodistil.engine.engine import TrainingEngine
from homodistil.engine.native_ops import without_op
from homodistil.engine.optimizer import build_optimizer, build_schedule
from homodistil.errors import RankLost, UserError
from homodistil.resize import check_config, check_supported

# Entries of DeepSpeed's JSON that are filled from the run config -> the field they come from.
_FROM_CONFIG = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size / (train.micro_batch_size x ranks)",
    "gradient_clipping": "train.gradient_clipping",
}
_NOT_HERE = {"optimizer": "optimizer.* and train.lr", "scheduler": "train.lr and train.warmup_fraction"}

# Rank 0 may prepare data for hours while all other ranks wait in a collective. The watchdog detects hanging ranks.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=7)


def init_ranks(rank_timeout_s: float = 1800) -> torch.device:
    """Join the process group and return the device of this rank. Every rank calls it.

    The rank variables come from the `deepspeed` launcher, torchrun, srun or mpirun (launcher_env.py); without any of
    these the job has one rank. A process that has joined before (a notebook that runs a second job) keeps its process
    group until it ends, because at the same port other ranks could connect to the store of the earlier job.

    Args:
        rank_timeout_s: seconds to wait for all ranks (`run.rank_timeout_s`).

    Raises:
        RankLost: not all ranks have joined in time.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    adopt_launcher_variables()
    if "RANK" not in os.environ:
        _single_rank_variables()
    check_rank_variables()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed calls functions that newer versions of torch have renamed; users can do nothing about these warnings.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.utils.logger.setLevel(os.environ.get("HOMODISTIL_DEEPSPEED_LOG", "ERROR"))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if not distributed.is_initialized():
        _join(rank_timeout_s)
        atexit.register(_leave)
        distributed.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
    return torch.device(get_accelerator().device_name(local_rank))


def _join(rank_timeout_s: float) -> None:
    import deepspeed

    try:
        # Tensor-parallel inference on a CPU alone calls this op. It has to be compiled, and shares 66 MiB per rank.
        with without_op("deepspeed_shm_comm"):
            deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(seconds=rank_timeout_s))
    except (distributed.DistError, RuntimeError) as error:
        env = os.environ
        raise RankLost(
            f"rank {env['RANK']} of {env['WORLD_SIZE']} could not join the others at {env.get('MASTER_ADDR')}:"
            f"{env.get('MASTER_PORT')} within run.rank_timeout_s ({rank_timeout_s:g} s): {str(error).splitlines()[0]}; "
            f"start all ranks, with the same address and a free port"
        ) from error


def _leave() -> None:
    import deepspeed

    if distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


def _single_rank_variables() -> None:
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def load_engine_config(path: Path) -> dict:
    """Read DeepSpeed's JSON. Raises `UserError` if it is missing or DeepSpeed would reject it (ds_config_file.py)."""
    content = read_engine_json(path)
    check_engine_json(content, str(path))
    return content


def resolve_engine_config(engine_config: dict, train: TrainConfig, num_ranks: int) -> dict:
    """DeepSpeed's JSON with "auto" and missing values filled from the section `train` of the run config.

    Returns:
        A new dict for `deepspeed.initialize`.

    Raises:
        UserError: a value differs between JSON and run config, the global batch size is not divisible by micro-batch
            size x ranks, the device does not support the precision, or `resize` does not support an option.
    """
    for section, fields in _NOT_HERE.items():
        if section in engine_config:
            raise UserError(
                f"{section!r} in the DeepSpeed JSON is not read; remove it and set {fields} in the run config"
            )
    values = _values_from_config(train, num_ranks)
    resolved = dict(engine_config)
    for name, value in values.items():
        given = engine_config.get(name, "auto")
        if given not in ("auto", value):
            raise UserError(
                f"{name}: the DeepSpeed JSON says {given}, the run config says {value} ({_FROM_CONFIG[name]}); "
                f'write "auto" in the JSON or make both agree'
            )
        resolved[name] = value
    _check_no_auto(resolved)
    _check_precision(resolved)
    check_config(resolved)
    resolved.setdefault("steps_per_print", 10**9)
    resolved["zero_allow_untested_optimizer"] = True
    # torch's AdamW can run in host memory, too; by default DeepSpeed insists on its own optimizer there.
    resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved


def _values_from_config(train: TrainConfig, num_ranks: int) -> dict:
    together = train.micro_batch_size * num_ranks
    if train.global_batch_size % together:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is not divisible by train.micro_batch_size x ranks = "
            f"{train.micro_batch_size} x {num_ranks} = {together}; choose a multiple of {together}"
        )
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // together,
        "gradient_clipping": train.gradient_clipping,
    }


def _check_no_auto(section: dict, path: str = "") -> None:
    """Raise `UserError` for an "auto" that is not filled here, such as one that Hugging Face's Trainer would fill.

    DeepSpeed itself would fail on the word later, with an unrelated message.
    """
    for name, value in section.items():
        if isinstance(value, dict):
            _check_no_auto(value, f"{path}{name}.")
        elif value == "auto":
            raise UserError(
                f'{path}{name}: "auto" in the DeepSpeed JSON is filled for {", ".join(_FROM_CONFIG)} only; '
                f"write a value, or remove it for DeepSpeed's default"
            )


def _check_precision(engine_config: dict) -> None:
    if is_enabled(engine_config, "fp16") and not torch.cuda.is_available():
        raise UserError("fp16.enabled: true in the DeepSpeed JSON needs a GPU; on CPU use bf16 (ds_configs/zero2.json)")
    if is_enabled(engine_config, "fp16") and is_enabled(engine_config, "bf16"):
        raise UserError("fp16.enabled and bf16.enabled are both true in the DeepSpeed JSON; switch one off")


def build_engine(
    module: nn.Module, train: TrainConfig, optimizer: OptimizerConfig, engine_config: dict
) -> TrainingEngine:
    """Build the engine that trains `module` with AdamW and its LR schedule. Every rank calls it after `init_ranks`.

    Args:
        module: the student (fp32, at the current widths).
        train: learning rate, weight decay, schedule.
        optimizer: implementation and hyperparameters of AdamW.
        engine_config: from `resolve_engine_config`.

    Raises:
        UserError: DeepSpeed built an engine that `resize` does not support.
    """
    import deepspeed

    _import_muon_uncompiled()
    adamw = build_optimizer(module, train, optimizer, engine_config)
    schedule = build_schedule(adamw, train)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=adamw, lr_scheduler=schedule, config=engine_config, dist_init_required=False
    )
    check_supported(engine)
    return TrainingEngine(engine)


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which every ZeRO optimizer does, but without what `torch.compile` imports for it.

    That is torch._inductor, seconds of every rank's start. Muon itself is never used: `build_optimizer` gives AdamW.
    """
    from deepspeed.runtime import compiler

    before = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = before
