"""Exported checkpoints: stock shapes, the student's logits, and no code of ours to load them."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from support.small import VOCABULARY, random_keep, small_batch, small_model, small_pair
from transformers import BertConfig, BertTokenizerFast

from homodistil.config.schema import RunConfig
from homodistil.export.model_card import complete_cards, describe_widths
from homodistil.export.stock_model import save_checkpoint, stock_model
from homodistil.models.encoders.bert import BERT
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.training.run_card import run_card

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
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.target_index]
    torch.testing.assert_close(logits.detach(), student.predict(batch), rtol=1e-5, atol=1e-5)


def test_widths_that_no_stock_config_can_hold_are_recognised():
    student, weights = _pruned(21, 4, 5, 33)  # 21 is not divisible by 4 heads
    assert BERT.stock_head_dim(student.widths) is None
    with pytest.raises(ValueError, match="no stock configuration"):
        stock_model(weights, student, TEACHER_CONFIG)
    wide, _ = _pruned(20, 4, 6, 33)  # 4 heads of 6 are wider than the residual stream
    assert BERT.stock_head_dim(wide.widths) is None


@pytest.mark.process
def test_an_interpreter_without_homodistil_loads_it(tmp_path):
    student, weights = _pruned(20, 4, 5, 33)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "milestone-0.9").mkdir()
    facts = {"parameters": 1234, "hidden_size": 20, "folder": "export", "data": "a corpus", "mlm_loss": 1.5}
    card = run_card(RunConfig(), BERT, facts, "python launcher/train.py a=b")
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
    found = torch.tensor(logits).flatten(0, 1)[batch.target_index]
    torch.testing.assert_close(found, student.predict(batch), rtol=1e-5, atol=1e-5)
    assert num_parameters == student.num_parameters() and dtype == "torch.float32"
    assert "1,234 parameters" in card and "| mlm_loss | 1.5 |" in card and "\npython launcher/train.py a=b\n" in card
    assert (folder / "README.md").read_text() == card and (folder / "milestone-0.9").is_dir()


def test_the_card_says_what_became_narrower():
    before = {"hidden": 128, "layer.0.ffn": 512, "layer.0.heads": 4, "layer.0.qk_dim": 32, "layer.0.vo_dim": 32}
    after = {"hidden": 64, "layer.0.ffn": 256, "layer.0.heads": 2, "layer.0.qk_dim": 30, "layer.0.vo_dim": 30}
    assert describe_widths(before, after) == "hidden 128 -> 64, feed-forward 512 -> 256, heads 4 x 32 -> 2 x 30"


# --- the card ---------------------------------------------------------------------------------------------------------

FACTS = {"parameters": 1234, "hidden_size": 20, "folder": "export", "data": "2 documents"}
RESULTS = {"heldout_mlm_loss": 2.5, "masked_top1": 0.25, "kl_to_teacher": 0.125}
REPOSITORY = Path(__file__).parents[3]


def _foreign_run(folder: Path, card: str | None = None) -> RunConfig:
    """A teacher, text and folders that exist on this machine alone."""
    teacher = folder / "my-bert"
    teacher.mkdir()
    if card is not None:
        (teacher / "README.md").write_text(card)
    config = RunConfig()
    config.teacher.name, config.data.sources = str(teacher), [f"{folder}/news/", f"{folder}/mail.jsonl"]
    config.run.name, config.run.dir, config.data.cache_dir = "mine", f"{folder}/runs/mine", "~/cache of mine"
    return config


def _typed(config: RunConfig, *more: str) -> str:
    fields = [f"teacher.name={config.teacher.name}", f"data.sources=[{','.join(config.data.sources)}]", "train.lr=1e-3"]
    fields += [f"run.dir={config.run.dir}", f"data.cache_dir={config.data.cache_dir}"]
    return shlex.join(["/usr/bin/python3.11", f"{REPOSITORY}/launcher/train.py", "--local_rank=0", *fields, *more])


def test_no_folder_of_this_machine_is_in_the_card(tmp_path):
    config = _foreign_run(tmp_path)
    shutil.copy(REPOSITORY / "ds_configs" / "zero2_fp32.json", tmp_path)
    more = ["--deepspeed", f"{tmp_path}/zero2_fp32.json", f"--config={tmp_path}/my.yaml", "run.note=/srv/x y", "a=../b"]
    card = run_card(config, BERT, FACTS | RESULTS, _typed(config, *more), num_ranks=2)
    for gone in (str(tmp_path), str(Path.home()), str(REPOSITORY), "/usr", "/srv", "~", "../", "local_rank"):
        assert gone not in card, gone
    command = card[card.index("```\ndeepspeed") + 4 :].split("\n```")[0]
    assert shlex.split(command) == [
        *"deepspeed --num_accelerators 2 launcher/train.py teacher.name=TEACHER".split(),
        *"data.sources=[TEXT_1,TEXT_2] train.lr=1e-3 run.dir=RUN_DIR data.cache_dir=CACHE_DIR".split(),
        *"--deepspeed ds_configs/zero2_fp32.json --config CONFIG".split(),
        *["run.note=PATH_1 y", "a=PATH_2"],
    ]
    for told in (
        "For `TEACHER` put the folder of the teacher `my-bert`.",
        "For `TEXT_1` put the text `news`.",
        "For `TEXT_2` put the text `mail.jsonl`.",
        "For `CONFIG` put a YAML file",
        "Text: news, mail.jsonl (2 documents).",
        "Made from `my-bert`",
    ):
        assert told in card


def test_the_command_is_what_was_typed_where_that_means_something_elsewhere():
    typed = (
        "python launcher/train.py --local_rank=1 --deepspeed ds_configs/zero2.json recipe=quickstart data.seq_len=32"
    )
    card = run_card(RunConfig(), BERT, FACTS, typed, num_ranks=1)
    assert "\npython launcher/train.py --deepspeed ds_configs/zero2.json recipe=quickstart data.seq_len=32\n" in card
    assert "For `" not in card
    card = run_card(RunConfig(), BERT, FACTS, "python /opt/ipykernel_launcher.py -f /root/kernel.json", num_ranks=1)
    assert "\npython launcher/train.py --config CONFIG --deepspeed DEEPSPEED_JSON\n" in card and "kernel" not in card


@pytest.mark.parametrize(
    "teacher_card, licence, base_model",
    [
        (
            "---\nlicense: mit\nbase_model: google-bert/bert-base-uncased\n---\n# x\n",
            "mit",
            "google-bert/bert-base-uncased",
        ),
        ("---\nlicense: cc-by-4.0\nbase_model: [a/b, c/d]\n---\n", "cc-by-4.0", "a/b"),
        ("# no head\n", None, None),
        ("---\nlicense: [\n---\n", None, None),
        ("---\n- license\n---\n", None, None),
        (None, None, None),
    ],
)
def test_licence_and_base_model_are_the_teachers_own(tmp_path, teacher_card, licence, base_model):
    config = _foreign_run(tmp_path, teacher_card)
    (tmp_path / "README.md").write_text(run_card(config, BERT, FACTS | RESULTS, _typed(config)))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model) == (licence, base_model)
    assert ("is not known here" in (tmp_path / "README.md").read_text()) == (licence is None)


def test_packaged_and_hub_names_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = RunConfig()
    config.teacher.name, config.data.sources = "embedded:minilm-l6", ["wikipedia", "owner/set:part", "embedded:bible"]
    (tmp_path / "README.md").write_text(run_card(config, BERT, FACTS | RESULTS, "python launcher/train.py"))
    head = metadata_load(tmp_path / "README.md")
    assert head["license"] == "apache-2.0" and head["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert head["datasets"] == ["wikimedia/wikipedia", "owner/set"]


def test_the_hub_reads_the_results(tmp_path):
    config = _foreign_run(tmp_path)
    (tmp_path / "README.md").write_text(run_card(config, BERT, FACTS | RESULTS, _typed(config)))
    card = ModelCard.load(tmp_path / "README.md")
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("loss", 2.5),
        ("accuracy", 0.25),
        ("kl_divergence", 0.125),
    ]
    assert card.data.model_name == "mine" and card.data.pipeline_tag == "fill-mask"
    assert {r.dataset_name for r in card.data.eval_results} == {"held-out documents of news, mail.jsonl"}
    # A value that was not measured, or is none, is no result.
    (tmp_path / "README.md").write_text(run_card(config, BERT, FACTS | {"masked_top1": float("nan")}, _typed(config)))
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_the_teachers_results_are_put_beside_the_students(tmp_path):
    cards = [tmp_path / f"{name}/README.md" for name in ("export", "export/milestone-0.5", "compare/one_shot/export")]
    config = RunConfig()
    for card in cards:
        card.parent.mkdir(parents=True, exist_ok=True)
        card.write_text(run_card(config, BERT, FACTS | RESULTS, "python launcher/train.py"))
    before = cards[0].read_text()
    assert "| held-out MLM loss, nats (lower is better) | 2.5000 | - |" in before
    teacher = {"name": "teacher", "heldout_mlm_loss": 2.25, "masked_top1": None, "kl_to_teacher": 0.0}
    for _ in range(2):  # a job that is concluded twice
        complete_cards(tmp_path, teacher)
        for card in cards:
            text = card.read_text()
            assert "| held-out MLM loss, nats (lower is better) | 2.5000 | 2.2500 |" in text
            assert "| masked tokens guessed right (higher is better) | 0.2500 | - |" in text
            assert "| KL to the teacher, nats (lower is better) | 0.1250 | 0.0000 |" in text
            assert len(text.splitlines()) == len(before.splitlines())
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["README.md", "milestone-0.5"]
