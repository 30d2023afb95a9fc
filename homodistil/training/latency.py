"""How fast checkpoints are on this CPU as torch models, ONNX graphs and int8 ONNX graphs, measured in turns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from homodistil.errors import UserError
from homodistil.evaluation import progress
from homodistil.export.formats.agreement import agreement
from homodistil.export.formats.exportable import Exportable, random_batch
from homodistil.export.formats.layout import FORMATS, Limits
from homodistil.export.formats.runners import Runner, onnx_runner, output_name, torch_runner
from homodistil.export.formats.write import files_of, write_formats
from homodistil.export.inference_speed import BATCH_SIZE, interleaved_medians_s
from homodistil.metrics.result_table import aligned, cell
from homodistil.models.weights import has_weights
from homodistil.training.latency_conditions import Conditions
from homodistil.training.stock_checkpoint import StockCheckpoint

GRAPHS = ("onnx", "onnx-int8")
"""Formats that are timed beside torch."""


class Timed(NamedTuple):
    """One checkpoint in one format. None: not known."""

    checkpoint: str
    format: str
    """"torch", or one of `GRAPHS`."""
    output: str
    """"last_hidden_state" or "logits"."""
    parameters: int
    bytes: int | None
    """Of the files with the weights; of a hub name's torch weights not known."""
    cosine: float | None
    """Mean cosine of the outputs with torch's, on random tokens."""
    ms_per_sentence: float
    """One sentence at a time."""
    sentences_per_s: float
    """In batches of `BATCH_SIZE`."""


class _Subject(NamedTuple):
    """What is timed: the first fields of `Timed`, and how it is run."""

    facts: tuple
    run: Runner
    vocab_size: int


def measure(checkpoints: Sequence[StockCheckpoint], work: Path, conditions: Conditions) -> list[Timed]:
    """Time all of `checkpoints`, each in torch fp32, ONNX and int8 ONNX, as far as they can be had.

    Of a checkpoint with weights the backbone is timed. ONNX graphs that lie in its folder are used if they put out
    last_hidden_state, others are made in `work`. Of a folder without weights, its graphs are timed as they are.

    Args:
        work: an empty folder.
        conditions: no sentence is padded.

    Raises:
        UserError: a checkpoint cannot be loaded, or has neither weights nor a graph.
    """
    subjects: list[_Subject] = []
    with _torch_threads(conditions.threads):
        for number, checkpoint in enumerate(checkpoints):
            with progress.doing(f"loading {checkpoint.name}"):
                subjects += _subjects(checkpoint, work / str(number), conditions.threads)
        passes = [_pass(subject, size, conditions.tokens) for subject in subjects for size in (1, BATCH_SIZE)]
        with progress.doing(f"timing {len(subjects)} models in {conditions.rounds} rounds"):
            seconds = interleaved_medians_s(passes, conditions.rounds)
    pairs = zip(subjects, seconds[::2], seconds[1::2], strict=True)
    return [Timed(*subject.facts, one * 1e3, BATCH_SIZE / many) for subject, one, many in pairs]


@contextlib.contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pass(subject: _Subject, num_sentences: int, num_tokens: int) -> functools.partial:
    batch = random_batch(num_sentences, num_tokens, subject.vocab_size, padded=False)
    return functools.partial(subject.run, {name: tensor.numpy() for name, tensor in batch.items()})


def _subjects(checkpoint: StockCheckpoint, work: Path, num_threads: int) -> Iterator[_Subject]:
    folder = Path(checkpoint.place) if checkpoint.folder is not None else None
    if folder is not None and not has_weights(folder):
        yield from _bare_graphs(checkpoint, folder, num_threads)
        return
    model = checkpoint.load(with_head=False)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder is not None else None
    facts = (checkpoint.name, "torch", model.output_name, model.num_parameters(), num_bytes, 1.0)
    yield _Subject(facts, torch_runner(model), model.vocab_size)
    for name, root in _graphs(model, folder, work).items():
        run = onnx_runner(root / FORMATS[name].file, num_threads)
        facts = (checkpoint.name, name, model.output_name, model.num_parameters(), _size(name, root))
        yield _Subject((*facts, agreement(model, run).cosine), run, model.vocab_size)


def _graphs(model: Exportable, folder: Path | None, work: Path) -> dict[str, Path]:
    """Format -> the folder that its graph is below: the checkpoint's own where it fits, else `work`."""
    fitting = [
        name
        for name in GRAPHS
        if folder is not None
        and (graph := folder / FORMATS[name].file).is_file()
        and output_name(graph) == model.output_name
    ]
    missing = [name for name in GRAPHS if name not in fitting]
    try:
        if missing:
            write_formats(model, missing, work, Limits(min_cosine=-1))
    except UserError as error:  # torch alone is timed then
        progress.say(f"no ONNX of {model.model.config.model_type}: {error}")
        missing = []
    return {name: folder if name in fitting else work for name in GRAPHS if name in (*fitting, *missing)}


def _bare_graphs(checkpoint: StockCheckpoint, folder: Path, num_threads: int) -> Iterator[_Subject]:
    names = [name for name in GRAPHS if (folder / FORMATS[name].file).is_file()]
    if not names:
        wanted = " or ".join(FORMATS[name].file for name in GRAPHS)
        raise UserError(f"CHECKPOINT: {folder} has no *.safetensors and no {wanted}; give a checkpoint or an export")
    for name in names:
        graph = folder / FORMATS[name].file
        output = output_name(graph)
        parameters = checkpoint.num_parameters(with_head=output == "logits")
        facts = (checkpoint.name, name, output, parameters, _size(name, folder), None)
        yield _Subject(facts, onnx_runner(graph, num_threads), checkpoint.config.vocab_size)


def _size(name: str, root: Path) -> int:
    return sum(path.stat().st_size for path in files_of(name, root))


def check_tokens(checkpoints: Sequence[StockCheckpoint], num_tokens: int) -> None:
    """Raise `UserError` where sentences are longer than a model allows."""
    for checkpoint in checkpoints:
        if num_tokens > checkpoint.max_tokens:
            raise UserError(
                f"--tokens: found {num_tokens}, {checkpoint.name!r} allows {checkpoint.max_tokens}; lower --tokens"
            )


def as_text(rows: Sequence[Timed], conditions: Conditions) -> str:
    """The table under a line with the conditions."""
    headings = ["checkpoint", "format", "output", "parameters", "MB", "cosine", "ms/sentence", "sentences/s"]
    heading = ", ".join(f"{name} {value}" for name, value in conditions._asdict().items())
    return f"{heading}\n\n{aligned([headings, *(_cells(row) for row in rows)])}"


def _cells(row: Timed) -> list[str]:
    numbers = [(row.parameters, "{:,}"), (row.bytes and row.bytes / 1e6, "{:.1f}"), (row.cosine, "{:.4f}")]
    numbers += [(row.ms_per_sentence, "{:.2f}"), (row.sentences_per_s, "{:,.0f}")]
    return [row.checkpoint, row.format, row.output, *(cell(value, form) for value, form in numbers)]
