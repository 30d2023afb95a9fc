"""A tiny Llama written as llama.cpp lays it out becomes a Hugging Face folder that computes the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from support.gguf_file import F16, MERGES, TOKENS, floats, tiny_llama, write_llama
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from homodistil.data.sources.gguf.convert import convert
from homodistil.data.tokenizer import read_tokenizer
from homodistil.errors import UserError

PREFIX = "tokenizer.ggml"


def converted(tmp_path: Path, *args, **changes) -> Path:
    """Folder of a tiny model that was written to a file, with changes (`write_llama`)."""
    file = write_llama(tmp_path / "model.gguf", tiny_llama(), *args, **changes)
    (tmp_path / "folder").mkdir(exist_ok=True)
    convert(file, tmp_path / "folder", "teacher.name")
    return tmp_path / "folder"


def tokenizer_of(tmp_path: Path, **metadata):
    changes = {f"{PREFIX}.{name}": value for name, value in metadata.items()}
    return AutoTokenizer.from_pretrained(converted(tmp_path, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 12},
        {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_logits_are_those_of_the_original(tmp_path, changes):
    original = tiny_llama(**changes).eval()
    convert(write_llama(tmp_path / "model.gguf", original), tmp_path, "teacher.name")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    ids = torch.randint(0, len(TOKENS), (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, original(ids).logits)


def test_the_configuration_is_the_original_one(tmp_path):
    expected = tiny_llama().config
    config = AutoConfig.from_pretrained(converted(tmp_path))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    ours, theirs = config.to_dict(), expected.to_dict()
    same = set(theirs) - {"bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype", "_name_or_path"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert config.architectures == ["LlamaForCausalLM"]


def test_what_a_file_leaves_out_has_llama_cpps_default(tmp_path):
    names = ["rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length"]
    left_out = {f"llama.{name}": None for name in [*names, "attention.head_count_kv"]}
    keys = {f"blk.{i}.attn_{x}.weight": floats([0.5] * 32 * 32, (32, 32)) for i in range(2) for x in "kv"}
    config = AutoConfig.from_pretrained(converted(tmp_path, left_out, keys))
    assert (config.rope_parameters["rope_theta"], config.head_dim, config.num_key_value_heads) == (10_000.0, 8, 4)


def test_files_of_the_folder(tmp_path):
    folder = converted(tmp_path)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "whoever may read one may read all"


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_text_comes_back_as_it_was(tmp_path, pre):
    tokenizer = tokenizer_of(tmp_path, pre=(8, pre), add_bos_token=(7, False))
    text = "  Year 2012: the naïve\tthing\r\n\n isn't 東京  \n<|im_end|> the end "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids.count(2) == 1, "a special token is one id wherever it stands"
    assert "<|im_end|>" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_the_named_pre_tokenizer_cuts_the_text(tmp_path):
    pieces = {}
    for pre in ("smollm", "gpt-2", "llama-bpe"):
        tokenizer_of(tmp_path, pre=(8, pre))
        backend = Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
        pieces[pre] = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("it's 12345!\n\nok")]
    assert pieces == {
        "smollm": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "!", "Ċ", "Ċ", "ok"],
        "gpt-2": ["it", "'s", "Ġ12345", "!", "Ċ", "Ċ", "ok"],
        "llama-bpe": ["it", "'s", "Ġ", "123", "45", "!ĊĊ", "ok"],
    }


def test_merges_and_ids_are_those_of_the_file(tmp_path):
    tokenizer = tokenizer_of(tmp_path, pre=(8, "gpt-2"))
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    assert tokenizer.tokenize("a the 12 in") == ["a", "Ġthe", "Ġ", "12", "Ġ", "in"], "the earlier merge comes first"
    model = json.loads((tmp_path / "folder" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert [" ".join(pair) for pair in model["merges"]] == MERGES


def test_special_tokens_and_settings(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128 and tokenizer.mask_token is None
    assert tokenizer("the")["input_ids"] == tokenizer("the", add_special_tokens=False)["input_ids"]
    said = tokenizer.apply_chat_template([{"role": "user", "content": "in"}], tokenize=False)
    assert said == "<|im_start|>in<|im_end|>"
    assert len(read_tokenizer(str(tmp_path / "folder"), "teacher.name")) == len(TOKENS)


def test_bos_stands_first_where_the_file_wants_it(tmp_path):
    assert tokenizer_of(tmp_path, add_bos_token=(7, True))("the")["input_ids"][0] == 1
    assert tokenizer_of(tmp_path, pre=(8, "llama-bpe"), add_bos_token=None)("the")["input_ids"][0] == 1
    assert tokenizer_of(tmp_path, pre=(8, "gpt-2"), add_bos_token=None)("the")["input_ids"][0] != 1
    assert tokenizer_of(tmp_path, add_bos_token=(7, True), bos_token_id=None)("the")["input_ids"][0] != 1


def test_a_token_of_the_user_is_whole_and_stays_in_the_text(tmp_path):
    tokens, types = (9, (8, [*TOKENS[:-1], "<user>"])), (9, (5, [3, 3, 3] + [1] * (len(TOKENS) - 4) + [4]))
    tokenizer = tokenizer_of(tmp_path, tokens=tokens, token_type=types, merges=(9, (8, MERGES[:-1])))
    ids = tokenizer("in<user>in")["input_ids"]
    assert ids == [TOKENS.index("in"), len(TOKENS) - 1, TOKENS.index("in")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "in<user>in"


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"general.architecture": (8, "qwen2")}, "found general.architecture 'qwen2', allowed is llama; give the mod"),
        ({"general.architecture": None}, "has no general.architecture in its metadata; give a file that llama.cpp's"),
        ({"llama.block_count": None}, "has no llama.block_count in its metadata"),
        ({"llama.block_count": (4, 0)}, "found llama.block_count 0, allowed are whole numbers 1 .. 1024"),
        ({"llama.block_count": (4, 3)}, "has no 'blk.2.attn_k.weight', 'blk.2.attn_norm.weight', 'blk.2.attn_output"),
        ({"llama.block_count": (4, 1)}, "has 'blk.1.attn_k.weight', 'blk.1.attn_norm.weight', 'blk.1.attn_output.we"),
        ({"llama.feed_forward_length": (9, (4, [64, 64]))}, "found llama.feed_forward_length [64, 64], allowed are"),
        (
            {"llama.feed_forward_length": (4, 65)},
            "ffn_gate.weight has shape [64, 32], by the metadata it is [65, 32]",
        ),
        ({"llama.attention.head_count": (4, 5)}, "found hidden size 32, 5 heads on 2 keys of 8 dims (8 rotated)"),
        ({"llama.attention.head_count_kv": (4, 3)}, "4 heads on 3 keys"),
        ({"llama.rope.dimension_count": (4, 4)}, "(4 rotated)"),
        ({"llama.attention.value_length": (4, 16)}, "values of 16"),
        ({"llama.attention.layer_norm_rms_epsilon": (6, 0.0)}, "epsilon 0.0, allowed are numbers above 0"),
        ({"llama.attention.layer_norm_rms_epsilon": (6, float("nan"))}, "epsilon nan, allowed are numbers above 0"),
        (
            {"llama.rope.scaling.type": (8, "yarn")},
            "found rotary positions that are scaled (llama.rope.scaling.ty",
        ),
        ({f"{PREFIX}.model": (8, "llama")}, "found tokenizer.ggml.model 'llama', allowed are gpt2; give the model's"),
        ({f"{PREFIX}.pre": (8, "viking")}, "found tokenizer.ggml.pre 'viking', allowed are smollm, gpt-2, llama-bpe, "),
        ({f"{PREFIX}.tokens": (8, "x")}, "found tokenizer.ggml.tokens 'x', allowed are lists of text"),
        ({f"{PREFIX}.tokens": (9, (8, ["a"] * len(TOKENS)))}, "is damaged (a token twice)"),
        ({f"{PREFIX}.tokens": (9, (8, [*TOKENS, "more"]))}, "266 tokens for 265 rows of token_embd.weight"),
        ({f"{PREFIX}.merges": (9, (8, ["a b c"]))}, "is damaged (the merge 'a b c', expected two parts)"),
        ({f"{PREFIX}.merges": (9, (8, ["zz yy"]))}, "is damaged (its tokenizer: "),
        (
            {f"{PREFIX}.bos_token_id": (4, TOKENS.index(":")), f"{PREFIX}.add_bos_token": (7, True)},
            "is damaged (its tokenizer: ",
        ),
        ({f"{PREFIX}.token_type": (9, (5, [1]))}, "is damaged (265 tokens with 1 types)"),
        (
            {f"{PREFIX}.eos_token_id": (4, 265)},
            "found tokenizer.ggml.eos_token_id 265, allowed are whole numbers 0",
        ),
        ({f"{PREFIX}.add_bos_token": (4, 1)}, "found tokenizer.ggml.add_bos_token 1, allowed are true and false"),
        ({"tokenizer.chat_template": (4, 1)}, "found tokenizer.chat_template 1, allowed are text"),
    ],
)
def test_what_is_no_stock_llama_is_one_line(tmp_path, metadata, says):
    _refused(tmp_path, says, metadata)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"blk.0.attn_q.bias": floats([0] * 32)}, "has 'blk.0.attn_q.bias', which a stock Llama has not"),
        ({"rope_freqs.weight": floats([1] * 4)}, "has 'rope_freqs.weight', which a stock Llama has not"),
        ({"a\nb": floats([1])}, r"has 'a\nb', which"),
        ({"output_norm.weight": None}, "has no 'output_norm.weight'; give a file with a whole model"),
        ({"token_embd.weight": None}, "has no matrix token_embd.weight"),
        ({"token_embd.weight": floats([1] * 32)}, "has no matrix token_embd.weight"),
        ({"blk.1.ffn_up.weight": (F16, (32, 64), b"\0" * 4096)}, "blk.1.ffn_up.weight has shape [32, 64], by the"),
        ({"output_norm.weight": floats([float("nan")] * 32)}, "(tensor 'output_norm.weight' has values that are n"),
    ],
)
def test_other_tensors_are_one_line(tmp_path, tensors, says):
    _refused(tmp_path, says, None, tensors)


def _refused(tmp_path: Path, says: str, *args) -> None:
    with pytest.raises(UserError) as caught:
        converted(tmp_path, *args)
    message = str(caught.value)
    assert message.startswith(f"teacher.name: {tmp_path / 'model.gguf'}: ") and "\n" not in message
    assert says in message and ";" in message


def test_no_damage_is_more_than_one_line(tmp_path):
    """Flipped bytes in the header of a whole model."""
    file = write_llama(tmp_path / "model.gguf", tiny_llama())
    content, draw = file.read_bytes(), random.Random(0)
    header = content.index(b"token_embd.weight") + 2500
    refusals = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[draw.randrange(4, header)] = draw.choice([0, 1, 128, 255, draw.randrange(256)])
        file.write_bytes(damaged)
        try:
            convert(file, tmp_path, "teacher.name")
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 30
