"""What a run says that it will make, against stock models built independently and a schedule counted by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig

from homodistil.config.command_line import parse
from homodistil.errors import UserError
from homodistil.training.resolve import resolve_run
from homodistil.training.run_summary import run_summary
from homodistil.training.settle import settle

BASE = BertConfig()
TINY = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)


def parameters(layers: int, hidden: int, ffn: int, heads: int) -> int:
    """Of a stock model."""
    with torch.device("meta"):
        model = BertForMaskedLM(
            BertConfig(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads)
        )
    return sum(p.numel() for p in model.parameters())


def test_the_quickstart_in_numbers():
    assert run_summary(resolve_run(parse([]), TINY)) == {
        "task": "mlm; 9.3 tokens of each block of 64 are predicted, on average",
        "student": "2 layers, hidden 64, ffn 256, 2 heads of 32; from a copy of embedded:bert-tiny",
        "layers": "copies of all 2 of the teacher's; compared (hidden, attention) with their own",
        "parameters": f"{parameters(2, 128, 512, 2):,} (teacher) -> {parameters(2, 64, 256, 2):,} (48%)",
        "losses": "mlm x 1, kl x 4, hidden x 1, attention x 1, embedding x 1",
        "learning rate": "0.003 at its peak",
        # 0.1 of 400 steps is 40, whose widths are reached at 35: hidden 64 is within half a dim of the curve there.
        "pruning": "cubic, 7 events in steps 5 to 35, 5 steps apart or more (of 400); compensation full",
    }


def test_the_papers_base_in_numbers():
    told = run_summary(resolve_run(parse(["recipe=homobert-base-paper"]), BASE))
    assert told["student"].startswith("12 layers, hidden 576, ffn 2304, 12 heads of 48; from a copy of bert-base")
    assert told["parameters"].startswith(f"109,514,298 (teacher) -> {parameters(12, 576, 2304, 12):,} (60%)")
    assert "kl x 1," in told["losses"] and "compensation none" in told["pruning"]
    # ffn goes from 3072 to 2304 in multiples of 64: 32 are due where 1 - (1 - t / 19600)^3 > 32 / 768, which is step
    # 276, and the last 32 where (1 - t / 19600)^3 < 32 / 768, step 12806; events are 100 steps apart.
    assert "in steps 300 to 12900, 100 steps apart or more (of 28000)" in told["pruning"]


@pytest.mark.parametrize(
    ("recipe", "overrides", "subject", "text"),
    [
        ("baselines/random_init", [], "student", "2 heads of 32; fresh weights"),
        (
            "baselines/random_init",
            [],
            "layers",
            "fresh weights; compared (hidden, attention) with all 2 of",
        ),
        ("baselines/random_init", [], "pruning", "nothing is cut in 400 steps"),
        ("quickstart", ["pruning.schedule=none"], "student", "2 layers, hidden 128, ffn 512, 2 heads of 64"),
        ("quickstart", ["pruning.schedule=none"], "pruning", "nothing is cut in 400 steps"),
        ("baselines/minilmv2", [], "losses", "relations x 1"),
        ("baselines/one_shot", [], "pruning", "one_shot, all before step 1 (of 400); compensation none"),
        ("quickstart", ["pruning.schedule=one_shot", "pruning.one_shot_stages=2"], "pruning", "step 1, in 2 stages"),
        ("quickstart", ["pruning.schedule=gap"], "pruning", "gap, as fast as pruning.gap_bound=0.1 allows, by step 40"),
        ("baselines/distilbert", [], "student", "1 layer, hidden 128, ffn 512, 2 heads of 64; from a copy of"),
        ("baselines/distilbert", [], "layers", "copies of the teacher's 0; compared (cosine) with the teacher's 1"),
        ("baselines/mlm_only", [], "layers", "; no loss compares them with the teacher's"),
        ("baselines/distilbert", [], "parameters", f"-> {parameters(1, 128, 512, 2):,} (96%)"),
    ],
)
def test_other_forms(recipe, overrides, subject, text):
    assert text in run_summary(resolve_run(parse([f"recipe={recipe}", *overrides]), TINY))[subject]


def test_a_decoder_in_numbers():
    """4 layers of 6 in 3 groups of 2 heads, by a depth that does not divide the teacher's."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 3}
    teacher = LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=300)
    fields = ["student.hidden_size=36", "student.intermediate_size=40", "student.num_attention_heads=4"]
    depth = ["student.num_hidden_layers=4", "data.seq_len=128"]
    config = parse(["teacher.name=/models/mine", *fields, *depth, "loss.attention=0", "pruning.compensation=none"])
    settle(config, teacher)
    told = run_summary(resolve_run(config, teacher))
    assert told["task"] == "causal; 127 tokens of each block of 128 are predicted, on average"
    assert told["student"] == "4 layers, hidden 36, ffn 40, 4 heads of 8 in 2 groups; from a copy of /models/mine"
    assert told["layers"] == "copies of the teacher's 0, 2, 3, 5; compared (hidden) with the teacher's 1, 2, 4, 5"


def test_what_terms_compare_is_told_once_it_is_settled():
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 3}
    teacher = LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=300)
    fields = ["student.hidden_size=36", "student.intermediate_size=40", "student.num_attention_heads=6"]
    config = parse(["teacher.name=/models/mine", *fields, "loss.cosine=1"])
    settle(config, teacher)
    told = "lm x 1, kl x 4, hidden x 1 (normalised), attention x 1 (probabilities_kl), embedding x 1 (normalised)"
    assert run_summary(resolve_run(config, teacher))["losses"] == f"{told}, cosine x 1"
    config = parse(["loss.attention_target=centred_scores"])
    settle(config, TINY)
    told = "mlm x 1, kl x 4, hidden x 1 (raw), attention x 1 (centred_scores), embedding x 1 (raw)"
    assert run_summary(resolve_run(config, TINY))["losses"] == told


def test_no_target_proposes_half_of_this_teacher():
    with pytest.raises(UserError, match=r"^student: no target size; for half .* student.hidden_size=384 student.inter"):
        run_summary(resolve_run(parse(["teacher.name=/models/mine"]), BASE))
