"""`homodistil export` on a folder of sentence-transformers, and `homodistil latency` on what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from homodistil.errors import UserError
from homodistil.export.formats.folder import publish, staging
from homodistil.export.formats.layout import FORMATS
from homodistil.export.formats.runners import onnx_runner
from homodistil.training import export_command, latency_command
from homodistil.training.run_members import members_of

SENTENCES = ["the cat sees a dog.", "a bird", "the old house and then the small river finds a tree slowly."]
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
ONNX, INT8 = (FORMATS[name].file for name in ("onnx", "onnx-int8"))
_SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer) -> Path:
    """A masked language model in a folder of sentence-transformers, which read its backbone alone."""
    folder = tmp_path_factory.mktemp("source") / "bert"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **_SIZES)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / ".cache").mkdir()
    (folder / ".cache" / "notes.txt").write_text("not for others")
    return folder


@pytest.fixture(scope="module")
def exported(source) -> Path:
    """That folder, exported to another one in two formats."""
    out = source.parent / "out"
    export_command.main([str(source), "--format", "onnx", "onnx-int8", f"--out={out}"])
    return out


def test_the_folder_has_what_sentence_transformers_reads(source, exported):
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    companions = {"modules.json", "1_Pooling/config.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == companions | {ONNX, INT8}
    assert not list(exported.parent.glob(".*.part"))
    for name in companions:
        assert (exported / name).read_bytes() == (source / name).read_bytes()


def test_states_of_sentences_are_those_of_the_stock_model(source, exported):
    batch = AutoTokenizer.from_pretrained(exported)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(source).eval()(**batch).last_hidden_state.numpy()
    inputs, mask = {name: value.numpy() for name, value in batch.items()}, batch["attention_mask"].bool().numpy()
    actual, int8 = (onnx_runner(exported / file)(inputs) for file in (ONNX, INT8))
    np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-5)
    assert 0 < np.abs(int8[mask] - expected[mask]).max() < 0.2  # states of a LayerNorm: up to about 3
    assert (exported / INT8).stat().st_size < 0.3 * (exported / ONNX).stat().st_size


def test_no_folder_of_this_machine_is_in_the_graphs(exported):
    for file in (ONNX, INT8):
        content = (exported / file).read_bytes()
        for part in (str(Path.home()), str(Path(torch.__file__).parents[1]), str(exported.parent), "site-packages"):
            assert part.encode() not in content, part


def test_nothing_is_overwritten_without_force(source, exported):
    before = (exported / ONNX).stat()
    with pytest.raises(UserError, match=r"--out: .*/onnx/model.onnx exists .*add --force, or give another --out"):
        export_command.main([str(source), f"--out={exported}"])
    assert (exported / ONNX).stat() == before


@pytest.mark.full
def test_a_graph_that_is_refused_is_not_kept(source, tmp_path):
    """int8 is never equal to fp32."""
    with pytest.raises(UserError, match="--format onnx-int8: mean cosine with torch 0.99.*--min-cosine 1 or more"):
        export_command.main([str(source), "--format", "onnx-int8", f"--out={tmp_path}/out", "--min-cosine=1"])
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    with pytest.raises(UserError, match="refused"):
        with staging(tmp_path / "out") as staged:
            (staged / "onnx").mkdir()
            (staged / ONNX).write_text("a part")
            raise UserError("refused")
    with pytest.raises(UserError, match=r"^.*/out: cannot be written \(No space left on device\); .* then run again$"):
        with staging(tmp_path / "out"):
            raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_another_config_in_the_folder_is_not_overwritten(source, exported, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "config.json").write_text("{}")
    with staging(out) as staged:
        shutil.copytree(exported, staged, dirs_exist_ok=True)
        with pytest.raises(UserError, match="--out: .*config.json has another content; add --force"):
            publish(staged, out, force=False)
        assert (out / "config.json").read_text() == "{}"
        assert publish(staged, out, force=True)[-1] == "tokenizer_config.json"
    assert (out / "config.json").read_bytes() == (exported / "config.json").read_bytes()


def test_latency_of_a_checkpoint_with_graphs_and_of_graphs_alone(source, exported, tmp_path, capsys):
    both = shutil.copytree(source, tmp_path / "both")
    shutil.copytree(exported / "onnx", both / "onnx")
    names = [str(both), str(exported)]
    latency_command.main([*names, "--tokens=9", "--threads=1", "--rounds=2", "--json"])
    result = json.loads(capsys.readouterr().out)
    rows = result.pop("rows")
    assert result == {"tokens": 9, "threads": 1, "rounds": 2}
    kinds = [(row["checkpoint"], row["format"]) for row in rows]
    assert kinds == [(names[0], kind) for kind in ("torch", "onnx", "onnx-int8")] + [
        (names[1], kind) for kind in ("onnx", "onnx-int8")
    ]
    backbone = AutoModel.from_pretrained(source, add_pooling_layer=False)
    assert {row["parameters"] for row in rows} == {sum(p.numel() for p in backbone.parameters())}
    assert [row["bytes"] for row in rows[1:3]] == [(exported / file).stat().st_size for file in (ONNX, INT8)]
    assert rows[0]["bytes"] == (source / "model.safetensors").stat().st_size
    assert rows[1]["cosine"] > 0.99999 > rows[2]["cosine"] > 0.95 and rows[3]["cosine"] is None
    assert all(row["ms_per_sentence"] > 0 and row["sentences_per_s"] > 0 for row in rows)
    latency_command.main([names[1], "--tokens=5", "--rounds=1"])
    heading, _, *lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert heading.split()[-2:] == ["ms/sentence", "sentences/s"] and len(lines) == 2


@pytest.fixture
def run_dir(source, exported, tmp_path) -> Path:
    """A finished run with one member on the way and a control; every model has its graphs."""
    folder = tmp_path / "run"
    for place in (tmp_path / "teacher", folder / "export", folder / "export" / "milestone-0.75"):
        shutil.copytree(source, place)
        shutil.copytree(exported / "onnx", place / "onnx")
    (folder / "config.yaml").write_text(f"teacher:\n  name: {tmp_path / 'teacher'}\n")
    rows = [{"name": "teacher (corrected)"}, {"name": "small @ 0.75", "folder": "export/milestone-0.75"}]
    rows += [{"name": "small"}, {"name": "one_shot"}, {"name": "one_shot @ 0.75", "milestone": 0.75, "rates": "own"}]
    (folder / "result.json").write_text(json.dumps(rows))
    return folder


def test_latency_of_a_run_is_kept_in_its_folder(run_dir, exported, capsys):
    latency_command.main([str(run_dir), str(exported), "--tokens=5", "--rounds=1", "--json"])
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((run_dir / "latency.json").read_text())
    assert kept["tokens"] == 5 and len(printed["rows"]) == len(kept["rows"]) + 2
    models = ("teacher (corrected)", "small @ 0.75", "small")
    names = [(row["checkpoint"], row["format"]) for row in kept["rows"]]
    assert names == [(model, kind) for model in models for kind in ("torch", "onnx", "onnx-int8")]


def test_students_of_one_job_have_folders_of_their_own(run_dir):
    (run_dir / "export").rename(run_dir / "students")
    for name in ("half", "third"):
        shutil.copytree(run_dir / "students" / "milestone-0.75", run_dir / "students" / name / "export")
    rows = [{"name": "teacher"}, *({"name": name, "student": name} for name in ("half", "third"))]
    rows.insert(2, {"name": "half: one_shot", "student": "half"})
    (run_dir / "result.json").write_text(json.dumps(rows))
    members = members_of(run_dir)
    assert [member.label for member in members] == ["teacher", "half", "third"]
    assert members[2].checkpoint == str(run_dir / "students" / "third" / "export")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("result.json", None, "has no result.json yet; wait until it has ended"),
        ("result.json", "{}", "result.json cannot be read .found dict, expected list"),
        ("result.json", "[", "result.json cannot be read"),
        ("config.yaml", "teacher: 3", "config.yaml has no teacher.name"),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line(run_dir, name, content, message):
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_text(content)
    with pytest.raises(UserError, match=f"CHECKPOINT: .*{message}") as raised:
        latency_command.main([str(run_dir), "--rounds=1"])
    assert "\n" not in str(raised.value) and not (run_dir / "latency.json").exists()


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        ({}, [], "--checkpoint: '.*' is a BertForQuestionAnswering; exported are backbones and .*add --no-head"),
        ({"architectures": ["BertForMaskedLM"]}, [], "--checkpoint: .* cls.predictions"),
        ({}, ["--push=a/b/c"], "--push: 'a/b/c' is no repository .*give OWNER/NAME"),
        ({}, ["--push=a/b"], "--push: no token of the Hugging Face hub; .*set HF_TOKEN"),
        ({}, ["--min-cosine=2"], "--min-cosine: found '2', allowed are numbers from -1 to 1"),
        ({}, ["--format=onnxx"], "--format"),
    ],
    ids=["head", "random head", "name", "token", "cosine", "format"],
)
def test_bad_input_is_one_line(change, arguments, message, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    BertModel(BertConfig(vocab_size=len(tokenizer), **_SIZES)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"architectures": ["BertForQuestionAnswering"]} | change
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as raised:
        export_command.main([str(tmp_path / "model"), *arguments])
    assert "\n" not in str(raised.value) and sorted(tmp_path.rglob("*")) == before


def test_folders_without_a_model_are_refused(tmp_path, source, exported):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--checkpoint: .*config.json is not there"):
        export_command.main([str(tmp_path / "empty")])
    shutil.copytree(exported, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "onnx")
    with pytest.raises(UserError, match="CHECKPOINT: .*has no .*safetensors and no onnx/model.onnx or"):
        latency_command.main([str(tmp_path / "bare")])
    with pytest.raises(UserError, match="--tokens: found 65, '.*' allows 64; lower --tokens"):
        latency_command.main([str(source), "--tokens=65"])
    (tmp_path / "bare" / ONNX).parent.mkdir()
    (tmp_path / "bare" / ONNX).write_bytes((exported / ONNX).read_bytes()[:10_000])
    with pytest.raises(UserError, match="/onnx/model.onnx: onnx.* cannot read it .*export --force"):
        latency_command.main([str(tmp_path / "bare")])
    (tmp_path / "bare" / "modules.json").write_text(json.dumps([MODULES[0] | {"path": "../elsewhere"}]))
    with pytest.raises(UserError, match="has the path '../elsewhere', which is not in its folder"):
        export_command.main([str(tmp_path / "bare")])
    (tmp_path / "bare" / "modules.json").write_text(json.dumps(MODULES[1:]))
    with pytest.raises(UserError, match="found module 'Pooling' first, supported is Transformer"):
        export_command.main([str(tmp_path / "bare")])
