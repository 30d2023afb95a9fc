"""What a run with ground-truth labels is given, and what is refused before anything is read."""

from __future__ import annotations

import re

import pytest
from support.small import small_model
from transformers import BertConfig

from homodistil.config.command_line import parse
from homodistil.config.schema import RunConfig
from homodistil.data.prepare.label_choice import label_rule
from homodistil.errors import UserError
from homodistil.training.settle import settle

COLUMN = "data.label_column=label"


def teacher(kind: str = "SequenceClassification", num_labels: int = 3, **fields: object) -> BertConfig:
    config = small_model(max_position_embeddings=80).config
    config.architectures, config.num_labels = [f"BertFor{kind}"], num_labels
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def settled(*fields: str, of: BertConfig | None = None) -> RunConfig:
    config = parse(["teacher.name=my-teacher", "student.size=0.5", *fields])
    settle(config, of or teacher(), has_head=False)
    return config


def test_what_a_run_with_labels_is_given():
    config = settled(COLUMN)
    assert (config.loss.labels, config.loss.scores_kl, config.loss.scores_mse) == (1, 4, 0)
    assert (config.data.task, config.data.texts) == ("scores", "document")
    assert settled(COLUMN, "loss.labels=0").loss.labels == 0
    assert settled(COLUMN, "loss.labels=3", "data.texts=document").loss.labels == 3
    assert settled(COLUMN, "data.pair_columns=[a,b]", "data.texts=passage").loss.labels == 1
    alone = settled(COLUMN, "loss.scores_kl=0")
    assert (alone.loss.labels, alone.loss.scores_kl, alone.loss.scores_mse) == (1, 0, 0)
    assert settled().loss.labels == 0 and settled().data.texts == "passage"


def test_the_teacher_says_what_labels_are():
    data = settled(COLUMN).data
    rule = label_rule(data, teacher())
    assert (rule.problem_type, rule.names, rule.width) == (
        "single_label_classification",
        ("LABEL_0", "LABEL_1", "LABEL_2"),
        1,
    )
    assert label_rule(data, teacher(num_labels=1)).problem_type == "regression"
    several = label_rule(data, teacher(problem_type="multi_label_classification"))
    assert several.width == 3 and label_rule(settled().data, teacher()) is None
    odd = teacher()
    odd.__dict__["problem_type"] = "odd"
    with pytest.raises(UserError, match="config.json has problem_type 'odd', allowed with data.label_column are"):
        label_rule(data, odd)


def test_labels_of_a_token_classifier_are_those_of_words():
    of = teacher("TokenClassification")
    config = settled(COLUMN, "data.text_column=tokens", of=of)
    assert (config.data.task, config.data.texts, config.loss.labels) == ("token_scores", "document", 1)
    rule = label_rule(config.data, of)
    assert (rule.words.names, rule.width) == (("LABEL_0", "LABEL_1", "LABEL_2"), config.data.seq_len)
    scores = teacher("TokenClassification", num_labels=1)
    with pytest.raises(
        UserError, match=r"found 'label', but the 1 label\(s\) of the teacher, a token classifier, are values"
    ):
        label_rule(settled(COLUMN, "data.text_column=tokens", of=scores).data, scores)


@pytest.mark.parametrize(
    ("fields", "of", "said"),
    [
        (("loss.labels=1",), teacher(), "loss.labels: found 1, allowed without data.label_column is 0"),
        ((COLUMN, "data.task=mlm"), teacher(), "data.label_column: found label, but data.task=mlm has no head of"),
        (("data.label_column=text",), teacher(), "data.label_column: found 'text', which is a column of texts"),
        (("data.label_column=b", "data.pair_columns=[a,b]"), teacher(), "data.label_column: found 'b', which is a"),
        ((COLUMN, "data.texts=sentence"), teacher("TokenClassification"), "data.texts: found sentence, allowed with"),
        ((COLUMN,), teacher("MaskedLM"), "data.label_column: found 'label', but my-teacher is not used as a"),
        ((COLUMN, "loss.mlm=1"), teacher(), "data.label_column: found 'label', but my-teacher is not used as"),
        ((COLUMN, "data.texts=passage"), teacher(), "data.texts: found passage, allowed with data.label_column is doc"),
        ((COLUMN, "loss.labels=-1"), teacher(), "loss.labels: found -1"),
        ((COLUMN, "loss.labels=0", "loss.scores_kl=0"), teacher(), "so that nothing trains the head of labels"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line(fields, of, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        settled(*fields, of=of)
    assert "\n" not in str(caught.value)
