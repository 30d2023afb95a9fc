"""`homodistil export --format gguf` on folders: an embedder, a decoder, and what leaves everything as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from gguf import GGUFReader, PoolingType
from support.gguf_models import byte_level, gguf_model
from transformers import AutoTokenizer

from homodistil.errors import UserError
from homodistil.training import export_command

F16, Q8_0 = "gguf/model-F16.gguf", "gguf/model-Q8_0.gguf"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@pytest.fixture
def decoder(tmp_path) -> Path:
    folder = tmp_path / "small-llama"
    gguf_model("llama").save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture
def embedder(tmp_path, tokenizer) -> Path:
    folder = tmp_path / "embedder"
    gguf_model("bert", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_decoder_is_exported_beside_its_weights(decoder, capsys):
    before = files_in(decoder)
    export_command.main([str(decoder), "--format", "gguf", "gguf-q8_0"])
    after = files_in(decoder)
    assert set(after) == {*before, F16, Q8_0} and all(after[name] == content for name, content in before.items())
    heading, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line and "..." not in line][:4]
    assert heading.split()[-2:] == ["KL,", "nats"] and [row.split()[:2] for row in rows] == [
        ["gguf", F16],
        ["gguf-q8_0", Q8_0],
    ]
    fields = GGUFReader(decoder / F16).fields
    assert fields["general.name"].contents() == "small-llama"
    assert str(decoder.parent).encode() not in after[F16]
    text = "the 12 in <|im_end|>"
    restored = AutoTokenizer.from_pretrained(decoder, gguf_file=F16)
    assert restored(text)["input_ids"] == byte_level()(text)["input_ids"]


def test_a_masked_language_model_is_exported_without_its_head(tmp_path, tokenizer):
    folder = tmp_path / "bert"
    gguf_model("bert", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    export_command.main([str(folder), "--format", "gguf-f32"])
    names = {tensor.name for tensor in GGUFReader(folder / "gguf" / "model-F32.gguf").tensors}
    assert "token_embd.weight" in names and not any(name.startswith(("cls", "output")) for name in names)


def test_a_classifier_is_refused(tmp_path, embedder):
    config = json.loads((embedder / "config.json").read_text())
    (embedder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    (embedder / "modules.json").unlink()
    with pytest.raises(UserError, match="llama.cpp takes vectors from a bert and has none of its heads; add --no-head"):
        export_command.main([str(embedder), "--format", "gguf"])


def test_an_embedder_says_how_it_pools(embedder, tmp_path):
    export_command.main([str(embedder), "--format", "gguf", f"--out={tmp_path}/out"])
    assert set(files_in(tmp_path / "out")) == set(files_in(embedder)) - {"model.safetensors"} | {F16}
    fields = GGUFReader(tmp_path / "out" / F16).fields
    assert fields["bert.pooling_type"].contents() == PoolingType.CLS
    assert fields["tokenizer.ggml.token_type_count"].contents() == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "--out: .*/gguf/model-F16.gguf exists and would be overwritten; add --force, or give another"),
        ("config", "--format gguf: found model_type 'modernbert', allowed are llama, .*; take another format"),
        ("weights", "--checkpoint: .*model.safetensors.*"),
        ("tokenizer", "--format gguf: .* has no tokenizer"),
        ("package", r"--format: gguf not installed; install with pip install gguf \(in a checkout: .*'.\[gguf\]'"),
    ],
)
def test_nothing_is_changed_where_it_cannot_be_done(change, message, decoder, monkeypatch):
    if change is None:
        (decoder / "gguf").mkdir()
        (decoder / F16).write_text("mine")
    elif change == "config":
        (decoder / "config.json").write_text('{"model_type": "modernbert", "vocab_size": 268}')
    elif change == "weights":
        (decoder / "model.safetensors").write_bytes((decoder / "model.safetensors").read_bytes()[:-1000])
    elif change == "tokenizer":
        for path in decoder.glob("tokenizer*"):
            path.unlink()
    else:
        monkeypatch.setitem(sys.modules, "gguf", None)
    before = files_in(decoder.parent)
    with pytest.raises(UserError, match=message) as raised:
        export_command.main([str(decoder), "--format", "gguf"])
    assert "\n" not in str(raised.value) and files_in(decoder.parent) == before


def test_a_dense_module_is_refused(embedder):
    (embedder / "modules.json").write_text(
        json.dumps([*MODULES, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    (embedder / "2_Dense").mkdir()
    dense = {"in_features": 30, "out_features": 8, "bias": True, "activation_function": "torch.nn.Identity"}
    (embedder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    with pytest.raises(UserError, match="^--format gguf: found a Dense module behind the pooling, .*take onnx"):
        export_command.main([str(embedder), "--format", "gguf"])
