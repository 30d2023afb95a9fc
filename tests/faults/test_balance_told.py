"""A real job tells what it will make before it prepares anything, and which term its loss is made of."""

from __future__ import annotations

import json

import pytest
from support.fork_server import ROOT
from support.small_job import TRAIN, arguments

FIELDS = ("train.steps=5", "train.save_every_steps=0", "train.eval_every_steps=0", "pruning.end_fraction=0.6")


@pytest.mark.parametrize("weight", [1, 1000])
def test_shares_are_told_and_one_term_alone_is_warned_of(server, run_inputs, tmp_path, weight):
    engine = ROOT / "ds_configs" / "zero2_fp32.json"
    fields = arguments(run_inputs, tmp_path / "run", *FIELDS, f"loss.attention={weight}", engine=engine)
    job = server.start(TRAIN, fields)
    assert job.wait(timeout_s=120) == [0, 0], job.output()
    told = job.output(0).splitlines()
    order = [
        "task: mlm; ",
        "student: 3 layers, hidden 12, ffn 20, 4 heads of 3;",
        "layers: copies of all 3 of the teacher's; compared (hidden, attention) with their own",
        "parameters: ",
        "losses: ",
        "learning rate: ",
        "pruning: ",
        "teacher: ",
    ]
    first = [next(i for i, line in enumerate(told) if line.startswith(text)) for text in order]
    assert first == list(range(first[0], first[0] + 7)) + first[7:] and first[7] > first[6]
    assert sum("the loss is" in line for line in told) == 2  # before and after the first cut
    warned = [line for line in told if line.startswith("warning: the attention term is ")]
    assert (len(warned) > 0) == (weight == 1000), told
    assert all("would make it as large as all the others together" in line for line in warned)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["kind"] == "train"):
        shares = {name.removeprefix("share/"): value for name, value in line.items() if name.startswith("share/")}
        assert shares.keys() == {"mlm", "kl", "hidden", "attention", "embedding"}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["mlm"] * line["loss/total"] == pytest.approx(line["loss/mlm"], rel=1e-5)
    assert "the loss is" not in job.output(1)
