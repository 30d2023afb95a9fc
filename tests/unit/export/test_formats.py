"""ONNX, int8 ONNX and OpenVINO of every architecture against torch, and what is refused before and after."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families.cases import CASES, make_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from homodistil.errors import UserError
from homodistil.export.formats import graphs
from homodistil.export.formats.agreement import Agreement, agreement, require
from homodistil.export.formats.exportable import Exportable
from homodistil.export.formats.graphs import write_onnx
from homodistil.export.formats.layout import EXTRAS, FORMATS, Limits, require_installed
from homodistil.export.formats.runners import onnx_runner, openvino_runner, output_name, torch_runner
from homodistil.export.formats.write import files_of, write_formats
from homodistil.models import family_of

DOCUMENT = Path(__file__).parents[3] / "docs" / "export.md"
BY_DEFAULT = ("modernbert", "llama")
"""BERT is exported by test_export_command.py; the others are in `make test-full`."""
_SIZES = {"hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 5, "intermediate_size": 44}


@pytest.mark.parametrize(
    "model_type", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_every_architecture_is_exported_with_its_head(model_type, tmp_path):
    stock = make_model(model_type)
    if model_type == "llama":  # its layers are alike, and a trace takes seconds
        family_of(model_type).keep_layers(stock, [1])
    model = Exportable(stock, max_tokens=38)
    results = write_formats(model, ["onnx", "onnx-int8"], tmp_path, Limits(max_kl=0.5))
    assert results["onnx"].difference < 1e-5 and results["onnx-int8"].cosine > 0.98
    assert output_name(tmp_path / FORMATS["onnx"].file) == "logits"
    # A batch and a length that neither the trace nor the comparison has seen, against the stock call.
    batch = model.batch(4, 21, seed=9)
    actual = onnx_runner(tmp_path / FORMATS["onnx"].file)({name: value.numpy() for name, value in batch.items()})
    with torch.no_grad():
        expected = model.model(**batch).logits
    is_token = batch["attention_mask"].bool()
    assert b"site-packages" not in (tmp_path / FORMATS["onnx"].file).read_bytes()  # of stack traces of the exporter
    torch.testing.assert_close(torch.from_numpy(actual)[is_token], expected[is_token], rtol=1e-4, atol=1e-4)


def test_the_document_lists_the_architectures_of_the_test():
    rows = re.findall(r"^\| \w+ \| (`.*?`) \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == sorted(CASES)


@pytest.mark.full
@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification, BertForTokenClassification])
def test_backbones_and_heads_of_classifiers(kind, tmp_path):
    torch.manual_seed(0)
    model = Exportable(kind(BertConfig(vocab_size=97, num_labels=3, **_SIZES)), max_tokens=64)
    write_formats(model, ["onnx"], tmp_path, Limits())
    output = "last_hidden_state" if kind is BertModel else "logits"
    assert output_name(tmp_path / FORMATS["onnx"].file) == model.output_name == output


@pytest.mark.full
def test_weights_beyond_protobufs_limit_lie_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "_PROTOBUF_BYTES", 1000)
    torch.manual_seed(0)
    model = Exportable(BertModel(BertConfig(vocab_size=97, **_SIZES)), max_tokens=64)
    write_formats(model, ["onnx", "onnx-int8"], tmp_path, Limits(max_kl=2))
    for name in ("onnx", "onnx-int8"):
        graph, weights = files_of(name, tmp_path)
        assert weights.stat().st_size > graph.stat().st_size / 2
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {
        path.name for name in ("onnx", "onnx-int8") for path in files_of(name, tmp_path)
    }


@pytest.mark.full
def test_openvino_in_fp32(tmp_path):
    pytest.importorskip("openvino")
    model = Exportable(make_model("bert"), max_tokens=38)
    results = write_formats(model, ["openvino"], tmp_path, Limits())
    assert results["openvino"].difference < 1e-5
    assert [path.name for path in files_of("openvino", tmp_path)] == ["openvino_model.xml", "openvino_model.bin"]
    assert not files_of("onnx", tmp_path)  # only on the way
    batch = {name: value.numpy() for name, value in model.batch(3, 11).items()}
    run = openvino_runner(tmp_path / FORMATS["openvino"].file)
    # Rows of padding are nobody's.
    np.testing.assert_allclose(run(batch)[0], torch_runner(model)(batch)[0], rtol=1e-4, atol=1e-4)


def test_agreement_is_that_of_tokens_and_relative_to_the_largest_output():
    torch.manual_seed(0)
    model = Exportable(BertModel(BertConfig(vocab_size=97, **_SIZES)), max_tokens=16)
    reference, scales = torch_runner(model), []

    def shifted(inputs):
        output = reference(inputs)
        scales.append(np.abs(output[inputs["attention_mask"].astype(bool)]).max())
        output[~inputs["attention_mask"].astype(bool)] = np.nan  # of padding, which nobody reads
        return output + 0.25

    result, dots, norms = agreement(model, shifted), [], []
    assert result.difference == pytest.approx(0.25 / max(scales), rel=1e-5)
    for batch in model.comparison_batches():
        assert batch["input_ids"].shape[1] <= 16 and batch["attention_mask"].sum(1).min() >= 1
        inputs = {name: value.numpy() for name, value in batch.items()}
        for row in reference(inputs)[inputs["attention_mask"].astype(bool)]:
            dots.append(row @ (row + 0.25))
            norms.append(np.linalg.norm(row) * np.linalg.norm(row + 0.25))
    assert result.cosine == pytest.approx(np.mean(np.array(dots) / np.array(norms)), rel=1e-5)


@pytest.mark.parametrize("number", [2e-4, float("nan")])
def test_what_is_too_far_from_torch_is_refused(number):
    with pytest.raises(UserError, match="--format openvino: the file differs from torch by .*allowed is 0.0001"):
        require(Agreement(number, 1.0), "openvino", Limits())
    with pytest.raises(UserError, match="--format onnx-int8: mean cosine .*--min-cosine 0.95 or more"):
        require(Agreement(0.0, number), "onnx-int8", Limits())
    with pytest.raises(UserError, match="--format onnx-int8: mean KL .*--max-kl 0.0001 or less"):
        require(Agreement(0.0, 1.0, number), "onnx-int8", Limits(max_kl=1e-4))
    with pytest.raises(UserError, match="--format gguf-q8_0: mean KL .*take gguf, or measure your task with 8 bits"):
        require(Agreement(0.0, 1.0, number), "gguf-q8_0", Limits(max_kl=1e-4))
    require(Agreement(0.5, 0.96, 0.09), "onnx-int8", Limits())
    require(Agreement(0.04, 0.0), "gguf", Limits())
    require(Agreement(9e-5, 0.0), "onnx", Limits())


def test_kl_is_that_of_the_probabilities_to_torchs():
    torch.manual_seed(0)
    model = Exportable(BertForSequenceClassification(BertConfig(vocab_size=97, num_labels=3, **_SIZES)), max_tokens=16)
    reference, shift, expected = torch_runner(model), np.array([0.5, -0.25, 0.0], np.float32), []
    for batch in model.comparison_batches():
        for row in reference({name: value.numpy() for name, value in batch.items()}).astype(np.float64):
            p, q = (np.exp(logits) / np.exp(logits).sum() for logits in (row, row + shift))
            expected.append((p * np.log(p / q)).sum())
    result = agreement(model, lambda inputs: reference(inputs) + shift)
    assert result.kl == pytest.approx(np.mean(expected), rel=1e-5) and result.kl > 0.01


def test_a_graph_of_another_model_agrees_in_nothing():
    models = [
        Exportable(BertModel(BertConfig(vocab_size=97, **_SIZES | more)), 16) for more in ({}, {"hidden_size": 40})
    ]
    result = agreement(models[0], torch_runner(models[1]))
    assert result.difference == float("inf") and result.cosine != result.cosine
    with pytest.raises(UserError, match="--format onnx"):
        require(result, "onnx-int8", Limits())


def test_inputs_follow_the_model():
    """RoBERTa has one token type, which tokenizers do not give; a decoder's cache is no output."""
    roberta = Exportable(RobertaModel(RobertaConfig(vocab_size=97, type_vocab_size=1, **_SIZES)), max_tokens=16)
    assert roberta.input_names == ("input_ids", "attention_mask") and roberta.pad_id == 1
    assert Exportable(make_model("bert"), 16).input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert Exportable(make_model("gpt2"), 16).input_names == ("input_ids", "attention_mask")


def test_a_model_without_its_pooler_has_the_same_states_and_fewer_parameters():
    torch.manual_seed(0)
    stock = BertModel(BertConfig(vocab_size=97, **_SIZES)).eval()
    batch = {"input_ids": torch.arange(5, 15).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    expected, before = stock(**batch).last_hidden_state, sum(p.numel() for p in stock.parameters())
    model = Exportable(stock, max_tokens=16)
    inputs = {name: value.numpy() for name, value in batch.items()} | {"token_type_ids": np.zeros((2, 5), np.int64)}
    np.testing.assert_array_equal(torch_runner(model)(inputs), expected.detach())
    assert model.num_parameters() == before - 30 * 30 - 30


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_package_is_one_line_with_the_command(name, monkeypatch):
    monkeypatch.setitem(sys.modules, EXTRAS[FORMATS[name].extra][-1], None)
    packages = " ".join(EXTRAS[FORMATS[name].extra])
    with pytest.raises(UserError, match=rf"--format: \w+ not installed; install with pip install {packages} \(in a "):
        require_installed([name])


def test_what_torch_cannot_export_is_one_line(tmp_path):
    class DependsOnData(BertModel):
        def forward(self, input_ids, attention_mask):
            if input_ids.sum() > 5:  # a branch that no trace can follow
                return super().forward(input_ids, attention_mask)
            return None

    model = Exportable(DependsOnData(BertConfig(vocab_size=97, **_SIZES)), max_tokens=16)
    with pytest.raises(UserError, match=r"--format: torch cannot export DependsOnData to ONNX \(.+\); docs/export.md"):
        write_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
