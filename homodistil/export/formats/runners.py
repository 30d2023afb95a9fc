"""The same function of the same arrays in torch, onnxruntime and OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from homodistil.errors import UserError
from homodistil.export.formats.exportable import Exportable
from homodistil.models.checkpoint_files import first_line

Runner = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Arrays by the names of `exportable.Batch`, int64 (B, T) -> the output, float32. Those that it lacks are left out."""


def torch_runner(model: Exportable) -> Runner:
    """The model itself, on torch's threads."""

    @torch.inference_mode()
    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return model(*(torch.from_numpy(inputs[name]) for name in model.input_names)).numpy()

    return run


def onnx_runner(path: Path, num_threads: int = 1) -> Runner:
    """A graph in onnxruntime. Raises `UserError` where onnxruntime cannot read it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a type for every kind of damage
        raise _unreadable(path, error) from None
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: onnxruntime cannot read it ({first_line(error)}); write it again with homodistil export --force"
    )


def output_name(path: Path) -> str:
    """Of an ONNX graph: "last_hidden_state" or "logits". Raises `UserError` where it cannot be read."""
    import onnx

    try:
        return onnx.load(path, load_external_data=False).graph.output[0].name
    except Exception as error:  # protobuf's, or no output
        raise _unreadable(path, error) from None


def openvino_runner(path: Path, num_threads: int = 1) -> Runner:
    """A graph in OpenVINO, in fp32 also where the CPU computes bf16 faster."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": num_threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    names = [each.get_any_name() for each in compiled.inputs]
    return lambda inputs: compiled({name: inputs[name] for name in names})[0]


RUNNERS: dict[str, Callable[[Path, int], Runner]] = {
    "onnx": onnx_runner,
    "onnx-int8": onnx_runner,
    "openvino": openvino_runner,
}
"""Format -> what runs a file of it, on so many threads."""
