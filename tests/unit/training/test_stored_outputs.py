"""teacher.outputs=stored: rows against the stock model, one text at a time; what reads them; shards and damage."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small import small_model
from support.small_job import make_materials
from transformers import AutoModel, BertForSequenceClassification

from homodistil.config.command_line import parse
from homodistil.config.schema import RunConfig
from homodistil.data.prepare import integrity
from homodistil.data.prepare.build_shards import Preparation
from homodistil.data.prepare.corpus import Corpus
from homodistil.distill.stored_teacher import StoredTeacher, head_alone
from homodistil.distill.teacher import Teacher
from homodistil.engine.build import init_ranks
from homodistil.errors import UserError
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.planning.step_work import run_flops
from homodistil.training.inputs import RunInputs, prepare_inputs, teacher_copy
from homodistil.training.output_shards import OutputShard, OutputShards
from homodistil.training.resolve import resolve_run
from homodistil.training.stored_outputs import (
    OutputWork,
    computed_outputs,
    outputs_key,
    prepare_outputs,
    shard_texts,
    with_stored_outputs,
)
from homodistil.training.teacher_checks import check_teacher

KINDS = ("vectors", "scores")
TASK = {"vectors": "data.task=embedding", "scores": "data.task=scores"}
TERMS = {"vectors": ("pooled_cosine", "pooled_mse", "pooled_similarity"), "scores": ("scores_kl", "scores_mse")}
OTHERS = ("loss.hidden=0", "loss.attention=0", "loss.embedding=0")


def config_of(folder: Path, kind: str, *overrides: str) -> RunConfig:
    fields = {
        "teacher.name": folder / "teacher",
        "teacher.outputs": "stored",
        "data.sources": f"[{folder / 'text'}]",
        "data.cache_dir": folder / "cache",
        "data.seq_len": 16,
        "data.heldout_fraction": 0.2,
        "data.shard_bytes": 50 * 4 * 16,
        "student.preset": "teacher",
        "train.global_batch_size": 12,
        "train.micro_batch_size": 6,
        "train.eval_batch_size": 5,
        "pruning.schedule": "none",
    }
    fields |= {f"loss.{name}": 1 for name in TERMS[kind]}
    return parse([*(f"{name}={value}" for name, value in fields.items()), TASK[kind], *OTHERS, *overrides])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Kind -> folder with a teacher of that kind, and its text."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for folder in made.values():
        make_materials(folder)
    shape = small_model(max_position_embeddings=32).config
    shape.num_labels = 3
    torch.manual_seed(0)
    BertForSequenceClassification(shape).save_pretrained(made["scores"] / "teacher")
    init_ranks()
    return made


@pytest.fixture(scope="module", params=KINDS)
def prepared(request, folders) -> tuple[str, RunConfig, RunInputs]:
    kind = request.param
    config = config_of(folders[kind], kind)
    run_inputs = prepare_inputs(config, torch.device("cpu"))
    return kind, config, with_stored_outputs(config, torch.float32, run_inputs)


def live_teacher(run_inputs: RunInputs, lock_step: bool = True) -> Teacher:
    return Teacher(teacher_copy(run_inputs, torch.float32), lock_step, sentence_head=run_inputs.sentence_head())


def stored_teacher(config: RunConfig, run_inputs: RunInputs) -> StoredTeacher:
    cpu = torch.device("cpu")
    labels = head_alone(teacher_copy(run_inputs, torch.float32), cpu) if run_inputs.head == "classifier" else None
    return StoredTeacher(resolve_run(config).teacher, cpu, run_inputs.sentence_head(), labels)


def naive_row(kind: str, teacher: str, block: np.ndarray) -> torch.Tensor:
    """Of one text, by the stock model in float64, without its padding."""
    ids = torch.from_numpy(block[block != 0])[None]
    with torch.no_grad():
        states = AutoModel.from_pretrained(teacher).double().eval()(ids).last_hidden_state[0]
    return states.mean(0) if kind == "vectors" else states[0]


def test_a_row_is_what_the_stock_model_says_of_the_text(prepared):
    kind, _, run_inputs = prepared
    for rows, blocks in zip(run_inputs.outputs, (run_inputs.corpus.train, run_inputs.corpus.heldout), strict=True):
        assert len(rows) == len(blocks)
        for i in (0, len(rows) // 3, len(rows) - 1):  # the last one is in a pass that is filled up
            expected = naive_row(kind, run_inputs.teacher, blocks[[i]][0])
            torch.testing.assert_close(torch.from_numpy(rows[[i]][0]).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_bring_the_rows_of_their_texts_bitwise(prepared, workers):
    """In any order of epochs and seeds, across the end of an epoch, in every size of batch; on held-out texts, too."""
    kind, config, run_inputs = prepared
    teacher, stored = live_teacher(run_inputs), stored_teacher(config, run_inputs)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    num_texts = len(run_inputs.corpus.train)
    batches = [b for at in (0, num_texts - 5) for b in run_inputs.loader(other, seed=7).micro_batches(at)]
    batches += [*run_inputs.heldout(config, limit=13), *run_inputs.heldout(config)]
    assert {len(batch.input_ids) for batch in batches} >= {6, 5, 3}
    for batch in batches:
        assert torch.equal(batch.teacher_outputs, teacher.pooled_states(batch))
        ours, theirs = ((one.embed if kind == "vectors" else one.scores)(batch) for one in (stored, teacher))
        assert torch.equal(ours, theirs) and len(ours.unique(dim=0)) > 1


@pytest.mark.parametrize("lock_step", [True, False])
def test_losses_and_gradients_are_bitwise_those_of_a_running_teacher(prepared, lock_step):
    kind, config, run_inputs = prepared
    resolved = resolve_run(config)
    student = resolved.build_student(lambda: teacher_copy(run_inputs, torch.float32))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    stored = stored_teacher(config, run_inputs)
    (batch, _) = run_inputs.loader(config, seed=2)[0]
    seen = []
    for outputs in (live_teacher(run_inputs, lock_step)(batch), stored(batch), *stored.for_several(batch, 2)):
        student.zero_grad()
        terms = student(batch, outputs)
        terms.total.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        seen.append({"total": terms.total.detach(), **terms.terms, **gradients})
    assert set(seen[0]) > {"total", *TERMS[kind]} and seen[0]["total"] > 1e-3
    for other in seen[1:]:
        assert other.keys() == seen[0].keys() and all(torch.equal(other[name], seen[0][name]) for name in other)


def test_the_probe_measures_what_is_stored_alone(prepared):
    _, config, run_inputs = prepared
    resolved = resolve_run(config)
    student = resolved.build_student(lambda: teacher_copy(run_inputs, torch.float32)).eval()
    student.model.base_model.embeddings.word_embeddings.weight.data += 0.1
    stored = stored_teacher(config, run_inputs)
    batches = [*run_inputs.heldout(config, limit=10)]
    measured = {
        teacher: GapProbe(student, teacher, batches, torch.device("cpu")).measure()
        for teacher in (live_teacher(run_inputs), stored)
    }
    live, files = measured.values()
    assert "attention" in live and {n: v for n, v in live.items() if not n.startswith("attention")} == files


def test_a_trial_step_computes_the_rows_of_its_few_texts(prepared):
    _, config, run_inputs = prepared
    blocks = run_inputs.corpus.train[np.arange(7)]
    few = dataclasses.replace(run_inputs, corpus=Corpus(blocks, blocks, "few", ""), outputs=None)
    train, heldout = computed_outputs(config, torch.float32, few)
    assert np.array_equal(train, run_inputs.outputs.train[np.arange(7)]) and np.array_equal(train, heldout)


def test_a_teacher_whose_rows_depend_on_their_neighbours_is_noticed(prepared):
    kind, config, run_inputs = prepared
    work = OutputWork(config, torch.float32, run_inputs)
    assert work.neighbours_matter() == 0

    class Centred(Teacher):
        def pooled_states(self, batch):
            states = super().pooled_states(batch)
            return states - states.mean(0)

    work._teacher = Centred(teacher_copy(run_inputs, torch.float32), sentence_head=run_inputs.sentence_head())
    assert work.neighbours_matter() > 1e-3


def test_what_the_files_are_named_by(prepared):
    kind, config, run_inputs = prepared

    def key(dtype: torch.dtype = torch.float32, inputs: RunInputs = run_inputs, *overrides: str) -> str:
        return outputs_key(config_of(Path(run_inputs.teacher).parent, kind, *overrides), dtype, inputs)

    other_text = dataclasses.replace(run_inputs, corpus=dataclasses.replace(run_inputs.corpus, fingerprint="x"))
    same = ("train.seed=9", "student.preset=custom", "student.size=0.5", "train.micro_batch_size=3")
    assert key() == key(torch.float32, run_inputs, *same)
    changed = [key(torch.bfloat16), key(torch.float32, other_text)]
    changed.append(key(torch.float32, run_inputs, "teacher.runtime=compile"))
    if kind == "vectors":
        modules = dataclasses.replace(run_inputs.sentence_modules, pooling="cls")
        changed.append(key(torch.float32, dataclasses.replace(run_inputs, sentence_modules=modules)))
    assert len({key(), *changed}) == len(changed) + 1


def test_a_step_without_a_running_teacher_costs_nothing_of_it(prepared):
    kind, config, run_inputs = prepared
    live = config_of(Path(run_inputs.teacher).parent, kind, "teacher.outputs=live")
    resolved = [resolve_run(one) for one in (live, config)]
    with_it, without = (run_flops(one, one.teacher_widths, 12) for one in resolved)
    assert with_it.teacher > 0 == without.teacher and with_it.student == without.student > 0


def test_one_of_two_workers_merges_what_both_have_made(folders, tmp_path):
    shutil.copytree(folders["vectors"], tmp_path / "it", ignore=shutil.ignore_patterns("teacher_outputs"))
    config = config_of(tmp_path / "it", "vectors")
    run_inputs = prepare_inputs(config, torch.device("cpu"))
    said = [prepare_outputs(config, torch.float32, run_inputs, task, 2) for task in (1, 0)]
    assert "task 1 of 2 is done; 4 shards" in said[0] and said[1].startswith("teacher's outputs: ")
    assert prepare_outputs(config, torch.float32, run_inputs, 0, 1) == said[1]


def test_nothing_is_kept_of_a_corpus_that_is_damaged(folders, tmp_path, monkeypatch):
    """A large one is still being hashed when the rows are computed."""
    shutil.copytree(folders["vectors"], tmp_path / "it", ignore=shutil.ignore_patterns("teacher_outputs"))
    config = config_of(tmp_path / "it", "vectors")
    run_inputs = prepare_inputs(config, torch.device("cpu"))
    flip(run_inputs.corpus.train.path)
    monkeypatch.setattr(integrity, "CHECKED_AT_ONCE_BYTES", 0)
    check = integrity.BackgroundCheck(run_inputs.corpus.train.path.parent)
    with pytest.raises(UserError, match="is damaged .train.npy has another sha256"):
        with_stored_outputs(config, torch.float32, dataclasses.replace(run_inputs, corpus_check=check))
    assert not [*(tmp_path / "it" / "cache").rglob("outputs-*"), *(tmp_path / "it" / "cache").rglob("checksums.json")]


# -- the files


def rows_of(shard: OutputShard) -> np.ndarray:
    """Row i of a split says which one it is."""
    numbers = np.arange(shard.first, shard.end, dtype=np.float32)
    return np.stack([numbers, numbers + (100 if shard.split == "heldout" else 0), numbers], axis=1)


@pytest.mark.parametrize("shard_size", [1, 4, 7, 100])
def test_rows_are_in_their_places_however_they_were_divided(tmp_path, shard_size):
    maker = OutputShards({"train": 7, "heldout": 3}, shard_size, rows_of)
    preparation = Preparation(tmp_path / "parts", maker, lambda: False)
    (tmp_path / "whole").mkdir()
    maker.merge(tmp_path / "whole", preparation.whole(0), {"a": 1})
    assert maker.whole_damage(tmp_path / "whole") is None
    for split, num in (("train", 7), ("heldout", 3)):
        assert np.array_equal(np.load(tmp_path / "whole" / f"{split}.npy"), rows_of(OutputShard(split, 0, num)))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("train.npy", flip, "train.npy has another sha256"),
        ("heldout.npy", lambda path: path.write_bytes(path.read_bytes()[:-4]), "heldout.npy has"),
        ("train.npy", Path.unlink, "train.npy: No such file"),
        ("outputs.json", lambda path: path.write_text("{}"), "outputs.json has"),
        ("checksums.json", lambda path: path.write_text("{}"), "checksums.json lists other files"),
        ("checksums.json", lambda path: path.write_text("[["), "checksums.json: "),
        ("checksums.json", Path.unlink, "checksums.json: No such file"),
    ],
)
def test_every_damage_is_noticed_and_named(tmp_path, name, damage, says):
    maker = OutputShards({"train": 7, "heldout": 3}, 4, rows_of)
    (tmp_path / "whole").mkdir()
    maker.merge(tmp_path / "whole", Preparation(tmp_path / "parts", maker, lambda: False).whole(0), {})
    damage(tmp_path / "whole" / name)
    assert says in maker.whole_damage(tmp_path / "whole")


def test_a_damaged_shard_is_made_again(tmp_path, capfd):
    maker = OutputShards({"train": 7, "heldout": 3}, 4, rows_of)
    preparation = Preparation(tmp_path / "parts", maker, lambda: False)
    folders = preparation.whole(0)
    flip(folders[1] / "rows.npy")
    assert preparation.unfinished() == [1]
    preparation.whole(0)
    assert "00001 is damaged (rows.npy has another sha256" in capfd.readouterr().err and not preparation.unfinished()


def test_texts_of_a_shard(folders):
    assert shard_texts(config_of(folders["vectors"], "vectors")) == 50
    assert shard_texts(config_of(folders["vectors"], "vectors", "data.shard_bytes=1")) == 1
    assert shard_texts(config_of(folders["vectors"], "vectors", "data.shard_bytes=64000000")) == 4096


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("loss.hidden=2",), "loss.hidden: found 2, but with teacher.outputs=stored"),
        (("loss.hidden=1", "loss.attention=1"), "set loss.hidden=0 loss.attention=0"),
        (("teacher.shard=true",), "teacher.shard: found true, allowed with teacher.outputs=stored is false"),
        (("teacher.own_stream=true",), "teacher.own_stream: found true"),
        (("data.task=none", "loss.pooled_cosine=0", "loss.pooled_mse=0", "loss.pooled_similarity=0", "loss.hidden=1"),
         "teacher.outputs: found stored, allowed with data.task=none is live"),
    ],
)  # fmt: skip
def test_what_needs_the_teacher_itself_is_refused(folders, fields, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        check_teacher(config_of(folders["vectors"], "vectors", *fields))
    assert "\n" not in str(error.value)
