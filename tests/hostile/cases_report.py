"""launcher/report.py: folders that are no run, runs of which nothing can be read, outputs that would replace a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from case import Case, Workspace

LINE = '{"kind": "train", "step": 10, "loss/total": 3.5}\n'
ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def _of(content: str | bytes | None = None, name: str = "metrics.jsonl") -> Callable[[Workspace], list[str]]:
    """The report of a run folder that holds this file alone (None: nothing at all)."""

    def build(workspace: Workspace) -> list[str]:
        workspace.run_dir.mkdir()
        if content is not None:
            data = content if isinstance(content, bytes) else content.encode()
            (workspace.run_dir / name).write_bytes(data)
        return ["report", str(workspace.run_dir)]

    return build


def _with(*options: str) -> Callable[[Workspace], list[str]]:
    """The report of a good run; {w} in an option is the workspace's folder, which has a file `mine` in it."""

    def build(workspace: Workspace) -> list[str]:
        command = _of(LINE)(workspace)
        (workspace.folder / "mine").write_text("mine")
        return [*command, *(option.replace("{w}", str(workspace.folder)) for option in options)]

    return build


def _benchmark(content: object, *options: str) -> Callable[[Workspace], list[str]]:
    """A comparison of this file, `benchmark.json`; an option of that name gets its folder."""

    def build(workspace: Workspace) -> list[str]:
        file = workspace.folder / "benchmark.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return ["report", str(file), *(str(workspace.folder / o) if o == file.name else o for o in options)]

    return build


def _path(make: Callable[[Path], object]) -> Callable[[Workspace], list[str]]:
    """The report of something that is no folder."""

    def build(workspace: Workspace) -> list[str]:
        make(workspace.run_dir)
        return ["report", str(workspace.run_dir)]

    return build


def _case(name: str, build: Callable[[Workspace], list[str]], *says: str) -> Case:
    return Case(f"report_{name}", build, says=says, ranks=1)


def _pipe_as_log(workspace: Workspace) -> list[str]:
    command = _of()(workspace)
    os.mkfifo(workspace.run_dir / "metrics.jsonl")
    return command


def _loop(path: Path) -> None:
    path.symlink_to(path)


ROW = {"variant": "a", "x": "half", "metric": "stsb", "value": 1, "config": {}}
CASES = [
    _case("of_nothing", lambda w: ["report", str(w.run_dir)], "run folder", "no such folder"),
    _case("of_an_empty_folder", _of(), "not a run folder", "metrics.jsonl"),
    _case("of_another_folder", lambda w: ["report", str(w.teacher)], "not a run folder"),
    _case("of_a_pipe", _path(os.mkfifo), "run folder", "found a file"),
    _case("of_a_device", lambda w: ["report", "/dev/zero"], "run folder /dev/zero", "found a file"),
    _case("of_a_loop_of_links", _path(_loop), "run folder"),
    _case("of_a_very_long_name", lambda w: ["report", "x" * 5000], "run folder", "name too long"),
    _case("of_a_pipe_as_log", _pipe_as_log, "not a run folder"),
    _case("torn_result", _of('[{"name": "hom', "result.json"), "result.json: cannot be read", "restore"),
    _case("result_is_an_object", _of("{}", "result.json"), "result.json", "found dict, expected list"),
    _case("result_is_deep", _of("[" * 100_000, "result.json"), "result.json: cannot be read"),
    _case("result_with_a_huge_number", _of(f"[{'9' * 5000}]", "result.json"), "result.json: cannot be read"),
    _case("broken_config", _of("train: [", "config.yaml"), "config.yaml: cannot be read"),
    _case("config_is_a_list", _of("[1]", "config.yaml"), "config.yaml", "found list, expected dict"),
    _case("config_is_an_alias_bomb", _of(ALIAS_BOMB, "config.yaml"), "config.yaml", "more than 100,000 values"),
    _case("config_runs_code", _of("!!python/object/apply:os.system [ls]", "config.yaml"), "config.yaml: cannot be"),
    _case("log_of_garbage", _of(b"\xff\xfe\x00\n" * 9), "metrics.jsonl: 9 of 9 lines cannot be read"),
    _case("log_without_steps", _of('{"kind": "train"}\n' * 3), "metrics.jsonl: 3 of 3 lines"),
    _case("log_is_deep", _of("[" * 100_000 + "\n"), "metrics.jsonl: 1 of 1 lines"),
    _case("log_with_huge_steps", _of(f'{{"kind": "train", "step": {"9" * 400}}}\n'), "metrics.jsonl: 1 of 1 lines"),
    _case("events_are_broken", _of('{"step": "x"}\n[]\n', "events.jsonl"), "events.jsonl: 2 of 2 lines"),
    _case("out_is_a_folder", _with("--out", "{w}"), "--out", "is a folder"),
    _case("out_is_another_file", _with("--out", "{w}/mine"), "--out", "is no HTML page"),
    _case("out_is_the_log", _with("--out", "{w}/run/metrics.jsonl"), "--out", "metrics.jsonl", "is no HTML page"),
    _case("out_is_below_a_file", _with("--out", "{w}/mine/page.html"), "--out", "mine is no folder"),
    _case("out_is_the_benchmark", _benchmark([ROW], "--out", "benchmark.json"), "--out", "is no HTML page"),
    _case("figures_is_a_file", _with("--figures", "{w}/mine"), "--figures", "mine is no folder"),
    _case("figures_is_below_a_file", _with("--figures", "{w}/mine/here"), "--figures", "mine is no folder"),
    _case("benchmark_is_an_object", _benchmark({"rows": [ROW]}), "benchmark.json", "experiments/quality"),
    _case("benchmark_of_numbers", _benchmark([1, 2]), "benchmark.json", "experiments/quality"),
    _case("benchmark_of_other_rows", _benchmark([{"variant": "a"}]), "benchmark.json", "KeyError"),
    _case("benchmark_with_other_config", _benchmark([ROW | {"config": 3}]), "benchmark.json", "TypeError"),
    _case("benchmark_is_deep", _benchmark("[" * 100_000), "benchmark.json", "RecursionError"),
    _case("benchmark_is_text", _benchmark("no JSON"), "benchmark.json", "experiments/quality"),
    _case("unknown_option", _with("--figs", "{w}/figures"), "--figs", "--help"),
    _case("without_a_run", lambda w: ["report"], "RUN_DIR", "--help"),
    _case("one_of_two_is_no_run", lambda w: [*_of(LINE)(w), str(w.text)], "run folder", "not a run folder"),
]
