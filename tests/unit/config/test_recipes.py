"""Every shipped recipe: parsed, each value labelled with its source, and two real steps through engine and files."""

import json
import random
import re
import shutil

import pytest
import torch
import yaml
from support.small import small_model
from transformers import BertForMaskedLM, BertTokenizer

from homodistil.config.command_line import parse
from homodistil.config.shipped import RECIPES, recipe_names
from homodistil.engine.build import init_ranks, resolve_engine_config
from homodistil.models.shapes import PRESETS
from homodistil.training.inputs import prepare_inputs
from homodistil.training.run import ROW_FILE, DistillationRun

BASELINES = [f"baselines/{n}" for n in ("distilbert", "minilmv2", "mlm_only", "one_shot", "random_init", "tinybert")]
OURS = [f"homobert-{size}" for size in ("base", "small", "xsmall", "tiny")]
PAPERS = [*(f"{name}-paper" for name in OURS), "paper"]
HALVES = ["roberta-half", "xlmr-half", "modernbert-half", "modernbert-22m", "smollm2-half", "qwen3-0.6b-to-0.3b"]
HALVES += ["llama-3.2-1b-half", "quickstart-decoder"]  # tests/unit/config/test_half_recipes.py
EMBEDDERS = ["quickstart-embedder", "minilm-quarter", "bge-small-half", "e5-one-language", "modernbert-embedder"]
EMBEDDERS += ["minilm-2-layers", "reranker-half", "ner-half"]  # tests/unit/config/test_text_recipes.py
SOURCES = {"paper", "authors", "ours", "same"}
WORDS = "the a whale ship sea captain white old sails deep over under and harpoon storm night crew of".split()


def test_all_recipes_are_tested():
    others = {"quickstart", "family"}  # tests/distributed/test_job.py, tests/faults/test_family.py
    assert set(recipe_names()) == {*others, *OURS, *PAPERS, *BASELINES, *HALVES, *EMBEDDERS}


@pytest.mark.parametrize("name", OURS + PAPERS + BASELINES + HALVES + EMBEDDERS)
def test_every_value_names_its_source(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) == sum(len(fields) for fields in yaml.safe_load(text).values())
    for line in lines:
        label = re.search(r"  # (\w+)", line)
        assert label and label[1] in SOURCES, f"{name}: {line}"


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_the_same_as_in_another_recipe_is_the_same(name):
    config, section = parse([f"recipe={name}"]), ""
    for line in (RECIPES / f"{name}.yaml").read_text().splitlines():
        section = match[1] if (match := re.match(r"(\w+):", line)) else section
        if match := re.match(r"  (\w+):.*# same as ([\w.-]+)", line):
            field, model = match.groups()
            here, there = (getattr(getattr(c, section), field) for c in (config, parse([f"recipe={model}"])))
            assert here == there, f"{name}: {section}.{field} is {here}, in {model} {there}"


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_numbers(name):
    config = parse([f"recipe={name}"])
    assert config.pruning.end_fraction in (0.5, 0.7, 0.9)


@pytest.mark.parametrize("name", OURS + PAPERS)
def test_what_our_form_keeps_of_the_papers(name):
    config = parse([f"recipe={name}"])
    assert (config.train.global_batch_size, config.train.steps, config.data.seq_len) == (4096, 28000, 128)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps) == (0.9, 0.999, 1e-6)
    assert config.train.lr == (3e-4 if config.student.preset == "homobert-base" else 6e-4)
    assert config.pruning.schedule == ("cubic" if name in PAPERS else "one_shot")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tokenizer of few words, text of these, and two teachers: one layer of BERT-base, two of BERT-tiny."""
    folder = tmp_path_factory.mktemp("parts")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer({word: i for i, word in enumerate(vocabulary)})
    shapes = {"base": (768, 3072, 12, 1), "tiny": (128, 512, 2, 2)}
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    for name, shape in shapes.items():
        sizes = dict(zip(names, shape, strict=True))
        model = small_model(vocab_size=len(vocabulary), initializer_range=0.05, **sizes)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS, k=12)) for _ in range(120))
    (folder / "text.txt").write_text("\n\n".join(lines))
    return folder


def two_steps(parts, name: str, *overrides: str):
    """The recipe's config on small material, in two steps that both may prune."""
    teacher = parts / ("base" if name in OURS + PAPERS else "tiny")
    small = [f"teacher.name={teacher}", "teacher.correction_steps=0", f"data.sources=[{parts / 'text.txt'}]"]
    small += ["data.text_documents=paragraph", "data.seq_len=16", f"data.cache_dir={parts / 'cache'}", "data.workers=0"]
    small += ["data.heldout_fraction=0.1", "train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2"]
    small += ["train.save_every_steps=0", "train.eval_every_steps=0", "train.log_every_steps=1", "run.compare=[]"]
    small += ["pruning.end_fraction=1", "pruning.interval_steps=1", "pruning.max_event_fraction=1"]
    small += ["pruning.calibration_batches=1", "pruning.compensation_sequences=8"]
    return parse([f"recipe={name}", *small, *overrides])


def distil(config, folder, stage: int = 2) -> DistillationRun:
    device = init_ranks()
    engine_config = resolve_engine_config({"zero_optimization": {"stage": stage}}, config.train, 1)
    run = DistillationRun(config, engine_config, prepare_inputs(config, device), folder, "a test")
    run.row = run.run()
    return run


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_trained(run: DistillationRun, config, folder) -> None:
    """Every weighted term, and no other, was trained; the export computes what the student does."""
    steps = [line for line in lines_of(folder / "metrics.jsonl") if line["kind"] == "train"]
    expected = {f"loss/{name}" for name in config.loss.weights} | {"loss/total"}
    for line in steps:
        assert {name for name in line if name.startswith("loss/") and name.count("/") == 1} == expected
        assert line["optim/grad_norm"] > 0
    assert [line["step"] for line in steps] == [1, 2]
    exported = BertForMaskedLM.from_pretrained(folder / "export").eval()
    batch = run.gap.batches[0]
    with torch.no_grad():
        logits = exported(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    torch.testing.assert_close(logits[batch.target_index], run.student.predict(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.process
@pytest.mark.parametrize("name", [*PAPERS, "homobert-tiny"])
def test_two_steps_at_real_widths(name, parts, tmp_path):
    config = two_steps(parts, name)
    run = distil(config, tmp_path / "run")
    assert_trained(run, config, tmp_path / "run")
    shape = PRESETS[config.student.preset]
    widths = {kind: run.student.widths[f"layer.0.{kind}"] for kind in ("ffn", "heads", "qk_dim", "vo_dim")}
    head_dim = shape.hidden_size // shape.num_attention_heads
    assert run.student.widths["hidden"] == shape.hidden_size and widths["ffn"] == shape.intermediate_size
    assert (widths["heads"], widths["qk_dim"], widths["vo_dim"]) == (shape.num_attention_heads, head_dim, head_dim)
    events = [0] if config.pruning.schedule == "one_shot" else [1, 2]
    assert [event["step"] for event in lines_of(tmp_path / "run" / "events.jsonl")] == events


NARROW = ("student.init=random", "student.preset=quickstart", "student.num_hidden_layers=2")


@pytest.mark.process
@pytest.mark.parametrize(
    "name, overrides, hidden_size, num_layers",
    [
        ("quickstart", (), 64, 2),
        ("baselines/distilbert", (), 128, 1),
        ("baselines/distilbert", NARROW, 64, 2),
        ("baselines/tinybert", (), 64, 2),
        ("baselines/tinybert", ("student.num_hidden_layers=1", "student.num_attention_heads=1"), 64, 1),
        ("baselines/minilmv2", (), 64, 2),
        ("baselines/one_shot", (), 64, 2),
        ("baselines/random_init", (), 64, 2),
        ("baselines/mlm_only", (), 64, 2),
    ],
)
def test_two_steps_of_the_small_recipes(name, overrides, hidden_size, num_layers, parts, tmp_path):
    config = two_steps(parts, name, *overrides)
    run = distil(config, tmp_path / "run")
    assert_trained(run, config, tmp_path / "run")
    assert (run.row["hidden_size"], len(run.student.head_maps)) == (hidden_size, num_layers)
    assert run.teacher_widths["hidden"] == 128


@pytest.mark.process
def test_full_width_and_relations_are_the_same_under_zero_3(parts, tmp_path):
    """Two stages, one result: a copy of some layers that keeps its width, with terms that need no projection."""
    config = two_steps(parts, "baselines/distilbert", "loss.relations=1", "loss.hidden=1")
    rows = [distil(config, tmp_path / f"stage-{stage}", stage).row for stage in (2, 3)]
    for field in ("heldout_mlm_loss", "kl_to_teacher"):
        assert rows[0][field] == pytest.approx(rows[1][field], rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_random_student_goes_on_from_its_checkpoint(stage, parts, tmp_path):
    overrides = ("loss.cosine=1", "loss.relations=1", "loss.relation_heads=4", "train.save_every_steps=1")
    config = two_steps(parts, "baselines/random_init", *overrides)
    folder = tmp_path / "run"
    whole = distil(config, folder, stage).row
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    (folder / ROW_FILE).unlink()
    again = distil(config, folder, stage).row
    assert {"heldout_mlm_loss", "kl_to_teacher", "masked_top1"} <= whole.keys()
    assert all(whole[name] == again[name] for name in ("heldout_mlm_loss", "kl_to_teacher", "masked_top1"))
