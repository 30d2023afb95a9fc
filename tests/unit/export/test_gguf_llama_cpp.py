"""GGUF files in llama.cpp itself, if installed (pip install xllamacpp); docs/export.md has results."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from support.gguf_models import byte_level, exportable, sentence_pieces

from homodistil.data.sources.gguf.splitting import SPLITTINGS
from homodistil.export.formats.gguf.architectures import ARCHITECTURES
from homodistil.export.formats.gguf.file import write_gguf
from homodistil.export.formats.gguf.header import Header
from homodistil.export.formats.gguf.reload import TEXTS
from homodistil.export.formats.gguf.vocabulary import vocabulary

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.full
DECODERS = [kind for kind, architecture in ARCHITECTURES.items() if architecture.is_causal]


def serve(path: Path):
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(path), 256, 1, False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # usually 16 bits
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # for 16 bits as well
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(settings)


def server_of(model, tokenizer, folder: Path):
    header = Header("tiny", tokenizer, vocabulary(tokenizer, model.vocab_size, None))
    write_gguf(model.model, header, folder / "tiny.gguf", "gguf-f32")
    return serve(folder / "tiny.gguf")


@pytest.mark.parametrize("kind", DECODERS)
def test_logits_are_those_of_torch(kind, tmp_path):
    model = exportable(kind, max_position_embeddings=128)
    server, num_compared = server_of(model, byte_level(), tmp_path), 0
    for length in (1, 5, 20, 30, 60):  # a window of Gemma 3 is 24
        ids = torch.randint(3, 265, (1, length), generator=torch.Generator().manual_seed(length))
        request = {"prompt": ids[0].tolist(), "n_predict": 1, "n_probs": model.vocab_size, "temperature": -1}
        choice = server.handle_completions({**request, "cache_prompt": False, "ignore_eos": True})["choices"][0]
        if choice["logprobs"] is None:  # the likeliest token is a part of a character
            continue
        tokens = {each["id"]: each["logprob"] for each in choice["logprobs"]["content"][0]["top_logprobs"]}
        tokens.pop(2, None)  # the end of a text, which is ignored
        actual = torch.tensor(list(tokens.values()))
        with torch.no_grad():
            expected = model.model(ids).logits[0, -1, list(tokens)]
        # llama.cpp looks up Gemma's GELU in a table of 16 bits; a window of 25 instead of 24 would be off by more.
        torch.testing.assert_close(actual - actual.mean(), expected - expected.mean(), rtol=0, atol=2e-2)
        num_compared += 1
    assert num_compared


@pytest.mark.parametrize("make", [*SPLITTINGS, True, False])
def test_texts_are_read_as_the_same_tokens(make, tmp_path):
    tokenizer = byte_level(make) if isinstance(make, str) else sentence_pieces(prepends=make)
    server = server_of(exportable("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path)
    for text in (*TEXTS, "the thing is in  there"):
        content = json.dumps({"content": text, "add_special": False}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", content)
        tokens = json.load(urllib.request.urlopen(request))["tokens"]
        assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"], text
