"""What is read of sentence-transformers' folders, against sentence-transformers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.small import small_model
from transformers import BertTokenizerFast

from homodistil.errors import UserError
from homodistil.models.sentence_head import SentenceHead, load_sentence_head, pooled
from homodistil.models.sentence_modules import SentenceModules, read_sentence_modules, sentence_root, transformer_folder

sentence_transformers = pytest.importorskip("sentence_transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
TEXTS = ["a b c", "d", "x y z w v u t", "k l"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A small BERT without modules.json."""
    folder = tmp_path_factory.mktemp("plain")
    small_model().bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def saved(plain: Path, folder: Path, pooling: str = "mean", *more) -> Path:
    """A folder as sentence-transformers writes it, with `more` modules behind the pooling."""
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    modules = [Transformer(str(plain)), Pooling(24, pooling), *more]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", prompts={"query": "q: "})
    model.max_seq_length = 12
    model.save(str(folder), create_model_card=False)
    return folder


def ours(folder: Path) -> torch.Tensor:
    """Vectors of TEXTS by our head behind the stock backbone."""
    modules = read_sentence_modules(str(folder), "auto", "teacher.name")
    tokens = BertTokenizerFast.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    states = small_model().bert.eval()(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
    return load_sentence_head(modules, "teacher.name")(states, tokens["attention_mask"])


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("has_dense", [False, True])
def test_vectors_are_those_of_sentence_transformers(plain, tmp_path, pooling, has_dense):
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.base.modules.normalize import Normalize

    torch.manual_seed(0)
    dense = Dense(24, 7), Dense(7, 7, bias=False, activation_function=torch.nn.ReLU(), use_residual=True)
    folder = saved(plain, tmp_path / "st", pooling, *(dense if has_dense else (Normalize(),)))
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(ours(folder), theirs, rtol=1e-5, atol=1e-6)
    modules = read_sentence_modules(str(folder), "auto", "teacher.name")
    assert (modules.pooling, modules.normalises) == (pooling.removesuffix("token"), not has_dense)
    assert len(modules.dense) == 2 * has_dense and modules.prompts["query"] == "q: "
    assert read_sentence_modules(str(folder), "cls", "teacher.name").pooling == "cls"


def test_a_plain_model_is_read_as_sentence_transformers_reads_it(plain):
    assert sentence_root(str(plain)) is None
    modules = read_sentence_modules(str(plain), "auto", "teacher.name")
    assert modules == SentenceModules(pooling="mean", normalises=True, root=str(plain))
    theirs = sentence_transformers.SentenceTransformer(str(plain), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(ours(plain), torch.nn.functional.normalize(theirs), rtol=1e-5, atol=1e-6)


def test_a_cross_encoder_has_no_modules_of_an_embedder(tmp_path):
    """Though sentence-transformers saves it with a modules.json; damaged settings are left to who reads all of them."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "plain")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "plain")
    saved_one = tmp_path / "saved"
    sentence_transformers.CrossEncoder(str(tmp_path / "plain"), device="cpu").save_pretrained(str(saved_one))
    assert (saved_one / "modules.json").is_file() and sentence_root(str(saved_one)) is None
    settings = saved_one / "config_sentence_transformers.json"
    settings.write_text(settings.read_text().replace("CrossEncoder", "SentenceTransformer"))
    assert sentence_root(str(saved_one)) == str(saved_one)
    settings.write_text("{")
    assert sentence_root(str(saved_one)) == str(saved_one)


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
@pytest.mark.parametrize("on_the_left", [False, True])
def test_pooling_is_its_definition(mode, on_the_left):
    torch.manual_seed(0)
    hidden, lengths = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True), [5, 1, 3]
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    mask = mask.flip(1) if on_the_left else mask
    rows = [hidden[b][mask[b].bool()] for b in range(3)]
    expected = torch.stack([{"mean": row.mean(0), "cls": row[0], "last": row[-1]}[mode] for row in rows])
    actual = pooled(hidden, mask, mode)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(3, 7, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((value * weights).sum(), hidden, retain_graph=True)[0] for value in (actual, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert pooled(hidden.detach().bfloat16(), mask, mode).dtype == torch.float32


def test_files_of_earlier_versions_and_a_transformer_in_a_subfolder(plain, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(plain, folder / "0_Transformer")
    entries = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(entries)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": false}')
    (folder / "1_Pooling").mkdir()
    before = {"word_embedding_dimension": 24, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(before))
    inside = transformer_folder(folder, "teacher.name")
    assert inside == folder / "0_Transformer" and transformer_folder(inside, "teacher.name") == inside
    for name in (folder, inside):
        modules = read_sentence_modules(str(name), "auto", "teacher.name")
        assert (modules.pooling, modules.normalises, modules.max_seq_length) == ("cls", True, 9)
        assert modules.root == str(folder)


def changed(plain: Path, tmp_path: Path, file: str, change) -> str:
    """The refusal of a folder in which `change` has been done to the content of `file`."""
    folder = saved(plain, tmp_path / "st")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(content)))
    with pytest.raises(UserError) as refused:
        read_sentence_modules(str(folder), "auto", "teacher.name")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("teacher.name")
    return str(refused.value)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("modules.json", lambda c: {}, "holds dict, expected a list"),
        ("modules.json", lambda c: c[:1], "has no Pooling"),
        ("modules.json", lambda c: [c[0], c[0]], "found module 'Transformer' as number 0"),
        ("modules.json", lambda c: [{"type": "a.WordEmbeddings"}], "found module 'WordEmbeddings' first"),
        ("1_Pooling/config.json", lambda c: {"pooling_mode": "max"}, "found pooling max, supported are mean, cls"),
        ("1_Pooling/config.json", lambda c: {"pooling_mode": ["cls", "mean"]}, "found pooling cls, mean"),
        ("1_Pooling/config.json", lambda c: {"pooling_mode_max_tokens": True}, "found pooling max_tokens"),
        ("1_Pooling/config.json", lambda c: c | {"include_prompt": False}, "include_prompt false"),
        ("sentence_bert_config.json", lambda c: c | {"do_lower_case": True}, "do_lower_case true"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(plain, tmp_path, file, change, said):
    assert said in changed(plain, tmp_path, file, change)


def test_weights_of_dense_have_to_be_there(plain, tmp_path):
    from sentence_transformers.base.modules.dense import Dense

    folder = saved(plain, tmp_path / "st", "mean", Dense(24, 7))
    modules = read_sentence_modules(str(folder), "auto", "teacher.name")
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(UserError, match="has pickled weights only"):
        load_sentence_head(modules, "teacher.name")
    assert isinstance(SentenceHead(SentenceModules()), SentenceHead)


def test_prompts_by_name_by_text_and_by_default():
    modules = SentenceModules(prompts={"query": "q: ", "": "e"}, default_prompt_name="query")
    assert [modules.prompt(wanted) for wanted in ("auto", "query", "other: ")] == ["q: ", "q: ", "other: "]
    assert SentenceModules().prompt("auto") == ""
