"""Reads the labels of some documents of every source, to find those on which the preparation would fail."""

from __future__ import annotations

from itertools import chain, islice

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.label_choice import label_rule
from homodistil.data.prepare.token_labels import AnyLabelRule
from homodistil.data.sources.labelled import read_labelled
from homodistil.data.sources.sources import Source, unhashed_sources
from homodistil.data.task import task_of
from homodistil.evaluation.token_labels import name_entities, seqeval_is_missing
from homodistil.preflight.findings import Findings
from homodistil.preflight.text import first_documents

SAMPLE_LABELS = 2000
"""Of each source; only those are tokenised that the text's check reads, so more labels than texts are affordable."""


def check_labels(findings: Findings, config: DataConfig, teacher_config) -> None:
    """A row for each source with the labels that its first documents have; none where labels are not read.

    Args:
        teacher_config: Hugging Face configuration, which says what labels there are.
    """
    rule = findings.attempt("labels", lambda: label_rule(config, teacher_config))
    if rule is None:
        return
    for source in findings.attempt("labels", lambda: unhashed_sources(config, config.sources)) or ():
        measured = findings.attempt("labels", lambda source=source: _measure(source, rule))
        if measured is not None:
            findings.note("labels", f"{source.name}: {measured}")
    if task_of(config).has_token_labels and name_entities(teacher_config.id2label.values()) and seqeval_is_missing():
        findings.note(
            "labels", "the result table will have no entity F1, as seqeval is not installed: pip install seqeval"
        )


def _measure(source: Source, rule: AnyLabelRule) -> str:
    """How many of the first documents have a label; each of them is checked."""
    spans = first_documents(source)
    share = max(1, SAMPLE_LABELS // len(spans))
    labels = chain.from_iterable(islice(read_labelled(source, span), share) for span in spans)
    have_one = [rule.has_label(label) for _, label in labels]
    return f"{rule.column!r} of {len(have_one):,} texts read, {sum(have_one):,} with a label"
