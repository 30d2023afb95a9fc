"""Writes the graph of a model: torch -> ONNX, ONNX -> int8 ONNX, ONNX -> OpenVINO."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from homodistil.errors import UserError
from homodistil.export.formats.exportable import EXAMPLE_SHAPE, Exportable
from homodistil.models.checkpoint_files import first_line

OPSET = 20
"""The first ONNX opset that has GELU as one operator."""
_PROTOBUF_BYTES = 1_900_000_000
"""Larger graphs keep their weights in a second file, because protobuf ends at 2 GB."""


def write_onnx(model: Exportable, path: Path) -> None:
    """Trace the model (torch.export) and write its ONNX graph, with any batch size and any length.

    Raises:
        UserError: torch cannot export this architecture.
    """
    axes = {0: "batch", 1: "tokens"}
    with _quiet(), _plain_attention(model):
        try:
            program = torch.onnx.export(
                model,
                tuple(model.batch(*EXAMPLE_SHAPE).values()),
                input_names=list(model.input_names),
                output_names=[model.output_name],
                dynamic_shapes=(tuple(axes for _ in model.input_names),),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # torch.export, its decompositions and the ONNX translation have types of their own
            reason = first_line(error.__cause__ or error)
            raise UserError(
                f"--format: torch cannot export {type(model.model).__name__} to ONNX ({reason}); docs/export.md lists "
                f"the architectures that are tested"
            ) from None
        _forget_sources(program.model)
        program.save(path, external_data=4 * model.num_parameters() > _PROTOBUF_BYTES)


@contextlib.contextmanager
def _plain_attention(model: Exportable) -> Iterator[None]:
    """Attention as matrix products and a softmax: torch's fused one is translated with a branch for rows of NaN."""
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)


def _forget_sources(graph) -> None:
    """Remove what the exporter notes of every node: stack traces, with folders of this machine."""
    for node in graph.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()


def write_int8(fp32: Path, path: Path) -> None:
    """Quantise a graph dynamically: weights once, activations of each batch as they come.

    Weights are signed and symmetric with a scale for each output channel, activations unsigned with a zero point: the
    pair that VPDPBUSD (AVX-512 VNNI) multiplies and adds up in 32 bits. Older CPUs add pairs of such products in 16
    bits, which saturates; with `reduce_range` (7 bits) they would not, but lose a bit here.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            fp32,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=False,
            use_external_data_format=fp32.with_name(f"{fp32.name}.data").exists(),
        )


def write_openvino(fp32: Path, path: Path) -> None:
    """OpenVINO's form of an ONNX graph, in fp32: `path` (.xml) and the weights beside it (.bin)."""
    import openvino

    openvino.save_model(openvino.Core().read_model(fp32), path, compress_to_fp16=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings on how the libraries call each other, which nobody can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
