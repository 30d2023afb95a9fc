"""Exported checkpoints: stock shapes, the student's logits, and no code of ours to load them."""

import json
import subprocess
import sys

import pytest
import torch
from small import VOCABULARY, random_keep, small_batch, small_model, small_pair
from transformers import BertConfig, BertTokenizerFast

from homodistil.config import RunConfig
from homodistil.export import save_checkpoint, stock_head_dim, stock_model
from homodistil.model_card import describe_widths, model_card
from homodistil.resize import make_plan, slice_module

TEACHER_CONFIG = BertConfig(**{**small_model().config.to_dict(), "hidden_dropout_prob": 0.1})


def _pruned(hidden, heads, head_dim, ffn):
    student, _ = small_pair()
    widths = {"hidden": hidden}
    for i in range(3):
        widths |= {f"layer.{i}.ffn": ffn, f"layer.{i}.heads": heads}
        widths |= {f"layer.{i}.qk_dim": head_dim, f"layer.{i}.vo_dim": head_dim}
    plan = make_plan(student.axis_table(), random_keep(student.axis_table(), widths))
    slice_module(student, plan)
    student.after_resize(plan.keep)
    return student, {name: p.detach().clone() for name, p in student.named_parameters()}


def _tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"))


@pytest.mark.parametrize(
    "hidden, heads, head_dim, ffn",
    [(20, 4, 5, 33), (15, 3, 5, 40), (12, 2, 6, 9), (20, 4, 4, 33)],
    ids=["narrower heads", "fewer heads", "both kept", "heads padded"],
)
def test_stock_model_gives_the_students_logits(hidden, heads, head_dim, ffn):
    student, weights = _pruned(hidden, heads, head_dim, ffn)
    model = stock_model(weights, student, TEACHER_CONFIG)
    assert (model.config.hidden_size, model.config.num_attention_heads) == (hidden, heads)
    assert model.config.intermediate_size == ffn and model.config.hidden_dropout_prob == 0.1
    batch = small_batch()
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.masked_index]
    torch.testing.assert_close(logits.detach(), student.predict(batch), rtol=1e-5, atol=1e-5)


def test_widths_that_no_stock_config_can_hold_are_recognised():
    student, weights = _pruned(21, 4, 5, 33)  # 21 is not divisible by 4 heads
    assert stock_head_dim(student.widths) is None
    with pytest.raises(ValueError, match="no stock configuration"):
        stock_model(weights, student, TEACHER_CONFIG)
    wide, _ = _pruned(20, 4, 6, 33)  # 4 heads of 6 are wider than the residual stream
    assert stock_head_dim(wide.widths) is None


def test_an_interpreter_without_homodistil_loads_it(tmp_path):
    student, weights = _pruned(20, 4, 5, 33)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "milestone-0.9").mkdir()
    facts = {"parameters": 1234, "hidden_size": 20, "folder": "export", "data": "a corpus", "mlm_loss": 1.5}
    card = model_card(RunConfig(), facts, "train.py a=b")
    save_checkpoint(stock_model(weights, student, TEACHER_CONFIG), _tokenizer(tmp_path), card, folder)
    batch = small_batch()
    program = """
import json, sys
sys.modules["homodistil"] = None  # any import of it fails
import torch
from transformers import AutoTokenizer, BertForMaskedLM
ids, mask = json.loads(sys.stdin.read())
model = BertForMaskedLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
logits = model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
print(json.dumps([logits.tolist(), sum(p.numel() for p in model.parameters()), str(model.dtype)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        input=json.dumps([batch.input_ids.tolist(), batch.attention_mask.tolist()]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    logits, num_parameters, dtype = json.loads(done.stdout.strip().splitlines()[-1])
    found = torch.tensor(logits).flatten(0, 1)[batch.masked_index]
    torch.testing.assert_close(found, student.predict(batch), rtol=1e-5, atol=1e-5)
    assert num_parameters == student.num_parameters() and dtype == "torch.float32"
    assert "1,234 parameters" in card and "| mlm_loss | 1.5 |" in card and "`train.py a=b`" in card
    assert (folder / "README.md").read_text() == card and (folder / "milestone-0.9").is_dir()


def test_the_card_says_what_became_narrower():
    before = {"hidden": 128, "layer.0.ffn": 512, "layer.0.heads": 4, "layer.0.qk_dim": 32}
    after = {"hidden": 64, "layer.0.ffn": 256, "layer.0.heads": 2, "layer.0.qk_dim": 30}
    assert describe_widths(before, after) == "hidden 128 -> 64, feed-forward 512 -> 256, heads 4 x 32 -> 2 x 30"
