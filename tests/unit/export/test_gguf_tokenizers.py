"""Tokenizers as GGUF metadata: each kind comes back with the same ids, and what llama.cpp does not have is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf import GGUFReader
from support.gguf_file import MERGES, SPECIAL, TOKENS
from support.gguf_models import byte_level, exportable, sentence_pieces
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from homodistil.data.sources.gguf.splitting import SPLITTINGS
from homodistil.data.vocabulary.cut import cut_tokenizer
from homodistil.errors import UserError
from homodistil.export.formats.gguf.file import write_gguf
from homodistil.export.formats.gguf.header import Header
from homodistil.export.formats.gguf.reload import TEXTS, check_tokenizer
from homodistil.export.formats.gguf.vocabulary import vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def described(tokenizer, num_embeddings=None, token_types=None) -> dict:
    """Key without "tokenizer.ggml." -> value."""
    metadata = vocabulary(tokenizer, num_embeddings or len(tokenizer), token_types)
    return {key.removeprefix("tokenizer.ggml."): value for key, (_, value) in metadata.items()}


def written(tokenizer, folder, token_types=None):
    """A file with this tokenizer, and with a model that it need not fit."""
    model = exportable("llama")
    path = folder / "tiny.gguf"
    write_gguf(model.model, Header("tiny", tokenizer, vocabulary(tokenizer, len(tokenizer), token_types)), path, "gguf")
    return path


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_byte_level_tokenizers_are_known_by_how_they_cut_text(pre, tmp_path):
    tokenizer = byte_level(pre)
    metadata = described(tokenizer, num_embeddings=len(tokenizer) + 2)
    assert (metadata["model"], metadata["pre"], metadata["merges"]) == ("gpt2", pre, MERGES)
    assert metadata["tokens"] == [*TOKENS, f"[PAD{len(TOKENS)}]", f"[PAD{len(TOKENS) + 1}]"]
    assert metadata["token_type"] == [CONTROL] * 3 + [NORMAL] * (len(TOKENS) - 3) + [UNUSED] * 2
    assert (metadata["add_bos_token"], metadata["add_eos_token"]) == (False, False)
    check_tokenizer(written(tokenizer, tmp_path), tokenizer)


def test_pre_tokenizers_cut_the_texts_of_the_check_in_different_ways():
    """So a wrong name would be seen; dbrx differs from llama-bpe in `ignore_merges` alone."""
    by_pre = {}
    for pre, splitting in SPLITTINGS.items():
        steps = pre_tokenizers.Sequence(list(splitting.steps))
        by_pre[pre] = str([steps.pre_tokenize_str(text) for text in TEXTS])
    assert by_pre.pop("dbrx") == by_pre["llama-bpe"] and len(set(by_pre.values())) == len(by_pre)


def test_added_tokens_template_and_bos(tmp_path):
    tokenizer = byte_level("llama-bpe")
    tokenizer.add_tokens(["<user>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A", pair=f"{SPECIAL[1]} $A $B", special_tokens=[(SPECIAL[1], 1)]
    )
    metadata = described(tokenizer)
    assert metadata["token_type"][-1] == USER_DEFINED and metadata["tokens"][-1] == "<user>"
    assert metadata["add_bos_token"] is True and metadata["add_eos_token"] is False
    assert [metadata[f"{name}_token_id"] for name in ("bos", "eos", "padding")] == [1, 2, 0]
    assert metadata["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    restored = AutoTokenizer.from_pretrained(tmp_path, gguf_file=written(tokenizer, tmp_path).name)
    text = "it's 12345 <user>!"
    assert restored(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"][1:]


def test_a_smaller_vocabulary_keeps_its_way_of_cutting_text(tmp_path):
    whole = byte_level("smollm")
    counts = np.zeros(len(whole), np.int64)
    counts[whole("the 12")["input_ids"]] = 5
    smaller = cut_tokenizer(whole, counts, "corpus").write(tmp_path)
    metadata = described(smaller)
    assert len(smaller) < len(whole) and (metadata["pre"], metadata["merges"]) == ("smollm", ["h e"])
    (tmp_path / "file").mkdir()
    check_tokenizer(written(smaller, tmp_path / "file"), smaller)


def test_word_pieces_have_phantom_spaces(tokenizer, tmp_path):
    metadata, ids = described(tokenizer, token_types=2), tokenizer.get_vocab()
    assert (metadata["model"], metadata["pre"], metadata["token_type_count"]) == ("bert", "default", 2)
    spelt = {"[CLS]": "[CLS]", "the": "▁the", "##ing": "ing", "!": "▁!"}
    assert {token: metadata["tokens"][ids[token]] for token in spelt} == spelt
    assert metadata["token_type"][ids["[CLS]"]] == CONTROL and metadata["token_type"][ids["the"]] == NORMAL
    names = {"bos": "[CLS]", "cls": "[CLS]", "eos": "[SEP]", "seperator": "[SEP]", "unknown": "[UNK]", "mask": "[MASK]"}
    assert {name: metadata[f"{name}_token_id"] for name in names} == {name: ids[each] for name, each in names.items()}
    assert metadata["add_bos_token"] and metadata["add_eos_token"]
    check_tokenizer(written(tokenizer, tmp_path, 2), tokenizer)


@pytest.mark.parametrize("prepends", [False, True])
def test_sentence_pieces_have_scores_for_merges(prepends, tmp_path):
    tokenizer = sentence_pieces(prepends)
    metadata, ids = described(tokenizer), tokenizer.get_vocab()
    assert (metadata["model"], metadata["add_space_prefix"]) == ("llama", prepends) and "merges" not in metadata
    scores = {piece: metadata["scores"][number] for piece, number in ids.items()}
    assert scores["he"] == 0 > scores["▁t"] > scores["in"] > scores["▁the"] > scores["the"] > scores["▁▁"]
    kinds = {piece: metadata["token_type"][ids[piece]] for piece in ("<unk>", "<|im_end|>", "<0x0A>", "he")}
    assert kinds == {"<unk>": UNKNOWN, "<|im_end|>": CONTROL, "<0x0A>": BYTE, "he": NORMAL}
    path = written(tokenizer, tmp_path)
    check_tokenizer(path, tokenizer)
    restored = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "the thing is in  there"
    assert restored(text, add_special_tokens=False)["input_ids"] == sentence_pieces(True)(text)["input_ids"]


def test_a_file_with_another_tokenizer_is_not_kept(tmp_path):
    with pytest.raises(UserError, match="^--format gguf: the file's tokenizer reads .* as .*; nothing was kept"):
        check_tokenizer(written(byte_level("smollm"), tmp_path), byte_level("gpt-2"))  # which joins 1 and 2


def _change(tokenizer: PreTrainedTokenizerFast, **parts) -> PreTrainedTokenizerFast:
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | parts
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), pad_token=SPECIAL[0])


def _part(step) -> dict:
    return json.loads(step.__getstate__())


CASED = _part(normalizers.BertNormalizer(lowercase=False))
WITH_PREFIX = _part(pre_tokenizers.ByteLevel(add_prefix_space=True))
TWO_IN_FRONT = _part(
    processors.TemplateProcessing(f"{SPECIAL[1]} {SPECIAL[2]} $A", special_tokens=[(SPECIAL[1], 1), (SPECIAL[2], 2)])
)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda _: _change(byte_level(), pre_tokenizer=WITH_PREFIX), r"cuts text by \{.*none of smollm, gpt-2, llama-"),
        (lambda _: _change(byte_level(), normalizer=_part(normalizers.Lowercase())), "found normalizer .*Lowercase"),
        (lambda _: _change(byte_level(), post_processor=TWO_IN_FRONT), "llama.cpp adds one token on a side"),
        (lambda wordpiece: _change(wordpiece, normalizer=CASED), "llama.cpp reads WordPiece as an uncased BERT does"),
        (lambda _: _change(sentence_pieces(True), normalizer=None), "none of SentencePiece's ways"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(make, message, tokenizer):
    changed = make(tokenizer)
    with pytest.raises(UserError, match=f"^--format gguf: .*{message}") as raised:
        vocabulary(changed, len(changed), None)
    assert "\n" not in str(raised.value)


def test_merges_that_scores_cannot_replace_are_refused():
    content = json.loads(sentence_pieces(False).backend_tokenizer.to_str())
    content["model"]["merges"].pop()
    merged = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(UserError, match="merges are not those of a SentencePiece model"):
        vocabulary(merged, len(merged), None)


def test_a_unigram_model_is_refused():
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0)))
    with pytest.raises(UserError, match="found a tokenizer of the kind Unigram, allowed are byte-level and"):
        vocabulary(unigram, 2, None)


def test_metadata_are_typed_as_llama_cpp_reads_them(tmp_path):
    fields = GGUFReader(written(sentence_pieces(True), tmp_path)).fields
    kinds = {key: [kind.name for kind in field.types] for key, field in fields.items()}
    arrays = {"tokens": "STRING", "scores": "FLOAT32", "token_type": "INT32"}
    assert {key: kinds[f"tokenizer.ggml.{key}"] for key in arrays} == {key: ["ARRAY", of] for key, of in arrays.items()}
    assert kinds["tokenizer.ggml.bos_token_id"] == kinds["llama.block_count"] == ["UINT32"]
    assert kinds["tokenizer.ggml.add_bos_token"] == ["BOOL"]
