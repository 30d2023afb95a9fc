"""Smaller tokenizers of every kind against the whole ones, on 10,000 lines of real text."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from homodistil.data.prepare.corpus import Rows
from homodistil.data.sources import assets
from homodistil.data.vocabulary.counts import piece_counts
from homodistil.data.vocabulary.cut import SmallerTokenizer, check_cuttable, cut_tokenizer
from homodistil.errors import UserError

NUM_LINES = 10_000
KINDS = ("wordpiece", "byte_bpe", "fallback_bpe", "unigram", "byte_unigram")
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
SIZE, SMALLER = 2500, 1200


@pytest.fixture(scope="module")
def lines(cache_dir) -> list[str]:
    """Of two books and Wikipedia, up to 60 characters each."""
    texts = []
    for name in ("embedded:wikipedia", "embedded:moby-dick"):
        with open(assets.text_file(name, cache_dir), encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    pieces = re.findall(r"\S.{10,59}(?=\s)", "\n".join(texts))
    return pieces[:: len(pieces) // NUM_LINES][:NUM_LINES]


def _trained(kind: str, lines: list[str]) -> Tokenizer:
    is_unigram = kind.endswith("unigram")
    built = Tokenizer(models.Unigram() if is_unigram else models.BPE(unk_token="<unk>"))
    options = {"vocab_size": SIZE, "special_tokens": list(SPECIAL.values())[:4], "show_progress": False}
    if kind == "byte_bpe":
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        built.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        built.pre_tokenizer, built.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **options) if is_unigram else trainers.BpeTrainer(**options)
    built.train_from_iterator(lines[::8], trainer)
    return built


def _with_bytes(trained: Tokenizer) -> Tokenizer:
    """The same with pieces for bytes, as Llama's and Gemma's have."""
    content, names = json.loads(trained.to_str()), [f"<0x{byte:02X}>" for byte in range(256)]
    model = content["model"] | {"byte_fallback": True}
    if model["type"] == "Unigram":
        model["vocab"] += [[name, -20.0] for name in names]
    else:
        model["vocab"] |= {name: len(model["vocab"]) + i for i, name in enumerate(names)}
    built = Tokenizer.from_str(json.dumps(content | {"model": model}))
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return built


def _make(kind: str, lines: list[str], cache_dir) -> PreTrainedTokenizerBase:
    if kind == "wordpiece":
        return AutoTokenizer.from_pretrained(assets.teacher_folder("embedded:bert-tiny", cache_dir))
    built = _trained(kind, lines)
    built = _with_bytes(built) if kind in ("fallback_bpe", "byte_unigram") else built
    built.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    ids = {name: built.token_to_id(name) for name in ("<s>", "</s>")}
    single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
    built.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(tokenizer_object=built, **SPECIAL)


@pytest.fixture(scope="module", params=KINDS)
def whole(request, lines, cache_dir) -> PreTrainedTokenizerBase:
    return _make(request.param, lines, cache_dir)


def encode(tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(lines)]


def counts_of(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> np.ndarray:
    return np.bincount(np.concatenate(ids), minlength=max(tokenizer.get_vocab().values()) + 1)


@pytest.fixture(scope="module")
def text(whole, lines) -> list[str]:
    """All lines; for those kinds that differ from another one in a fallback alone, every fifth."""
    return lines[::5] if whole.backend_tokenizer.token_to_id("<0x00>") is not None else lines


@pytest.fixture(scope="module")
def before(whole, text) -> list[list[int]]:
    """The text in the ids of the whole tokenizer."""
    return encode(whole, text)


@pytest.fixture(scope="module")
def counts(whole, before) -> np.ndarray:
    return counts_of(whole, before)


def expected(smaller: SmallerTokenizer, before: list[list[int]]) -> list[list[int] | None]:
    """Each line in the new numbers; None: one of its pieces is gone."""
    new_ids = smaller.new_ids
    return [[new_ids[i] for i in line] if new_ids.keys() >= set(line) else None for line in before]


def test_with_the_pieces_of_the_text_all_its_lines_are_as_before(whole, before, text, tmp_path):
    text, ids = text[: len(text) // 4], before[: len(text) // 4]
    counts = counts_of(whole, ids)
    smaller = cut_tokenizer(whole, counts, "corpus")
    written = smaller.write(tmp_path)
    assert set(np.flatnonzero(counts)) <= set(smaller.kept) and len(written) == len(smaller.kept)
    assert len(written) < len(whole)
    assert encode(written, text) == expected(smaller, ids)


def test_with_fewer_pieces_lines_without_removed_ones_are_as_before(whole, before, counts, text, tmp_path):
    smaller = cut_tokenizer(whole, counts, SMALLER)
    written = smaller.write(tmp_path)
    assert len(smaller.kept) == len(written) == SMALLER
    ids, wanted = encode(written, text), expected(smaller, before)
    assert all(want in (None, now) for want, now in zip(wanted, ids, strict=True))
    needing = [i for i, want in enumerate(wanted) if want is None]
    assert 100 < len(needing) < len(text) - 100
    # What needs a removed piece is made of shorter ones, and says the same.
    for i in needing[::5]:
        assert ids[i].count(written.unk_token_id) == before[i].count(whole.unk_token_id)
        assert written.decode(ids[i], skip_special_tokens=True) == whole.decode(before[i], skip_special_tokens=True)


def test_special_tokens_keep_their_meaning(whole, counts, tmp_path):
    smaller = cut_tokenizer(whole, counts, SMALLER)
    written = smaller.write(tmp_path)
    for name in ("pad_token", "unk_token", "mask_token", "cls_token", "sep_token", "bos_token", "eos_token"):
        assert getattr(written, name) == getattr(whole, name)
        if getattr(whole, name) is not None:
            assert getattr(written, f"{name}_id") == smaller.new_ids[getattr(whole, f"{name}_id")]
    assert sorted(written.get_vocab().values()) == list(range(SMALLER))
    text = [f"the {whole.mask_token} a", "the"], ["of the", "and"]
    old, new = (tokenizer(*text, padding=True) for tokenizer in (whole, written))
    assert new["input_ids"] == [[smaller.new_ids[i] for i in line] for line in old["input_ids"]]
    assert new["attention_mask"] == old["attention_mask"]


def test_the_most_frequent_pieces_stay(whole, counts):
    """Where no piece needs another: those that may go stay in the order of their counts, then of their ids."""
    smallest = _smallest(whole, counts)
    stays = set(cut_tokenizer(whole, counts, smallest).kept)
    needs_no_other = whole.backend_tokenizer.model.__class__.__name__ != "BPE"
    by_count = sorted(set(whole.get_vocab().values()) - stays, key=lambda i: (-counts[i], i))
    for more in (1, 57):
        kept = cut_tokenizer(whole, counts, smallest + more).kept
        assert len(kept) == smallest + more and kept == sorted(kept) and stays <= set(kept)
        if needs_no_other:
            assert set(kept) - stays == set(by_count[:more])
        else:  # each is there, or brings along more parts than there was room for
            assert sum(counts[i] for i in set(kept) - stays) > 0


def _smallest(whole: PreTrainedTokenizerBase, counts: np.ndarray) -> int:
    with pytest.raises(UserError, match=r"student.vocab: found 3, allowed for this teacher and text are \d+") as caught:
        cut_tokenizer(whole, counts, 3)
    return int(re.search(r"text are (\d+)", str(caught.value))[1])


def test_ids_that_a_model_names_stay(whole, counts):
    unused = [i for i in whole.get_vocab().values() if counts[i] == 0][:3]
    kept = cut_tokenizer(whole, counts, _smallest(whole, counts) + 3, unused).kept
    assert set(unused) <= set(kept)


def test_a_size_that_cannot_be_is_refused(whole, counts):
    with pytest.raises(UserError, match=rf"found 999999, allowed for .* \.\. {len(whole)} \(all\)"):
        cut_tokenizer(whole, counts, 999_999)
    with pytest.raises(UserError, match="student.vocab: found 4, allowed for"):
        check_cuttable(whole, 4)
    check_cuttable(whole, "corpus")


STOCK = {
    "XLMRobertaTokenizer": "unigram",
    "CamembertTokenizer": "unigram",
    "RobertaTokenizer": "byte_bpe",
    "Qwen2Tokenizer": "byte_bpe",
    "LlamaTokenizer": "fallback_bpe",
    "GemmaTokenizer": "fallback_bpe",
}
"""Class of the library, which builds normalizer and templates of its own -> what its pieces are like here."""


@pytest.fixture(scope="module")
def vocabularies(lines, cache_dir) -> dict[str, dict]:
    kinds = sorted(set(STOCK.values()))
    backends = {kind: _make(kind, lines[::10], cache_dir).backend_tokenizer for kind in kinds}
    return {kind: json.loads(backend.to_str())["model"] for kind, backend in backends.items()}


@pytest.mark.parametrize("name", STOCK)
def test_classes_of_the_library(vocabularies, lines, tmp_path, name):
    model, text = vocabularies[STOCK[name]], lines[::10]
    pieces = {key: model[key] for key in ("vocab", "merges") if key in model}
    pieces = {key: value if isinstance(value, dict) else list(map(tuple, value)) for key, value in pieces.items()}
    special = {token: SPECIAL[token] for token in ("bos_token", "eos_token", "pad_token", "unk_token")}
    getattr(transformers, name)(**pieces, **special).save_pretrained(tmp_path / "whole")
    whole = AutoTokenizer.from_pretrained(tmp_path / "whole")
    before = encode(whole, text)
    smaller = cut_tokenizer(whole, counts_of(whole, before), len(whole) // 2)
    written = smaller.write(tmp_path / "smaller")
    assert type(written) is type(whole) and type(whole).__name__ == name and len(written) == len(whole) // 2
    ids, wanted = encode(written, text), expected(smaller, before)
    assert all(want in (None, now) for want, now in zip(wanted, ids, strict=True))
    assert 50 < wanted.count(None) < len(text) - 50
    assert all(getattr(written, token) == getattr(whole, token) for token in special)


def test_pieces_are_closed_under_merges(lines, cache_dir):
    """A byte-level vocabulary of one long piece, all bytes, and what the long piece is merged from."""
    whole = _make("byte_bpe", lines, cache_dir)
    counts = np.zeros(len(whole), dtype=np.int64)
    piece = max(whole.get_vocab(), key=lambda piece: (len(piece), piece))
    counts[whole.get_vocab()[piece]] = 1
    smaller = cut_tokenizer(whole, counts, "corpus")
    model = smaller.content["model"]
    text = whole.backend_tokenizer.decoder.decode([piece])
    assert Tokenizer.from_str(json.dumps(smaller.content)).encode(text, add_special_tokens=False).tokens == [piece]
    # As many merges as it takes to make one of so many bytes, each other one of which is a part that is used twice.
    assert 0 < len(model["merges"]) <= len(piece) - 1
    assert len(smaller.kept) == 256 + len(SPECIAL) + len({a + b for a, b in model["merges"]})


def test_smollm2s_tokenizer(lines, cache_dir, tmp_path):
    """The real one, of 49,152 pieces, where it has been fetched before."""
    folders = sorted((cache_dir / "assets").glob("smollm2-135m-*"))
    if not folders:
        pytest.skip("embedded:smollm2-135m has not been fetched")
    whole = AutoTokenizer.from_pretrained(folders[0])
    before = encode(whole, lines)
    smaller = cut_tokenizer(whole, counts_of(whole, before), 6000)
    written = smaller.write(tmp_path)
    ids, wanted = encode(written, lines), expected(smaller, before)
    assert len(written) == 6000 and all(want in (None, now) for want, now in zip(wanted, ids, strict=True))
    assert 1000 < wanted.count(None) < NUM_LINES - 1000
    assert all(written.decode(now) == line for now, line in zip(ids[::10], lines[::10], strict=True))
    chat = [{"role": "user", "content": "hello"}]
    assert written.apply_chat_template(chat, tokenize=False) == whole.apply_chat_template(chat, tokenize=False)


def test_tokenizers_that_cannot_be_cut_are_refused(lines):
    suffixed = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    suffixed.pre_tokenizer = pre_tokenizers.Whitespace()
    suffixed.train_from_iterator(lines[:50], trainers.BpeTrainer(special_tokens=["<unk>"], end_of_word_suffix="</w>"))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    for built, what in ((suffixed, "BPE with end_of_word_suffix"), (words, "WordLevel")):
        with pytest.raises(UserError, match=rf"is a {what} model, allowed are WordPiece, Unigram, and BPE") as caught:
            check_cuttable(PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>"), "corpus")
        assert "\n" not in str(caught.value)


def test_pieces_are_counted_over_all_blocks(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 40, (70_000, 3), dtype=np.uint16)
    np.save(tmp_path / "train.npy", blocks)
    counts = piece_counts(Rows(tmp_path / "train.npy"), 50)
    assert counts.tolist() == [int((blocks == number).sum()) for number in range(50)]
