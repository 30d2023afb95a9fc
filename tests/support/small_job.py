"""The job that the fault tests run: the real one, from the real launcher script, small enough for a second or two.

A random BERT (3 layers, hidden 24) with a real WordPiece tokenizer in a folder, a few text files, fp32 under ZeRO-2,
10 steps with a checkpoint every third and four resize events, at the same step as a checkpoint and at others.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BertTokenizerFast

from support.fork_server import ROOT
from support.small import small_model

TRAIN = ROOT / "launcher" / "train.py"
STEPS, SAVE_EVERY = 10, 3
LETTERS = [chr(97 + i) for i in range(26)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
# What no two runs have in common.
MEASURED = ("speed/", "memory/", "milliseconds")


def make_materials(folder: Path, **teacher: object) -> None:
    """`teacher`, `text`, `cache`, and an empty config file. `teacher`: other values than those of `small_model`."""
    small_model(**{"max_position_embeddings": 32} | teacher).save_pretrained(folder / "teacher")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "teacher")
    (folder / "text").mkdir()
    words = "the quick brown fox jumps over the lazy dog and five boxing wizards pack my box with liquor jugs".split()
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        chosen = torch.randint(len(words), (120,), generator=generator).tolist()
        (folder / "text" / f"{i}.txt").write_text(" ".join(words[j] for j in chosen))
    (folder / "empty.yaml").write_text("{}")


def arguments(run_inputs: Path, run_dir: Path, *overrides: str, engine: Path | None = None) -> list[str]:
    """The command line of the job."""
    fields = {
        "teacher.name": run_inputs / "teacher",
        "data.sources": f"[{run_inputs / 'text'}]",
        "data.seq_len": 16,
        "data.cache_dir": run_inputs / "cache",
        "data.heldout_fraction": 0.2,
        "student.preset": "custom",
        "student.hidden_size": 12,
        "student.intermediate_size": 20,
        "student.num_attention_heads": 4,
        "train.steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.lr": 1e-3,
        "train.save_every_steps": SAVE_EVERY,
        "train.eval_every_steps": 5,
        "train.log_every_steps": 1,
        "pruning.compensation": "none",
        "pruning.end_fraction": 0.9,
        "pruning.interval_steps": 2,
        "pruning.ffn_multiple": 1,
        "pruning.max_event_fraction": 1.0,
        "loss.kl": 1.0,
        "run.dir": run_dir,
        "run.report": "false",
        "run.rank_timeout_s": 100,  # also how long the survivor of a kill during the start waits for the other
    }
    fields = [f"{name}={value}" for name, value in fields.items()]
    engine = engine or ROOT / "ds_configs" / "zero2_fp32.json"
    return ["--config", str(run_inputs / "empty.yaml"), "--deepspeed", str(engine), *fields, *overrides]


def result(run_dir: Path) -> dict:
    """Everything that must be bitwise the same, however often the run was killed: exports, logs, last checkpoint."""
    found: dict = {}
    for path in sorted(run_dir.rglob("*.safetensors")):
        if path.parent.name == "export" or path.parent.name == f"step-{STEPS:06d}":
            found |= {(path.relative_to(run_dir), name): tensor for name, tensor in load_file(path).items()}
    for name in ("metrics.jsonl", "events.jsonl"):
        found[name] = [_without_measured(json.loads(line)) for line in (run_dir / name).read_text().splitlines()]
    found["result.json"] = [_without_tokens_per_s(row) for row in json.loads((run_dir / "result.json").read_text())]
    return found


def differences(ours: dict, theirs: dict) -> list[str]:
    """Names of what is not bitwise the same."""
    names = ours.keys() | theirs.keys()
    return sorted(str(name) for name in names if not _is_same(ours.get(name), theirs.get(name)))


def _is_same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def _without_measured(line: dict) -> dict:
    return {name: value for name, value in line.items() if not name.startswith(MEASURED)}


def _without_tokens_per_s(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith("tokens_per_s")}
