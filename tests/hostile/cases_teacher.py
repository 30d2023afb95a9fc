"""Teachers that are damaged, not what their config says, or not what can be distilled; and tokenizers likewise."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import torch
from case import Case, Workspace

HEADLESS = ("loss.mlm=0", "loss.kl=0")
ONE_LAYER = "bert.encoder.layer.2."
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
HEAD = "cls.predictions."
DEEP = "[" * 100_000


def _config(says: str, script: str = "train", **changes: object) -> Case:
    """A config.json with other entries. `says`: what the line must have besides its file."""
    name = "_".join(["teacher", *changes, script, *(str(value)[:12] for value in changes.values())])
    return Case(
        "".join(c if c.isalnum() else "_" for c in name),
        lambda w: (w.set_teacher(**changes), _run(w, script))[1],
        says=["config.json", says],
        ranks=2 if script == "train" else 1,
    )


def _run(w: Workspace, script: str, *overrides: str) -> list[str]:
    options = ["--device", "H100"] if script == "plan" else []
    return w.train(*options, *overrides, script=script)


def _weights(name: str, edit: Callable, *says: str, overrides: tuple[str, ...] = (), script: str = "train") -> Case:
    """Other tensors."""
    return Case(
        f"weights_{name}",
        lambda w: (w.edit_weights(edit), _run(w, script, *overrides))[1],
        says=["teacher.name", *says],
        ranks=2 if script == "train" else 1,
    )


def _without(prefix: str) -> Callable:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def _file(name: str, file: str, content: str | bytes | None, *says: str, script: str = "train") -> Case:
    """Another file in the teacher's folder; None: it is gone."""

    def build(w: Workspace) -> list[str]:
        path = w.teacher / file
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return _run(w, script)

    return Case(name, build, says=["teacher.name", *says], ranks=2 if script == "train" else 1)


def _truncated(w: Workspace) -> list[str]:
    path = w.teacher / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return w.train()


def _shards(w: Workspace, weight_map: object) -> list[str]:
    os.replace(w.teacher / "model.safetensors", w.teacher / "model-00001-of-00002.safetensors")
    (w.teacher / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return w.train()


def _special(w: Workspace, file: str, kind: str) -> list[str]:
    path = w.teacher / file
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "fifo" else path.mkdir() if kind == "folder" else path.symlink_to("/dev/zero")
    return w.train()


def _vocabulary(w: Workspace, change: Callable[[dict[str, int]], dict[str, int]], script: str = "train") -> list[str]:
    """Another vocabulary; special tokens that are not in it any more are not added to it either."""
    content = json.loads((w.teacher / "tokenizer.json").read_text())
    words = change(content["model"]["vocab"])
    added = [token for token in content["added_tokens"] if token["content"] in words]
    w.set_tokenizer("tokenizer.json", model=content["model"] | {"vocab": words}, added_tokens=added)
    return _run(w, script)


def _other_model(w: Workspace, model: dict) -> list[str]:
    w.set_tokenizer("tokenizer.json", model=model)
    return w.train()


def _without_tokenizer(w: Workspace, script: str = "train") -> list[str]:
    for path in w.teacher.glob("tokenizer*"):
        path.unlink()
    return _run(w, script)


def _greek(w: Workspace) -> list[str]:
    for path in w.text.iterdir():
        path.write_text("μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος οὐλομένην " * 20)
    return w.train()


def _other_head(tensors: dict) -> None:
    tensors[f"{HEAD}bias"] = torch.zeros(7)


def _spoil(value: float) -> Callable:
    def edit(tensors: dict) -> None:
        tensors[QUERY][3, 5] = value

    return edit


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "[UNK]": 3}, "merges": [["a", "b"]]}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}

CONFIGS = [
    _config("hidden_size '24'", hidden_size="24"),
    _config("hidden_size 33", hidden_size=33),
    _config("num_attention_heads 5", num_attention_heads=5),
    _config("hidden_size -24", hidden_size=-24),
    _config("hidden_size 0", hidden_size=0),
    _config("intermediate_size 1000000", intermediate_size=10**30),
    _config("hidden_act 'geluu'", hidden_act="geluu"),
    _config("num_hidden_layers 1000000", num_hidden_layers=10**6),
    _config("num_hidden_layers 1000000", num_hidden_layers=10**6, script="plan"),
    _config("num_hidden_layers 5, the weights have 3", num_hidden_layers=5),
    _config("num_hidden_layers 5, the weights have 3", num_hidden_layers=5, script="plan"),
    _config("101 x 24 in the weights, 90 x 24 by config.json", vocab_size=90),
    _config("2000000000 x 24 by config.json", vocab_size=2_000_000_000),
    _config("is_decoder", is_decoder=True),
    _config("is_decoder", is_decoder=True, script="prepare_data"),
    _config("add_cross_attention", add_cross_attention=True),
    _config("position_embedding_type 'relative_key'", position_embedding_type="relative_key"),
    _config("position_embedding_type 'relative_key'", position_embedding_type="relative_key", script="plan"),
    _config("quantization_config", quantization_config={"quant_method": "gptq", "bits": 4}),
    _config("auto_map", auto_map={"AutoModelForMaskedLM": "theirs.Model"}),
    _config("layer_norm_eps '1e-12'", layer_norm_eps="1e-12"),
    _config("hidden_dropout_prob 2", hidden_dropout_prob=2),
    _config("model_type [1]", model_type=[1]),
    _config("pad_token_id 500", pad_token_id=500),
    _file("config_is_broken_json", "config.json", '{"model_type": "bert",', "config.json", "not valid JSON"),
    _file("config_is_a_list", "config.json", "[]", "config.json", "holds list"),
    _file("config_is_empty", "config.json", "", "config.json", "not valid JSON"),
    _file("config_is_deep", "config.json", DEEP, "config.json", "not valid JSON"),
    _file("config_is_latin_1", "config.json", b'{"model_type": "b\xe9rt"}', "config.json", "not valid JSON"),
    _file("config_is_gone", "config.json", None, "config.json", "is not there"),
    Case("config_is_a_folder", lambda w: _special(w, "config.json", "folder"), says=["config.json is a folder"]),
    Case("config_is_a_fifo", lambda w: _special(w, "config.json", "fifo"), says=["config.json is not a regular file"]),
    Case("config_is_endless", lambda w: _special(w, "config.json", "device"), says=["is not a regular file"]),
]

WEIGHTS = [
    _weights("lack_a_tensor", _without(QUERY), "lack 1 tensor", QUERY),
    _weights("lack_a_layer", _without(ONE_LAYER), "the weights have 2 layers"),
    _weights("lack_a_layer_in_a_plan", _without(ONE_LAYER), "the weights have 2 layers", script="plan"),
    _weights("lack_the_embeddings", _without("bert.embeddings."), "lack 5 tensors", "and 2 more"),
    _weights("have_half_a_head", _without(f"{HEAD}transform.dense"), "a part of the MLM head", "transform.dense.bias"),
    _weights("have_another_head", _other_head, "cls.predictions.bias is 7 in the weights, 101 by config.json"),
    _weights(
        "are_another_models", lambda t: {f"roberta.{n}": x for n, x in t.items()}, "no layer of a bert", "roberta."
    ),
    _weights("have_no_head", _without(HEAD), "has no MLM head"),
    _weights("are_nan", _spoil(float("nan")), QUERY, "1 NaN or infinite values"),
    _weights("are_infinite", _spoil(float("-inf")), QUERY, "1 NaN or infinite values"),
    _weights("are_nan_in_a_plan", _spoil(float("nan")), QUERY, script="plan"),
    _weights("are_int8", lambda t: {n: x.to(torch.int8) for n, x in t.items()}, "quantised or whole numbers", "I8"),
    _weights("are_fp8", lambda t: {n: x.to(torch.float8_e4m3fn) for n, x in t.items()}, "F8_E4M3"),
    _weights("are_gptq", lambda t: t.update({f"{QUERY}.qweight": torch.zeros(3, 3, dtype=torch.int32)}), "I32"),
    Case("weights_are_cut_short", _truncated, says=["model.safetensors is no readable safetensors file"]),
    _file("weights_are_empty", "model.safetensors", b"", "no readable safetensors file (0 bytes"),
    _file("weights_are_garbage", "model.safetensors", b"\xff" * 5000, "no readable safetensors file"),
    _file("weights_are_gone", "model.safetensors", None, "cannot load weights"),
    Case("weights_are_a_fifo", lambda w: _special(w, "model.safetensors", "fifo"), says=["is not a regular file"]),
    Case(
        "shard_is_missing",
        lambda w: _shards(w, {QUERY: "model-00002-of-00002.safetensors"}),
        says=["model-00002-of-00002.safetensors is not there"],
    ),
    Case("shards_are_a_list", lambda w: _shards(w, [1]), says=["index.json has no weight_map"]),
    Case(
        "shard_lacks_what_the_index_names",
        lambda w: _shards(w, {"bert.nothing": "model-00001-of-00002.safetensors"}),
        says=["names bert.nothing, which are in none of its files"],
    ),
]

TOKENIZERS = [
    Case("no_tokenizer", _without_tokenizer, says=["has no tokenizer (no tokenizer.json"]),
    Case("no_tokenizer_in_a_plan", lambda w: _without_tokenizer(w, "plan"), says=["has no tokenizer"], ranks=1),
    Case(
        "no_tokenizer_to_prepare_with",
        lambda w: _without_tokenizer(w, "prepare_data"),
        says=["teacher.name", "has no tokenizer"],
        ranks=1,
    ),
    _file("tokenizer_is_broken_json", "tokenizer.json", '{"model": ', "tokenizer.json is not valid JSON"),
    _file("tokenizer_is_a_list", "tokenizer.json", "[]", "tokenizer.json holds list"),
    _file("tokenizer_is_deep", "tokenizer.json", DEEP, "tokenizer.json is not valid JSON"),
    _file("tokenizer_settings_are_a_list", "tokenizer_config.json", "[]", "tokenizer_config.json holds list"),
    Case("tokenizer_is_a_fifo", lambda w: _special(w, "tokenizer.json", "fifo"), says=["is not a regular file"]),
    Case("tokenizer_is_bpe", lambda w: _other_model(w, BPE), says=["tokenizer.json holds a BPE model", "WordPiece"]),
    Case("tokenizer_is_unigram", lambda w: _other_model(w, UNIGRAM), says=["tokenizer.json holds a Unigram model"]),
    Case(
        "tokenizer_ids_beyond_the_embeddings",
        lambda w: _vocabulary(w, lambda words: {word: i if i < 50 else i + 900 for word, i in words.items()}),
        says=["57 tokens, the model 101 embeddings", "956"],
    ),
    Case(
        "tokenizer_knows_no_words",
        lambda w: _vocabulary(w, lambda words: {word: i for word, i in words.items() if i < 5}),
        says=["knows no words", "[UNK]"],
    ),
    Case(
        "tokenizer_knows_capitals_alone",
        lambda w: _vocabulary(w, lambda words: {word if i < 5 else word.upper(): i for word, i in words.items()}),
        says=["words of its own vocabulary as unknown"],
    ),
    Case(
        "tokenizer_without_mask",
        lambda w: _vocabulary(w, lambda words: {word: i for word, i in words.items() if word != "[MASK]"}),
        says=["lacks mask_token '[MASK]'"],
    ),
    Case(
        "tokenizer_without_mask_to_prepare_with",
        lambda w: _vocabulary(w, lambda words: {x: i for x, i in words.items() if x != "[MASK]"}, "prepare_data"),
        says=["lacks mask_token '[MASK]'"],
        ranks=1,
    ),
    Case(
        "tokenizer_mask_is_pad",
        lambda w: (w.set_tokenizer(mask_token="[PAD]"), w.train())[1],
        says=["'[PAD]', as mask_token and as pad_token"],
    ),
    Case(
        "tokenizer_code_of_its_own",
        lambda w: (w.set_tokenizer(auto_map={"AutoTokenizer": ["theirs.Tokenizer", None]}), w.train())[1],
        says=["tokenizer_config.json has auto_map"],
    ),
    Case("text_in_another_script", _greek, says=["data.sources", "not in the language", "100%"]),
]

NAMES = [
    Case("teacher_is_a_file", lambda w: w.train(f"teacher.name={w.engine}"), says=["teacher.name", "is a file"]),
    Case("teacher_has_a_long_name", lambda w: w.train(f"teacher.name=/{'x' * 3000}"), says=["teacher.name"]),
    Case("teacher_of_no_user", lambda w: w.train("teacher.name=~nosuchuser/bert"), says=["teacher.name", "nosuchuser"]),
]

CASES = CONFIGS + WEIGHTS + TOKENIZERS + NAMES
