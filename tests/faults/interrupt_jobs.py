"""Scripts that take their time where Ctrl-C is to meet them, and a caller of job.run."""

from __future__ import annotations

import dataclasses
import runpy
import sys
import time

from support.small_job import TRAIN

from homodistil.config.command_line import parse_job


class _Slowly:
    """A finder that answers after a minute for what every script imports first."""

    def find_spec(self, name: str, *_others: object) -> None:
        if name == "homodistil.distributed.script_exit":
            print("importing", flush=True)
            time.sleep(60)


def script_with_slow_imports(script: str) -> None:
    sys.modules.pop("homodistil.distributed.script_exit", None)
    sys.meta_path.insert(0, _Slowly())
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


def train_with_slow_preparation(arguments: list[str]) -> None:
    from homodistil.training import inputs

    def slow(*_arguments: object, **_named: object) -> None:
        print("preparing slowly", flush=True)
        time.sleep(60)

    inputs.prepare_corpus = slow
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


def notebook(arguments: list[str]) -> None:
    """Two cells: the first one is interrupted, the second one goes on."""
    from homodistil.train import run

    job = parse_job(arguments)
    try:
        run(job)
    except KeyboardInterrupt as error:
        print(f"KeyboardInterrupt: {error}", flush=True)
    config = dataclasses.replace(job.config, run=dataclasses.replace(job.config.run, resume="auto"))
    run(job._replace(config=config))
