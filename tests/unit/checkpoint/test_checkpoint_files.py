"""What checkpoints are made of: files, shards that are read by slices, nested state, random states. No engine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from homodistil.checkpoint.files import WriteError, join_tensors, split_tensors, write_tensors
from homodistil.checkpoint.random_state import restore_random_state
from homodistil.checkpoint.reader import StateReader, key_of
from homodistil.errors import UserError


def test_the_operating_systems_reason_is_passed_on():
    with pytest.raises(WriteError, match=f"/dev/full: {os.strerror(errno.ENOSPC)}"):
        write_tensors(Path("/dev/full"), {"a": torch.zeros(100_000)})


def test_files_are_real_safetensors(tmp_path):
    tensors = {
        "a/b": torch.rand(3, 5),
        "bf16": torch.rand(7).bfloat16(),
        "half": torch.rand(1).half(),
        "index": torch.arange(3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0),
        "scalar": torch.tensor(1.5),
        "columns": torch.rand(4, 6)[:, ::2],
    }
    record = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert record == (len(content), hashlib.sha256(content).hexdigest())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_the_reader_finds_any_stretch_in_any_shards(tmp_path):
    generator = random.Random(1)
    whole = {("weight", "w"): torch.rand(101), ("exp_avg", "w"): torch.rand(101), ("weight", "v"): torch.rand(3)}
    shards: list[dict] = [{}, {}, {}]
    for (kind, name), tensor in whole.items():
        cuts = sorted({0, len(tensor), *(generator.randrange(len(tensor)) for _ in range(6))})
        for start, stop in zip(cuts, cuts[1:], strict=False):
            generator.choice(shards)[key_of(kind, name, start)] = tensor[start:stop]
    for i, shard in enumerate(shards):
        write_tensors(tmp_path / f"{i}", shard)
    with StateReader(tmp_path, ["0", "1", "2"]) as reader:
        assert reader.state_names == ["exp_avg"]
        for (kind, name), tensor in whole.items():
            for _ in range(50):
                start, stop = sorted(generator.randrange(len(tensor) + 1) for _ in range(2))
                assert torch.equal(reader(kind, name, start, stop), tensor[start:stop])
        assert torch.equal(reader("exp_avg", "v", 1, 3), torch.zeros(2))  # never had a gradient
        with pytest.raises(UserError, match=r"weight v in \[1, 4\) are in no shard"):
            reader("weight", "v", 1, 4)
        reader.check_model({"w": 101, "v": 3})
        with pytest.raises(UserError, match="holds 3 elements of v, this model has 4"):
            reader.check_model({"w": 101, "v": 4})


def test_nested_state_is_split_and_joined():
    scores, kept = torch.rand(4, 6), torch.arange(3)
    state = {"step": 3, "pruner": {"average": {"layer.0.qk_dim": scores}, "empty": {}}, "kept": kept, "none": None}
    plain, tensors = split_tensors(state)
    assert json.loads(json.dumps(plain)) == {"step": 3, "pruner": {"average": {}, "empty": {}}, "none": None}
    assert tensors == {"pruner/average/layer.0.qk_dim": scores, "kept": kept}
    joined = join_tensors(json.loads(json.dumps(plain)), tensors)
    assert joined["pruner"] == {"average": {"layer.0.qk_dim": scores}, "empty": {}} and joined["kept"] is kept


def test_a_rank_that_did_not_exist_gets_a_random_state_of_its_own(tmp_path):
    def draws(seed: int, rank: int, step: int) -> list[float]:
        restore_random_state(tmp_path / "none", seed, rank, step)
        return torch.rand(4).tolist()

    before = torch.get_rng_state()
    try:
        assert draws(0, 1, 5) == draws(0, 1, 5)
        others = [draws(0, 1, 5), draws(0, 2, 5), draws(0, 1, 6), draws(1, 1, 5)]
        assert len({tuple(other) for other in others}) == 4
    finally:
        torch.set_rng_state(before)
