"""Task `none`: nothing masked, nothing predicted; and when a run takes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small import small_model
from transformers import BertTokenizerFast

from homodistil.config.command_line import parse
from homodistil.config.schema import DataConfig, RunConfig
from homodistil.data.task import TASKS, settle_task, task_of
from homodistil.distill.teacher import load_config
from homodistil.errors import UserError
from homodistil.training.resolve import resolve_run
from homodistil.training.teacher_checks import check_plannable, check_teacher

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
TARGET = ("student.hidden_size=12", "student.intermediate_size=20", "student.num_attention_heads=4", "data.seq_len=16")
TARGET += ("pruning.max_event_fraction=1.0",)


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A small BERT with its head."""
    folder = tmp_path / "teacher"
    small_model().save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


def without_head(teacher: Path) -> Path:
    tensors = load_file(teacher / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")}
    save_file(kept, teacher / "model.safetensors", {"format": "pt"})
    return teacher


def config_of(teacher: Path, *overrides: str) -> RunConfig:
    return parse([f"teacher.name={teacher}", *TARGET, *overrides])


def refusal(action) -> str:
    with pytest.raises(UserError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_batches_are_the_blocks_themselves(teacher):
    tokenizer = BertTokenizerFast.from_pretrained(teacher)
    task, data = TASKS["none"], DataConfig(task="none", seq_len=5)
    assert task_of(data) is task and task.target_rows(data) == 0 and not task.has_lm_head
    blocks = np.array([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    batch = task.batch_maker(tokenizer, data, seed=0)(blocks, np.arange(2), np.zeros(2, dtype=int))
    assert torch.equal(batch.input_ids, torch.from_numpy(blocks))
    assert batch.target_index.numel() == batch.target_ids.numel() == 0 and batch.counts.target_rows == 0
    assert batch.attention_mask.sum() == batch.counts.tokens == 8 and batch.counts.pairs == 25 + 9
    # A corpus prepared for masked language modelling is the same one.
    assert task.fingerprint(tokenizer) == TASKS["mlm"].fingerprint(tokenizer)
    assert task.frame(tokenizer) == TASKS["mlm"].frame(tokenizer) and "mask_token" not in task.special_tokens


@pytest.mark.parametrize(
    ("given", "family", "has_head", "settled"),
    [
        ("auto", "mlm", True, "mlm"),
        ("auto", "mlm", False, "none"),
        ("none", "mlm", True, "none"),
        ("mlm", "mlm", False, "mlm"),
        ("auto", "causal", False, "causal"),
    ],
)
def test_the_teacher_decides(given, family, has_head, settled):
    data = DataConfig(task=given)
    settle_task(data, family, "teacher", has_head)
    assert data.task == settled


def test_a_missing_head_makes_it_none_and_says_so(teacher):
    said, config = [], config_of(without_head(teacher))
    check_teacher(config, said.append)
    assert config.data.task == "none" and config.loss.mlm == config.loss.kl == 0
    assert config.pruning.compensation == "refit"
    (line,) = said
    assert "has no language-modelling head: task none" in line and "learns from hidden, attention, embedding" in line
    planned = config_of(teacher)
    check_plannable(planned)
    assert planned.to_dict() == config.to_dict()


def test_a_head_that_is_there_may_be_left_out(teacher):
    said, config = [], config_of(teacher, "data.task=none")
    check_teacher(config, said.append)
    assert "the language-modelling head of" in said[0] and config.loss.kl == 0
    resolved, with_head = resolve_run(config, load_config(str(teacher))), config_of(teacher, "data.task=mlm")
    check_teacher(with_head)
    assert not any(name.startswith("cls.") for name, _ in resolved.student.model.named_parameters())
    head = sum(p.numel() for name, p in small_model().named_parameters() if name.startswith("cls."))
    assert resolved.teacher_parameters == resolve_run(with_head, load_config(str(teacher))).teacher_parameters - head


def test_weights_of_words_that_the_user_gives_want_a_head(teacher):
    without_head(teacher)
    for field in ("loss.mlm=1", "loss.kl=4"):  # also at the defaults
        said = refusal(lambda field=field: check_teacher(config_of(teacher, field)))
        assert "has no MLM head" in said and "teacher.correction_steps" in said
    check_teacher(config := config_of(teacher, "loss.mlm=0", "loss.kl=0"))
    assert config.data.task == "none"
    check_teacher(config := config_of(teacher, "teacher.correction_steps=7"))
    assert config.data.task == "mlm" and config.loss.mlm == 1


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("loss.mlm=1", "loss.mlm: found 1, but data.task=none uses no language-modelling head"),
        ("loss={kl: 4}", "loss.kl: found 4"),
        ("teacher.correction_steps=5", "teacher.correction_steps: found 5"),
        ("pruning.importance=teacher_kl", "pruning.importance: found teacher_kl"),
    ],
)
def test_what_needs_words_is_refused(teacher, field, said):
    assert said in refusal(lambda: config_of(teacher, "data.task=none", field))
    if "importance" in field:  # found out later
        assert said in refusal(lambda: check_teacher(config_of(without_head(teacher), field)))


def test_a_basis_that_needs_words_is_refused(teacher):
    """Found out once the task is settled."""
    field = "pruning={compensation: full, basis: fisher}"
    for fields in ((field, "data.task=none"), (field,)):
        if len(fields) == 1:
            without_head(teacher)
        said = refusal(lambda fields=fields: check_teacher(config_of(teacher, *fields)))
        assert "pruning.basis: found fisher" in said and "allowed are auto, pca and learned" in said
    for basis in ("auto", "pca", "learned"):
        check_teacher(config_of(teacher, f"pruning={{compensation: full, basis: {basis}}}"))
    said = refusal(lambda: check_teacher(config_of(teacher, "pruning.basis=learned")))
    assert "pruning.basis: found learned, allowed with pruning.compensation=refit is auto" in said  # what auto was


def test_something_must_be_left_to_learn(teacher):
    nothing = ("loss.hidden=0", "loss.attention=0", "loss.embedding=0", "data.task=none")
    assert refusal(lambda: check_teacher(config_of(teacher, *nothing))).startswith("loss: every weight")
