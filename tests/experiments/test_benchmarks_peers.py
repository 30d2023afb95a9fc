"""benchmarks/peers: every peer computes the loss that the product computes, and the ratios are what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers import masks, measure, plain_loop, totals
from benchmarks.peers.processes import PeerError
from benchmarks.peers.workload import SIZES, TERMS, Task, prepare

ROOT = Path(__file__).resolve().parents[2]
TEXTBREWER = Path("~/.cache/homodistil/textbrewer").expanduser()
TINY = Task(**{**SIZES["tiny"].__dict__, "precision": "fp32"})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return prepare(TINY, tmp_path_factory.mktemp("peers"))


def test_masks_leave_the_gradients_of_the_narrow_model(files):
    masked, narrow = (
        masks.Peer(TINY, files, "fp32", {"rows": "all"}),
        plain_loop.Peer(TINY, files, "fp32", {}),
    )
    for peer in (masked, narrow):
        torch.stack(list(peer.losses(files.batches()[0]).values())).sum().backward()
    hidden, ffn = files.keep()["hidden"], files.keep()["layer.1.ffn"]

    def gradients(peer):
        bert = peer.student.bert
        words, layer = bert.embeddings.word_embeddings.weight.grad, bert.encoder.layer[1]
        return words, layer.intermediate.dense.weight.grad, layer.output.LayerNorm.weight.grad

    of_masked, of_narrow = gradients(masked), gradients(narrow)
    cut = (of_masked[0][:, hidden], of_masked[1][ffn][:, hidden], of_masked[2][hidden])
    for found, wanted, whole in zip(cut, of_narrow, of_masked, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert found.abs().sum() == pytest.approx(whole.abs().sum().item(), rel=1e-5)  # what is masked gets nothing


def test_masked_rows_only_are_the_same_loss(files):
    batch = files.batches()[1]
    found, wanted = (masks.Peer(TINY, files, "fp32", {"rows": rows}).losses(batch) for rows in ("masked", "all"))
    for name in TERMS:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=0)


def test_another_loss_is_refused():
    right = dict.fromkeys(TERMS, 1.0)

    def peer(label, terms):
        variant = SimpleNamespace(module="ours", label=label)
        return SimpleNamespace(variant=variant, ask=lambda _do: terms)

    place = measure.Place(TINY, files=None, threads=1)
    assert list(measure.same_loss([peer("a", right), peer("b", right)], place)) == ["a", "b"]
    with pytest.raises(PeerError, match="b: kl is 1.001"):
        measure.same_loss([peer("a", right), peer("b", right | {"kl": 1.001})], place)


def test_whole_schedule_by_hand():
    """4 of 10 steps at 100 (2 s a step, the other's 2), 6 at 50 (1 s): 8 + 6 s, and two events of 0.5 s."""
    event = {"ms": 500.0, "move_ms": 100.0}
    points = [
        measure.Point(0, 100, [2000.0] * 3, {"masks": [2000.0] * 3}, None),
        measure.Point(4, 50, [1000.0] * 3, {"masks": [2000.0] * 3}, event),
    ]
    total = totals.whole_schedule(measure.Curve(points, [(4, 50), (6, 50)], 10), "masks")
    assert (total.other_ms, total.steps_ms, total.moves_ms, total.probes_ms) == pytest.approx((20e3, 14e3, 200, 800))
    assert total.ratio == pytest.approx(20 / 15)


def _run(path: Path, *arguments: str) -> tuple[str, list[dict]]:
    command = [sys.executable, "-m", "benchmarks.peers", "--size", "tiny", "--precision", "fp32", "--one-setting"]
    command += ["--threads", "1", "--rounds", "2", "--json", str(path), "--textbrewer", str(TEXTBREWER), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(path.read_text())


def test_all_peers_take_turns(tmp_path):
    output, rows = _run(tmp_path / "rows.json", "--parts", "steps")
    ratios = {row["variant"]: row["value"] for row in rows if row["metric"] == "ratio"}
    expected = {"homodistil", "(a) masks, fp32", "(a) masks, masked rows only, fp32", "(c) plain loop, fp32"}
    if "Not run: (b) TextBrewer" not in output:
        expected.add("(b) TextBrewer, fp32")
    assert set(ratios) == expected and ratios["homodistil"] == 1 and all(ratio > 0 for ratio in ratios.values())


@pytest.mark.full
def test_memory_and_schedule(tmp_path):
    _, rows = _run(tmp_path / "rows.json", "--parts", "memory", "schedule", "--widths", "3")
    metrics = {row["metric"] for row in rows}
    assert {"peak", "ratio", "event_ms", "schedule_ratio"} <= metrics
