"""Models as GGUF: every tensor against a table written by hand, transformers' own reader, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from support.gguf_file import LLAMA_LAYER, rows_of_llama_cpp
from support.gguf_models import byte_level, exportable, gguf_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from homodistil.errors import UserError
from homodistil.export.formats.agreement import agreement, require
from homodistil.export.formats.exportable import Exportable
from homodistil.export.formats.gguf.architectures import ARCHITECTURES, architecture_of
from homodistil.export.formats.gguf.file import write_gguf
from homodistil.export.formats.gguf.header import Header
from homodistil.export.formats.gguf.reload import gguf_runner
from homodistil.export.formats.gguf.vocabulary import vocabulary
from homodistil.export.formats.layout import FORMATS, Limits
from homodistil.export.formats.write import write_formats

GGUFS = [name for name, form in FORMATS.items() if form.extra == "gguf"]
_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    **LLAMA_LAYER,
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_BERT = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
NAMES = {kind: _LLAMA for kind in ("llama", "mistral", "qwen2", "gemma")} | {
    "qwen3": _LLAMA | _HEAD_NORMS,
    "gemma3_text": _LLAMA | _HEAD_NORMS | _AFTER | {"pre_feedforward_layernorm": "ffn_norm"},
    "olmo2": _LLAMA | _HEAD_NORMS | _AFTER,
    "gpt2": _GPT2,
    "bert": _BERT,
}
"""Model type -> name of a parameter without its layer and end -> llama.cpp's, from llama.cpp's sources."""


def header_of(model: Exportable) -> Header:
    tokenizer, is_bert = byte_level(), model.model.config.model_type == "bert"
    return Header("tiny", tokenizer, vocabulary(tokenizer, model.vocab_size, 2 if is_bert else None))


def expected_name(name: str, kind: str) -> str:
    body, end = name.rsplit(".", 1)
    parts = body.split(".")
    layer = next((part for part in parts if part.isdigit()), None)
    inside = body if layer is None else body.split(f".{layer}.", 1)[1]
    return f"{'' if layer is None else f'blk.{layer}.'}{NAMES[kind][inside]}.{end}"


def expected_values(name: str, values: np.ndarray, kind: str, head_dim: int) -> np.ndarray:
    if kind in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
        return rows_of_llama_cpp(values, head_dim)
    if kind.startswith("gemma") and "norm" in name:
        return values + 1
    return values.T if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else values


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tensor_is_where_llama_cpp_looks_for_it(kind, tmp_path):
    model = exportable(kind)
    write_gguf(model.model, header_of(model), tmp_path / "f32", "gguf-f32")
    actual = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "f32").tensors}
    head_dim = getattr(model.model.config, "head_dim", None)
    for name, parameter in model.model.named_parameters():
        expected = expected_values(name, parameter.detach().numpy(), kind, head_dim)
        np.testing.assert_array_equal(actual.pop(expected_name(name, kind)), expected, err_msg=name)
    assert not actual


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_a_decoder_without_its_head_has_the_same_tensors_but_the_output(kind, tmp_path):
    """A sentence embedder, which pools the last hidden states."""
    model = exportable(kind, tie_word_embeddings=False)
    backbone = Exportable(model.model.base_model, model.max_tokens)
    for name, part in (("whole", model), ("backbone", backbone)):
        write_gguf(part.model, header_of(model)._replace(pooling="last"), tmp_path / name, "gguf-f32")
    whole, part = (
        {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(tmp_path / name).tensors}
        for name in ("whole", "backbone")
    )
    whole.pop("output.weight", None)  # a GPT-2's is tied
    assert part == whole
    assert agreement(backbone, gguf_runner(tmp_path / "backbone", backbone)).difference < 1e-6


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_format_is_read_back_and_compared(kind, tmp_path):
    model = exportable(kind)
    results = write_formats(model, GGUFS, tmp_path, Limits(max_kl=1e-2), header_of(model))
    assert list(results) == GGUFS and results["gguf-f32"].difference < 1e-6
    assert 1e-6 < results["gguf"].difference < 0.05 and results["gguf"].cosine > 0.9999


@pytest.mark.parametrize(
    "kind, changes", [("llama", {}), ("qwen2", {}), ("gpt2", {"n_inner": None, "n_positions": 1024})]
)
def test_transformers_reads_the_same_model_and_tokenizer(kind, changes, tmp_path):
    """Of these it restores what `changes` leaves; of others it takes more settings from the class."""
    model, ids = exportable(kind, **changes), torch.arange(40, 64).view(2, 12)
    write_gguf(model.model, header_of(model), tmp_path / "tiny.gguf", "gguf-f32")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(restored(ids).logits, model.model(ids).logits, rtol=1e-4, atol=1e-5)
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf"), "in the 12<|im_end|> é \n x"
    assert tokenizer(text)["input_ids"] == byte_level()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_settings_are_in_the_metadata(tmp_path):
    def metadata(kind, **changes) -> dict:
        model = exportable(kind, **changes)
        write_gguf(model.model, header_of(model)._replace(pooling="mean"), tmp_path / "f", "gguf")
        fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "f").fields.items()}
        return {key.partition(".")[2]: value for key, value in fields.items() if not key.startswith("tokenizer")}

    llama = metadata("llama", rms_norm_eps=2e-5)
    sizes = ("block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size")
    assert [llama[key] for key in sizes] == [2, 36, 44, 40, 268]
    heads = ("head_count", "head_count_kv", "key_length", "value_length")
    assert [llama[f"attention.{key}"] for key in heads] == [6, 3, 8, 8] and llama["rope.dimension_count"] == 8
    assert llama["attention.layer_norm_rms_epsilon"] == pytest.approx(2e-5) and llama["rope.freq_base"] == 10000
    assert llama["file_type"] == 1 and llama["name"] == "tiny" and llama["architecture"] == "llama"
    gemma = metadata("gemma3_text")
    assert (gemma["attention.sliding_window"], gemma["context_length"], gemma["rope.freq_base"]) == (24, 40, 1e6)
    # llama.cpp has no windows in a Llama: within one window all layers see all tokens anyway.
    assert metadata("mistral", sliding_window=16)["context_length"] == 16
    gpt2, bert = metadata("gpt2"), metadata("bert")
    assert (gpt2["feed_forward_length"], gpt2["attention.layer_norm_epsilon"]) == (44, pytest.approx(1e-5))
    assert (bert["pooling_type"], bert["attention.causal"]) == (int(gguf.PoolingType.MEAN), False)
    assert "rope.freq_base" not in gpt2 and bert["attention.layer_norm_epsilon"] == pytest.approx(1e-12)


def test_frequencies_of_llama_3_are_a_tensor(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
    model = exportable("llama", rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0})
    write_gguf(model.model, header_of(model), tmp_path / "f", "gguf-f32")
    factors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "f").tensors}["rope_freqs.weight"]
    plain = 500.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(plain / factors, model.model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert factors.min() == 1 and factors.max() > 2
    batch = {name: value.numpy() for name, value in model.batch(2, 30).items()}
    expected = model.model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits[0]
    np.testing.assert_allclose(gguf_runner(tmp_path / "f", model)(batch)[0], expected.detach(), atol=1e-5)


def test_types_of_tensors(tmp_path):
    """Rows that are no whole blocks keep 16 bits; norms, and what llama.cpp adds, 32."""
    kinds = {}
    for name, hidden in (("gguf", 64), ("gguf-q8_0", 64)):
        model = exportable("gpt2", n_embd=hidden, n_head=4)
        write_gguf(model.model, header_of(model), tmp_path / name, name)
        kinds[name] = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / name).tensors}
    f32, f16, q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
    assert set(kinds["gguf"].values()) == {f32, f16} and kinds["gguf"]["token_embd.weight"] == f16
    of_8_bits = kinds["gguf-q8_0"]
    assert of_8_bits["token_embd.weight"] == of_8_bits["blk.1.attn_qkv.weight"] == q8_0
    assert of_8_bits["blk.0.ffn_down.weight"] == f16  # 44 neurons
    assert {of_8_bits[f"{name}.weight"] for name in ("position_embd", "output_norm", "blk.0.attn_norm")} == {f32}


def test_the_output_of_a_tied_olmo2_is_written_as_well(tmp_path):
    model = exportable("olmo2", tie_word_embeddings=True)
    model.model.tie_weights()
    write_gguf(model.model, header_of(model), tmp_path / "f", "gguf-f32")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "f").tensors}
    np.testing.assert_array_equal(tensors["output.weight"], tensors["token_embd.weight"])


@pytest.mark.parametrize(
    "kind, has_head, changes, message",
    [
        ("modernbert", False, {}, "found model_type 'modernbert', allowed are llama, mistral, qwen2, .*, bert"),
        ("bert", True, {}, "llama.cpp takes vectors from a bert and has none of its heads; add --no-head"),
        ("olmo2", False, {}, "llama.cpp reads no olmo2 without its head; leave --no-head out"),
        ("llama", True, {"hidden_act": "gelu"}, "found hidden_act 'gelu', llama.cpp computes 'silu' alone"),
        ("qwen3", True, {"attention_bias": True}, "found attention_bias True, llama.cpp computes False alone"),
        ("qwen2", True, {"head_dim": 8}, "found hidden_size 36, llama.cpp computes 48 alone"),
        ("gemma3_text", True, {"query_pre_attn_scalar": 6}, "found query_pre_attn_scalar 6, llama.cpp computes 8"),
        ("gemma3_text", True, {"layer_types": ["full_attention"] * 7}, "windows in all but every 6th layer alone"),
        ("qwen2", True, {"layer_types": ["sliding_attention"] * 2}, "found layer_types .*full_attention in all layers"),
        ("qwen3", True, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "found rope_type 'yarn'"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(kind, has_head, changes, message):
    config = gguf_model(kind).config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=f"^--format gguf: .*{message}") as raised:
        architecture_of(config, has_head)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind, mistake", [("llama", {"rotates_neighbours": False}), ("gemma", {"norm_offset": 0.0})])
def test_a_file_that_is_laid_out_in_another_way_is_refused(kind, mistake, tmp_path, monkeypatch):
    model, right = exportable(kind), ARCHITECTURES[kind]
    with monkeypatch.context() as patch:
        patch.setitem(ARCHITECTURES, kind, right._replace(**mistake))
        write_gguf(model.model, header_of(model), tmp_path / "f", "gguf")
    with pytest.raises(UserError, match=r"--format gguf: the file differs from torch by 0\.[2-9]\d* of .*is 0.05"):
        require(agreement(model, gguf_runner(tmp_path / "f", model)), "gguf", Limits())


def test_values_that_16_bits_do_not_hold_are_refused(tmp_path):
    model = exportable("llama")
    with torch.no_grad():
        model.model.model.layers[1].mlp.up_proj.weight[3, 5] = 7e4
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight has values up to 7e\+04, 16 bits hold 65504; take gguf-"):
        write_gguf(model.model, header_of(model), tmp_path / "f", "gguf")
    write_gguf(model.model, header_of(model), tmp_path / "f", "gguf-f32")


def test_a_file_that_is_damaged_or_of_another_model_is_not_kept(tmp_path):
    model, larger = exportable("llama"), exportable("llama", intermediate_size=48)
    path: Path = tmp_path / "f"
    write_gguf(model.model, header_of(model), path, "gguf-f32")
    content = path.read_bytes()
    path.write_bytes(content[:-2000])
    with pytest.raises(UserError, match="--format gguf: .*is cut short or damaged"):
        gguf_runner(path, model)
    path.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ap.weight"))
    with pytest.raises(UserError, match="has no blk.1.ffn_up.weight; write it again with --force"):
        gguf_runner(path, model)
    key = b"llama.feed_forward_length"
    write_gguf(larger.model, header_of(larger), path, "gguf-f32")
    path.write_bytes(path.read_bytes().replace(key + b"\x04\0\0\0\x30", key + b"\x04\0\0\0\x2c"))
    with pytest.raises(UserError, match=r"blk.0.ffn_gate.weight has shape \[48, 36\], the model \[44, 36\]"):
        gguf_runner(path, model)
