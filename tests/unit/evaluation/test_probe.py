"""Probes of frozen features against naive references, and on real packaged weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_decoder import make_decoder, make_tokenizer, write_text
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, LlamaConfig

from homodistil.data.sources.assets import teacher_folder
from homodistil.errors import UserError
from homodistil.evaluation.probe import command
from homodistil.evaluation.probe.examples import NUM_MOVIE, NUM_PAIRS, load_examples
from homodistil.evaluation.probe.features import BATCH_TOKENS, SentenceFeatures, _batches
from homodistil.evaluation.probe.scores import PENALTIES, centred, cosine, probe, ridge_accuracy, ridge_similarity

BERT_TINY = (0.669, 0.658, 0.700, 0.697)
"""Scores of the packaged BERT-tiny on 600 examples of each set, measured once."""
SENTENCES = ["the cat sees a dog.", "a bird", "the old house and then the small river finds a tree slowly.", "a bird"]


def _mean_states_one_by_one(folder, sentences) -> torch.Tensor:
    """The stock model on every sentence alone: nothing is padded."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack(
            [model(torch.tensor([tokenizer(s)["input_ids"]])).last_hidden_state[0].mean(0) for s in sentences]
        )


@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config], ids=["rotary", "absolute positions"])
def test_a_decoders_vectors_do_not_depend_on_padding(tmp_path, kind):
    tokenizer = make_tokenizer(write_text(tmp_path / "text"))
    tokenizer.padding_side = "left"  # as many decoders have it: absolute positions would be shifted
    make_decoder(kind, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    features = SentenceFeatures(str(tmp_path / "model"))
    assert features.tokenizer.pad_token_id == features.tokenizer.eos_token_id  # it has no pad token
    expected = _mean_states_one_by_one(tmp_path / "model", SENTENCES)
    # fp32, two layers: other batch sizes take other paths through the matrix products.
    np.testing.assert_allclose(features.encode(SENTENCES), expected, atol=2e-5)


def test_an_export_without_pooler_and_a_long_sentence(tmp_path, tokenizer):
    """A masked LM's checkpoint: its backbone alone is read, and text beyond max_length is left out."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    features = SentenceFeatures(str(tmp_path), max_length=128)
    assert features.max_length == 16 and features.num_parameters == sum(p.numel() for p in model.bert.parameters())
    vectors = features.encode([*SENTENCES, "house " * 40])
    np.testing.assert_allclose(vectors[:4], _mean_states_one_by_one(tmp_path, SENTENCES), atol=2e-5)
    np.testing.assert_allclose(vectors[4], features.encode(["house " * 14])[0], atol=2e-5)
    in_bf16 = SentenceFeatures(str(tmp_path), dtype="bfloat16").encode(SENTENCES)
    assert in_bf16.dtype == np.float32
    np.testing.assert_allclose(in_bf16, vectors[:4], atol=0.05)  # 8 bits of mantissa on states of about 1


def test_batches_hold_every_sentence_once_and_their_padding():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    batches = _batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert all(len(batch) * max(lengths[i] for i in batch) <= BATCH_TOKENS for batch in batches)
    assert _batches([2 * BATCH_TOKENS, 1]) == [[0], [1]]


def test_ridge_is_the_normal_equations_at_the_penalty_that_leaving_one_out_chooses():
    draw = np.random.default_rng(1)
    first, second, others = draw.normal(size=(3, 23, 4))
    labels = 3 * draw.normal(size=23) + np.abs(first - second).sum(1)  # noise enough for a penalty

    def pair(u, v):
        return np.concatenate([abs(u - v), u * v], 1)

    x = pair(first, second)
    mean, deviation = x.mean(0), x.std(0)
    x = (x - mean) / deviation

    def fit(x, y, penalty):
        centre = x.mean(0)
        inner = (x - centre).T @ (x - centre) + penalty * np.eye(x.shape[1])
        weights = np.linalg.solve(inner, (x - centre).T @ (y - y.mean()))
        return lambda z: (z - centre) @ weights + y.mean()

    def left_out_error(penalty):
        rows = [np.arange(23) != i for i in range(23)]
        return sum(float(fit(x[r], labels[r], penalty)(x[~r])[0] - labels[i]) ** 2 for i, r in enumerate(rows))

    best = min(PENALTIES, key=left_out_error)
    assert best not in (PENALTIES[0], PENALTIES[-1])
    expected = fit(x, labels, best)((pair(first, others) - mean) / deviation)
    np.testing.assert_allclose(ridge_similarity((first, second), labels, (first, others)), expected, atol=1e-9)


def test_cosine_and_what_all_sentences_share():
    first, second = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [3.0, 4.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine(first, second), [0.5**0.5, 1.0, 0.0])
    train = (np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(centred((first, second), train)[1], second - [2.0, 3.0])


def test_movie_accuracy_counts_dev_sentences():
    draw = np.random.default_rng(2)
    train = draw.normal(size=(50, 3))
    labels = (train[:, 0] > 0).astype(int).tolist()
    dev = np.array([[2.0, 0, 0], [-2.0, 0, 0], [3.0, 0, 0], [-3.0, 0, 0]])
    assert ridge_accuracy(train, labels, dev, [1, 0, 1, 1]) == 0.75


def test_the_examples_are_the_same_every_time_and_of_all_genres(cache_dir):
    examples, again = load_examples(cache_dir), load_examples(cache_dir)
    assert examples == again
    assert [len(split.labels) for split in examples] == [NUM_PAIRS, 1500, NUM_MOVIE, 1000]
    assert [len(split.labels) for split in load_examples(cache_dir, 10)] == [10] * 4
    # Captions come first in the file and are short; the sample has as many long sentences as the whole.
    lengths = [len(texts[0].split()) for texts in examples.pairs_train.texts]
    assert 9 < np.mean(lengths) < 12


def test_real_weights_score_as_measured_and_random_ones_do_not(cache_dir, tmp_path):
    """BERT-tiny from its package, and the same shape drawn at random."""
    examples, folder = load_examples(cache_dir, 600), teacher_folder("embedded:bert-tiny", cache_dir)
    real = probe(SentenceFeatures(str(folder)), examples)
    torch.manual_seed(0)
    random_model = AutoModel.from_config(AutoModel.from_pretrained(folder).config)
    random_model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    drawn = probe(SentenceFeatures(str(tmp_path)), examples)
    assert real == pytest.approx(BERT_TINY, abs=0.005)  # other versions of torch round otherwise
    assert all(score > other + 0.02 for score, other in zip(real, drawn, strict=True))


def test_the_command_prints_one_table_of_encoders_and_decoders(cache_dir, tmp_path, capsys):
    tokenizer = make_tokenizer(write_text(tmp_path / "text"))
    make_decoder(LlamaConfig, len(tokenizer)).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    command.main(["embedded:bert-tiny", str(tmp_path / "decoder"), "--limit=40", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Spearman on 40 pairs, accuracy on 40 sentences"
    heading, _, encoder, decoder = lines[3:]
    assert [column.strip() for column in heading.split("  ") if column.strip()] == list(command.HEADINGS)
    assert encoder.split()[:2] == ["embedded:bert-tiny", "4,369,408"]
    assert decoder.split()[0] == str(tmp_path / "decoder") and len(decoder.split()) == 7


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="--checkpoint: no folder '.*nothing'"):
        command.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="packaged are embedded:bert-tiny, .*did you mean 'embedded:bert-tiny'"):
        command.main(["embedded:bert-tyny"])
    with pytest.raises(UserError, match="--limit: found '3', allowed are whole numbers from 8"):
        command.main(["embedded:bert-tiny", "--limit=3"])
