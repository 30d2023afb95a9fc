"""What the front door is told: keywords of Python, names of engines, numbers of ranks, sizes that are left open."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from support.small import plain_widths

import homodistil
from homodistil.config.field_names import as_arguments, full_name, full_names
from homodistil.config.schema import RunConfig
from homodistil.config.shipped import ENGINES, engine_names, engine_path, recipe_names, recipe_summary
from homodistil.distributed.start_ranks import split_ranks, start_ranks
from homodistil.errors import UserError
from homodistil.export.provenance import repeatable
from homodistil.metrics import progress
from homodistil.models.axis_listing import axis_listing, entry_parameters
from homodistil.models.proposed_shapes import half_of, in_proportion
from homodistil.models.stock_shape import Shape
from homodistil.training.run_card import origin_of
from homodistil.training.show_axes import axes_of

BERT_BASE = plain_widths(768, 3072, 12)


def test_fields_go_by_their_last_name_where_it_is_the_only_one():
    assert full_name("steps") == "train.steps" and full_name("hidden_size") == "student.hidden_size"
    assert full_name("size") == "student.size" and full_name("parameters") == "student.parameters"
    assert all(full_name(name) == name for name in full_names()) and "pruning.schedule" in full_names()
    wanted = ["--train.steps=3", '--data.sources=["a.txt", "b"]', "--run.dir=x/y", "--train.lr=0.5"]
    values = {"steps": np.int64(3), "sources": (Path("a.txt"), "b"), "run.dir": Path("x/y"), "lr": torch.tensor(0.5)}
    assert as_arguments(values) == wanted


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "x"}, r"name: could be teacher\.name or run\.name"),
        ({"step": 1}, r"step: no field is called so \(did you mean train\.steps"),
        ({"train.step": 1}, r"did you mean 'train\.steps'"),
        ({"train": {}}, r"a section: its fields are written as"),
        ({"steps": 1, "train.steps": 2}, r"train\.steps: given twice"),
        ({"steps": object()}, r"train\.steps: found object"),
        ({"lr": [object()]}, r"train\.lr: found list"),
    ],
)
def test_keywords_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        as_arguments(fields)
    assert "\n" not in str(caught.value)


def test_the_names_of_the_package_are_there_when_asked_for():
    import homodistil.distill.student  # noqa: F401  (hands its package to homodistil as an attribute)

    assert callable(homodistil.distill) and not isinstance(homodistil.distill, ModuleType)
    assert isinstance(sys.modules["homodistil.distill"], ModuleType)
    assert homodistil.RunConfig is RunConfig and homodistil.load_recipe("quickstart").train.steps == 400
    assert {"distill", "load_recipe", "RunConfig"} <= set(dir(homodistil)) and not hasattr(homodistil, "distil")


def test_what_is_given_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.dir: given twice, as out and as dir"):
        homodistil.distill("x", out=tmp_path / "a", dir="b")
    with pytest.raises(UserError, match=r"data\.sources: given twice, as text and as data\.sources"):
        homodistil.distill("x", text="a", **{"data.sources": "b"})


def test_engines_go_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert engine_path(None) == engine_path("zero2") == engine_path("ds_configs/zero2.json") == ENGINES / "zero2.json"
    assert engine_path("mine.json") == Path("mine.json") and {"zero0", "zero3_offload"} <= set(engine_names())
    with pytest.raises(UserError, match="did you mean 'zero3'"):
        engine_path("zero33")
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").write_text("{}")
    assert engine_path("ds_configs/zero2.json") == Path("ds_configs/zero2.json")


def test_every_recipe_has_a_sentence():
    assert all(len(recipe_summary(name).split()) > 5 for name in recipe_names())
    assert recipe_summary("baselines/tinybert").startswith("TinyBERT, general distillation (Jiao et al. 2020,")


def test_ranks_are_split_off(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert split_ranks(["a=b", "--ranks", "2", "--check"]) == (2, ["a=b", "--check"])
    assert split_ranks(["--num-accelerators=3"]) == (3, []) and split_ranks(["a=b"]) == (1, ["a=b"])
    for bad in ("0", "-1", "two", "", "9999999999"):
        with pytest.raises(UserError, match="--ranks: found"):
            split_ranks(["--ranks", bad])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(UserError, match="--ranks: found 8, this machine has 4 GPUs"):
        start_ranks(8)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="leave --ranks out"):
        split_ranks(["--ranks", "2"])


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, half_of(BERT_BASE)),
        ({"hidden_size": 384, "num_attention_heads": 6}, (384, 1536, 6)),
        ({"hidden_size": 256}, (256, 1024, 8)),
        ({"num_attention_heads": 8}, (512, 2048, 8)),
        ({"intermediate_size": 1536}, (384, 1536, 12)),
        ({"hidden_size": 384, "intermediate_size": 100}, (384, 100, 12)),
    ],
)
def test_sizes_that_are_left_open_go_in_proportion(given, wanted):
    assert in_proportion({name: given.get(name) for name in Shape._fields}, BERT_BASE) == Shape(*wanted)


def test_what_an_axis_couples(tmp_path):
    from support.small import small_model

    from homodistil.models import family_of

    model = small_model()
    table = family_of("bert").axis_table(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert entry_parameters("layer.1.ffn", table, shapes) == 24 + 1 + 24
    assert entry_parameters("layer.1.heads", table, shapes) == 4 * 6 * 24 + 3 * 6
    text = axis_listing(table, shapes)
    assert (
        text.count("entries") == 5 and "cls.predictions.transform.dense.weight" in text and "[hidden, hidden]" in text
    )
    model.config.save_pretrained(tmp_path)
    assert text in axes_of(str(tmp_path), tmp_path) and ": bert, " in axes_of(str(tmp_path), tmp_path)


def test_a_card_repeats_the_installed_command():
    typed = "python /env/bin/homodistil train --deepspeed zero3 recipe=paper"
    assert repeatable(typed, origin_of(RunConfig()), 1) == ("homodistil train --deepspeed zero3 recipe=paper", {})
    assert (
        repeatable(typed, origin_of(RunConfig()), 4)[0] == "homodistil train --ranks 4 --deepspeed zero3 recipe=paper"
    )


def test_a_notebook_has_a_bar(monkeypatch, capsys):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    bar = progress.step_progress(10, start_step=0)
    bar.show(4, {"loss/total": 2.0, "widths/hidden": 8})
    bar.close()
    assert "4/10" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    progress.step_progress(1, start_step=0).show(1, {"loss/total": 2.0})
    assert capsys.readouterr().err == "step 1/1, loss 2\n"
