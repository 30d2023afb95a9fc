"""What student.vocab makes of a teacher in the cache: of a decoder, an embedder, a model with shifted positions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.small import small_model
from support.small_job import VOCABULARY, make_materials
from support.tiny_decoder import make_tokenizer, write_text
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizerFast,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from homodistil.config.command_line import parse
from homodistil.config.schema import RunConfig, StudentConfig
from homodistil.distill.teacher import load_config
from homodistil.engine.build import init_ranks, resolve_engine_config
from homodistil.errors import UserError
from homodistil.planning.cluster import find_cluster
from homodistil.planning.plan import make_plan
from homodistil.training.inputs import RunInputs, prepare_inputs
from homodistil.training.resolve import resolve_run
from homodistil.training.run_folder import check_run_folder
from homodistil.training.run_summary import run_summary
from homodistil.training.teacher_checks import check_plannable
from homodistil.training.teacher_correction import corrected
from homodistil.training.teacher_facts import teacher_facts
from homodistil.training.vocabulary_size import planned_config

TEXT = "the cat sees a dog and then the old house"


def config_of(folder: Path, vocab: object, *overrides: str) -> RunConfig:
    fields = {
        "teacher.name": folder / "teacher",
        "data.sources": f"[{folder / 'text'}]",
        "data.cache_dir": folder / "cache",
        "data.seq_len": 16,
        "student.preset": "teacher",
        "student.vocab": vocab,
        "train.global_batch_size": 8,
        "pruning.schedule": "none",
    }
    return parse([*(f"{name}={value}" for name, value in fields.items()), *overrides])


def inputs_of(folder: Path, vocab: object, *overrides: str) -> RunInputs:
    return prepare_inputs(config_of(folder, vocab, *overrides), torch.device("cpu"))


def kept_of(folder: Path, smaller: RunInputs) -> list[int]:
    """Ids in the whole tokenizer of the pieces that stay, in the order of their new ids."""
    old, new = AutoTokenizer.from_pretrained(folder / "teacher").get_vocab(), smaller.tokenizer.get_vocab()
    return [old[piece] for piece in sorted(new, key=new.get)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """A Llama of bytes and merges in bf16, with more rows than pieces and an end token that the config names."""
    folder = tmp_path_factory.mktemp("decoder")
    more_text = write_text(write_text(folder / "text").with_name("more"))
    (more_text / "other.txt").write_text("zebras and umbrellas " * 900)
    tokenizer = make_tokenizer(more_text, 320)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=336, bos_token_id=0, eos_token_id=[0, 330], dtype="bfloat16", **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


@pytest.mark.parametrize("vocab", ["corpus", 290])
def test_a_decoder(decoder, vocab):
    smaller = inputs_of(decoder, vocab)
    whole_tokenizer = AutoTokenizer.from_pretrained(decoder / "teacher")
    kept = kept_of(decoder, smaller)
    assert len(kept) == (290 if vocab == 290 else smaller.vocabulary.pieces) < 320 < smaller.vocabulary.pieces_before
    stock, whole = (AutoModelForCausalLM.from_pretrained(path) for path in (smaller.teacher, decoder / "teacher"))
    assert (stock.dtype, stock.config.vocab_size, stock.config.eos_token_id) == (torch.bfloat16, len(kept), [0])
    assert stock.generation_config.eos_token_id == [0]
    ids = smaller.tokenizer(TEXT)["input_ids"]
    assert vocab == 290 or [kept[i] for i in ids] == whole_tokenizer(TEXT)["input_ids"]
    assert smaller.tokenizer.decode(ids) == TEXT
    with torch.no_grad():
        expected = whole(torch.tensor([[kept[i] for i in ids]])).logits[..., kept]
        torch.testing.assert_close(stock(torch.tensor([ids])).logits, expected, rtol=2e-2, atol=2e-2)
    assert sum(p.numel() for p in stock.parameters()) == smaller.vocabulary.parameters
    assert sum(p.numel() for p in whole.parameters()) == smaller.vocabulary.parameters_before
    blocks = inputs_of(decoder, "all").corpus.train
    words = blocks[range(len(blocks))].ravel()
    words = words[words != whole_tokenizer.eos_token_id]
    assert smaller.vocabulary.share_of_tokens == pytest.approx(np.isin(words, kept).mean())
    # Its text is tokenised anew, and a second run finds both in the cache.
    assert int(smaller.corpus.train[[0]].max()) < len(kept)
    made = (Path(smaller.teacher) / "model.safetensors").stat().st_mtime_ns
    assert inputs_of(decoder, vocab).teacher == smaller.teacher
    assert (Path(smaller.teacher) / "model.safetensors").stat().st_mtime_ns == made


def test_all_pieces_are_the_teacher_itself(decoder):
    whole = inputs_of(decoder, "all")
    assert (whole.teacher, whole.vocabulary) == (str(decoder / "teacher"), None)
    assert whole.fingerprints.keys() == {"teacher", "tokenizer", "corpus"}
    smaller = inputs_of(decoder, 290)
    assert smaller.fingerprints.keys() == {"teacher", "tokenizer", "corpus", "counted corpus", "vocabulary"}
    assert smaller.fingerprints["counted corpus"] == whole.fingerprints["corpus"] != smaller.fingerprints["corpus"]
    assert all(smaller.fingerprints[name] == whole.fingerprints[name] for name in ("teacher", "tokenizer"))


def test_positions_that_start_behind_the_padding_stay_where_they_are(tmp_path):
    """RoBERTa's begin at pad_token_id + 1: no id up to it may change, be its piece used or not."""
    text = write_text(tmp_path / "text")
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "unused", "unused too", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    built.train([str(path) for path in sorted(text.glob("*.txt"))], trainer)
    content = json.loads(built.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if "unused" not in token["content"]]
    built = Tokenizer.from_str(json.dumps(content))
    built.post_processor = processors.RobertaProcessing(("</s>", 4), ("<s>", 0))
    names = dict(bos_token="<s>", cls_token="<s>", pad_token="<pad>", eos_token="</s>", sep_token="</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", mask_token="<mask>", **names)
    tokenizer.save_pretrained(tmp_path / "teacher")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 4, "max_position_embeddings": 40}
    torch.manual_seed(0)
    RobertaForMaskedLM(RobertaConfig(vocab_size=320, **sizes, **ids)).save_pretrained(tmp_path / "teacher")
    smaller = inputs_of(tmp_path, 280)
    kept = kept_of(tmp_path, smaller)
    assert kept[:5] == [0, 1, 2, 3, 4] and load_config(smaller.teacher).pad_token_id == 3
    stock, whole = (RobertaForMaskedLM.from_pretrained(path) for path in (smaller.teacher, tmp_path / "teacher"))
    tokens = smaller.tokenizer([TEXT, "the cat"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = whole(torch.tensor(kept)[tokens["input_ids"]], tokens["attention_mask"]).logits[..., kept]
        torch.testing.assert_close(stock(**tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The small job's teacher without its head, with words beside its letters."""
    folder = tmp_path_factory.mktemp("encoder")
    pieces = [*VOCABULARY, "the", "fox", "zebra", "umbrella", "quick"]
    make_materials(folder, vocab_size=len(pieces))
    small_model(vocab_size=len(pieces), max_position_embeddings=32).bert.save_pretrained(folder / "teacher")
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "teacher")
    return folder


def test_the_correction_comes_after_the_cut(encoder, tmp_path):
    """Of an encoder without a head: the cut leaves it without, the correction makes one for the pieces that stay."""
    config = config_of(encoder, 60, "teacher.correction_steps=2", "train.micro_batch_size=8", "data.task=mlm")
    smaller = prepare_inputs(config, init_ranks())
    assert load_config(smaller.teacher).architectures == ["BertModel"]
    engine_config = resolve_engine_config({"zero_optimization": {"stage": 2}}, config.train, 1)
    made, facts = corrected(config, engine_config, smaller, tmp_path)
    assert made.teacher != smaller.teacher and facts["steps"] == 2
    corrected_config = load_config(made.teacher)
    assert (corrected_config.architectures, corrected_config.vocab_size) == (["BertForMaskedLM"], 60)
    assert len(AutoTokenizer.from_pretrained(made.teacher)) == 60


def test_an_embedder_keeps_its_modules(encoder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    torch.manual_seed(0)
    modules = [Transformer(str(encoder / "teacher")), Pooling(24, "cls"), Dense(24, 9), Normalize()]
    options = {"prompts": {"query": "fox "}, "default_prompt_name": "query", "device": "cpu"}
    whole = sentence_transformers.SentenceTransformer(modules=modules, **options)
    whole.save(str(tmp_path / "teacher"), create_model_card=False)
    (tmp_path / "text").symlink_to(encoder / "text")
    smaller = inputs_of(tmp_path, "corpus", "data.texts=passage")
    assert smaller.vocabulary.pieces == len(smaller.tokenizer) == len(VOCABULARY) + 3
    assert smaller.sentence_modules.root == smaller.teacher and smaller.sentence_modules.default_prompt_name == "query"
    cut = sentence_transformers.SentenceTransformer(smaller.teacher, device="cpu")
    texts = ["the quick fox", "five boxing wizards"]
    assert [type(module).__name__ for module in cut] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert cut.prompts == whole.prompts and (cut.encode(texts) == whole.encode(texts)).all()


def test_what_is_known_before_text_is_counted(decoder):
    """A number is planned with, `corpus` with the whole; a note says so, and a check refuses what cannot be."""
    whole = resolve_run(config_of(decoder, "all"))
    for vocab, pieces in ((290, 290), ("corpus", 336)):
        resolved = check_plannable(config_of(decoder, vocab))
        assert resolved.vocab_size == pieces == resolved.student.model.config.vocab_size
        assert resolved.vocabulary_note.startswith(f"student.vocab={vocab}: {pieces} pieces are assumed")
        assert resolved.teacher_parameters == whole.teacher_parameters - 2 * (336 - pieces) * 24
        assert teacher_facts(config_of(decoder, vocab)).resolved.vocab_size == pieces
    planned = resolve_run(config_of(decoder, 290, "train.micro_batch_size=8"))
    plan = make_plan(planned, {"zero_optimization": {"stage": 2}}, find_cluster("H100", 1))
    assert f"{whole.teacher_parameters - 2 * 46 * 24:,} (teacher)" in run_summary(planned)["parameters"]
    assert plan.notes == [planned.vocabulary_note]
    assert whole.vocabulary_note == ""
    for vocab, said in ((337, "found 337, the teacher has 336 pieces"), (256, r"found 256, allowed .* are 257 ")):
        for look in (check_plannable, teacher_facts):
            with pytest.raises(UserError, match=f"^student.vocab: {said}"):
                look(config_of(decoder, vocab))


def test_a_size_of_the_student_is_one_of_what_is_left_of_the_teacher(decoder):
    config = config_of(decoder, 290)
    config.student.preset, config.student.size = "custom", 0.5
    config.pruning.schedule = "cubic"
    resolved = resolve_run(config)
    student = run_summary(resolved)["parameters"].split("-> ")[1].split(" ")[0]
    assert int(student.replace(",", "")) == pytest.approx(resolved.teacher_parameters / 2, rel=0.15)


def test_values_of_the_field(tmp_path):
    (tmp_path / "c.yaml").write_text("student: {vocab: 8192}\n")
    assert parse([f"--config={tmp_path / 'c.yaml'}"]).student.vocab == parse(["student.vocab=8192"]).student.vocab
    assert (StudentConfig().vocab, StudentConfig(vocab=3).vocab) == ("all", "3")
    for value in ("0", "-3", "1.5", "some", "9" * 5000):
        with pytest.raises(UserError, match="student.vocab: found .*"):
            parse([f"student.vocab={value}"])
    assert planned_config(StudentConfig(), config := LlamaConfig()) is config


def test_a_run_of_before_the_field_had_all_pieces(decoder, tmp_path):
    config = config_of(decoder, 290, f"run.dir={tmp_path}", "run.resume=auto")
    content = config.to_dict()
    del content["student"]["vocab"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "ds_config.json").write_text("{}")
    with pytest.raises(UserError, match="student.vocab: the run in .* has all, this config 290"):
        check_run_folder(config)
