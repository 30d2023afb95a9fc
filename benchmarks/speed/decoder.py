"""One run on a decoder with real weights: SmolLM2-135M to about 95 M parameters, killed in the middle and resumed.

    python -m benchmarks.speed.decoder

Two ranks, ZeRO-2, fp32, live events on heads, neurons and the residual stream. The job runs twice: once
through, and once with both ranks killed by SIGKILL in the middle of pruning and started again. Their exports must be
the same files (sha256). The export is then loaded by the library alone and generates with and without its key-value
cache. Time of a step is the run's own (metrics.jsonl), memory that of all its processes together.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness.environment import ROOT, environment
from benchmarks.harness.process import Ran, run
from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page, parser, publish
from benchmarks.harness.table import table
from homodistil.distributed.fault_injection import VARIABLE
from homodistil.distributed.free_port import free_port

NUM_RANKS, SAVE_EVERY, KILLED_IN = 2, 4, 6
PROMPT = "The capital of France is"
FIELDS = {
    "teacher.name": "embedded:smollm2-135m",
    "student.hidden_size": 480,
    "student.intermediate_size": 1280,
    "student.num_attention_heads": 6,
    "data.sources": "[embedded:wikipedia]",
    "data.seq_len": 64,
    "data.heldout_fraction": 0.01,
    "loss.kl": 1.0,
    "loss.hidden": 0.0,
    "loss.attention": 0.0,
    "loss.embedding": 0.0,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
    "train.lr": 2e-4,
    "train.log_every_steps": 1,
    "train.save_every_steps": SAVE_EVERY,
    "train.eval_every_steps": 1000,
    "pruning.schedule": "cubic",
    "pruning.end_fraction": 0.9,
    "pruning.interval_steps": 2,
    "pruning.width_multiple": 1,
    "run.compare": "[]",
    "run.resume": "auto",
}


def main() -> None:
    made = parser(__doc__, quick="8 steps of 2 x 32 tokens")
    args = made.parse_args()
    fields = FIELDS | {"train.steps": 12}
    if args.quick:
        fields |= {"train.steps": 8, "data.seq_len": 32, "train.global_batch_size": 2, "train.micro_batch_size": 1}
    with tempfile.TemporaryDirectory() as folder:
        through, killed = Path(folder) / "through", Path(folder) / "killed"
        ran = train(fields, through)
        kill(fields, killed)
        train(fields, killed)
        shas = {sha256(one) for one in (through, killed)}
        if len(shas) != 1:
            raise RuntimeError(f"the resumed run's export is another one: {shas}")
        facts = {"export": f"sha256 {shas.pop()}", "generates": generated(through / "export")}
        rows = to_rows(fields, through, ran)
        publish("decoder", page("A decoder with real weights", report(through, ran), facts=facts), rows, args)


def train(fields: dict[str, object], run_dir: Path) -> Ran:
    """The job, to its end."""
    settings = [f"{name}={value}" for name, value in (fields | {"run.dir": run_dir}).items()]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(NUM_RANKS)]
    launcher += ["--master_port", str(free_port()), str(ROOT / "launcher" / "train.py")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    configuration = ["--deepspeed", str(ROOT / "ds_configs" / "zero2_fp32.json")]
    return run([*launcher, *configuration, *settings], run_dir.with_suffix(".log"), ROOT)


def kill(fields: dict[str, object], run_dir: Path) -> None:
    """The job, until SIGKILL ends its ranks in step `KILLED_IN`, behind the checkpoint of step `SAVE_EVERY`."""
    os.environ[VARIABLE] = f"train.step:hit={KILLED_IN}"
    try:
        train(fields, run_dir)
    except RuntimeError:
        left = [path.name for path in (run_dir / "checkpoints").glob("step*")]
        if not left or (run_dir / "export").exists():
            raise
    else:
        raise RuntimeError("the ranks were not killed")
    finally:
        del os.environ[VARIABLE]


def sha256(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "export" / "model.safetensors").read_bytes()).hexdigest()


def generated(export: Path) -> str:
    """What the export says, by the library alone; the same with and without its key-value cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export).eval(), AutoTokenizer.from_pretrained(export)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "do_sample": False}
    with_cache, without = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    if not torch.equal(with_cache, without):
        raise RuntimeError("generation differs with and without the key-value cache")
    return f"{type(model).__name__}, {repr(tokenizer.decode(with_cache[0]))}"


def lines(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def steps_of(run_dir: Path) -> list[dict]:
    return [line for line in lines(run_dir, "metrics.jsonl") if "loss/total" in line]


def to_rows(fields: dict[str, object], run_dir: Path, ran: Ran) -> Rows:
    rows = Rows("decoder", environment() | {name: str(value) for name, value in fields.items()})
    for model in json.loads((run_dir / "result.json").read_text()):
        for metric, unit in (("parameters", "1"), ("perplexity", "1"), ("bits_per_byte", "bits")):
            rows.add(model["name"], metric, unit, "held-out text", model[metric])
    for event in lines(run_dir, "events.jsonl"):
        rows.add("event", "milliseconds", "ms", event["step"], event["milliseconds"])
    rows.add("job", "wall", "s", "whole run", ran.wall_s)
    rows.add("job", "processor", "s", "whole run", ran.cpu_s)
    rows.add("job", "memory of all processes", "bytes", "peak", ran.peak_bytes)
    return rows


def report(run_dir: Path, ran: Ran) -> str:
    models = [
        (m["name"], m["parameters"], m["heldout_lm_loss"], m["perplexity"], m["bits_per_byte"], m["kl_to_teacher"])
        for m in json.loads((run_dir / "result.json").read_text())
    ]
    columns = ["model", "parameters {:,}", "loss {:.3f}", "perplexity {:,.1f}", "bits per byte {:.3f}", "KL {:.3f}"]
    events = [
        (str(e["step"]), str(e["widths_after"]["hidden"]), str(e["widths_after"]["layer.0.ffn"]), e["milliseconds"])
        for e in lines(run_dir, "events.jsonl")
    ]
    speeds = [line["speed/tokens_per_s"] for line in steps_of(run_dir) if line.get("speed/tokens_per_s")]
    job = (
        f"Whole job: {ran.wall_s:.0f} s wall, {ran.cpu_s:.0f} s of processor, {ran.peak_bytes / 1e9:.1f} GB in all "
        f"processes of {NUM_RANKS} ranks; median {statistics.median(speeds):.0f} tokens/s. Twelve steps are no "
        f"training: the table shows that the mechanics hold on real weights, not how good a student becomes."
    )
    heads = ["before step", "hidden", "neurons", "resize ms {:.0f}"]
    return "\n\n".join([table(columns, models), table(heads, events), job])


if __name__ == "__main__":
    main()
