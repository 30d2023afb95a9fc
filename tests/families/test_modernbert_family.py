"""What of ModernBERT other families do not have: windows, kinds of layers, fused linears, whole heads."""

from __future__ import annotations

import pytest
import torch
from families import test_conformance as conformance
from families.cases import CASES, TOKENS, VOCABULARY, make_model, modernbert, token_ids
from transformers import ModernBertConfig
from unit.models.test_step_memory import saved_bytes

from homodistil.config.schema import LossConfig, RunConfig, StudentConfig
from homodistil.data.batch import Batch, LossCounts
from homodistil.distill.cost import sequence_bytes
from homodistil.distill.layer_map import LayerMap
from homodistil.distill.student import Student
from homodistil.distill.student_compile import CompiledLayers
from homodistil.distill.teacher import Teacher
from homodistil.errors import UserError
from homodistil.evaluation.glue.checkpoint import load_classifier
from homodistil.evaluation.glue.tasks import TASKS
from homodistil.export.stock_model import stock_model
from homodistil.kernels.attention_map_inputs import MaskKind, num_pairs
from homodistil.models.activations import ActivationHooks
from homodistil.models.attention import keeps_probabilities
from homodistil.models.config_file import check_values
from homodistil.models.encoders.modernbert import MODERNBERT
from homodistil.models.known_configs import known_config
from homodistil.models.proposed_shapes import half_of, in_proportion
from homodistil.models.stock_shape import Shape, shape_of
from homodistil.training.resolve import resolve_run
from homodistil.training.settle import settle

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 4
DEEP = {"num_hidden_layers": 4, "layer_types": [FULL, SLIDING, SLIDING, FULL]}


@pytest.fixture
def case(monkeypatch):
    """Puts another configuration in the place of the family's case."""
    return lambda **more: monkeypatch.setitem(CASES, "modernbert", modernbert(**more))


def padded_batch(lengths: tuple[int, ...] = (TOKENS, 11, 3)) -> Batch:
    tokens = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    ids, valid = token_ids(len(lengths)) * tokens, tokens.flatten().nonzero().squeeze(1)
    pairs = [float(num_pairs(lengths, kind)) for kind in (MaskKind(), MaskKind(window=WINDOW))]
    counts = LossCounts(*torch.tensor([len(valid[::3]), len(valid), *pairs]).unbind())
    return Batch(ids, tokens, valid[::3], ids.flatten()[valid[::3]], valid, counts)


def test_with_biases_and_an_untied_decoder(case, tmp_path):
    biases = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
    case(**biases, tie_word_embeddings=False)
    assert any(name.endswith("Wqkv.bias") for name, _ in make_model("modernbert").named_parameters())
    conformance.test_every_parameter_is_named_or_listed("modernbert")
    conformance.test_importance_is_theta_times_gradient_by_brute_force("modernbert", "none")
    conformance.test_fewer_layers("modernbert")
    conformance.test_a_cut_student_is_its_stock_export("modernbert", CASES["modernbert"].cuts[-1], tmp_path)


@pytest.mark.parametrize("lock_step", [True, False])
@pytest.mark.parametrize("target", ["scores", "probabilities"])
def test_maps_are_compared_inside_the_window(target, lock_step):
    """Against explicit masks and whole maps in fp64, of two models with nothing in common."""
    batch, kinds = padded_batch(), (MaskKind(), MaskKind(window=WINDOW))
    student, teacher = (make_model("modernbert", seed=seed) for seed in (0, 1))
    seen = [ActivationHooks(m, MODERNBERT).run(batch.input_ids, batch.padding_mask) for m in (student, teacher)]
    terms = Student(student, LossConfig(attention_target=target))(batch, Teacher(teacher, lock_step)(batch)).terms
    tokens = batch.attention_mask.bool()
    distance = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()
    for i, kind in enumerate(kinds):
        mask = tokens[:, None, :, None] & tokens[:, None, None, :]
        mask = mask & (distance <= (TOKENS if kind.window is None else kind.window))
        maps = [m.queries[i].double() @ m.keys[i].double().mT * 8**-0.5 for m in seen]
        if target == "probabilities":
            maps = [m.masked_fill(~mask, -1e30).softmax(-1) for m in maps]
        expected = ((maps[0] - maps[1]).square() * mask).sum() / 5 / mask.sum()
        assert float(terms[f"attention/layer.{i}"]) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_layers_of_another_kind_are_compared_and_run_by_their_own(case):
    """Student's layers 0 and 2 (full, sliding) beside the teacher's 1 and 3 (sliding, full), at its side and alone."""
    case(**DEEP)
    batch, results = padded_batch(), []
    for lock_step in (True, False):
        model = make_model("modernbert")
        MODERNBERT.keep_layers(model, [0, 2])
        config = LossConfig(kl=1.0, relations=0.5)
        student = Student(model, config, layer_map=LayerMap(40, 5, (1, 3)))
        teacher = make_model("modernbert", seed=1)
        MODERNBERT.attentions(teacher)[-1].homodistil_shows_values = True
        results.append(student(batch, Teacher(teacher, lock_step)(batch)).terms)
    assert results[0].keys() == results[1].keys() and all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def _first_norm(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain of the norm in front of a layer's attention, and the weight behind it."""
    return layer.attn_norm.weight.detach().clone(), layer.attn.Wqkv.weight.detach().clone()


def test_an_export_of_some_layers_has_their_kinds(case):
    """Layers 1 and 3, of which the first loses the norm in front of it; with padding."""
    case(**DEEP)
    student = make_model("modernbert")
    batch, (norm, linear) = padded_batch(), _first_norm(MODERNBERT.layers(student)[1])
    MODERNBERT.keep_layers(student, [1, 3])
    model = Student(student, LossConfig()).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    stock = stock_model(weights, model, CASES["modernbert"].make_config())
    assert stock.config.layer_types == [SLIDING, FULL]
    with torch.no_grad():
        ours = ActivationHooks(student, MODERNBERT).run(batch.input_ids, batch.padding_mask).last
        theirs = MODERNBERT.backbone(stock)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        tokens = batch.attention_mask.bool()
        torch.testing.assert_close(ours[tokens], theirs[tokens], rtol=1e-4, atol=1e-4)
        # What the norm multiplied with, the linear behind it does.
        assert torch.equal(MODERNBERT.layers(student)[0].attn.Wqkv.weight, linear * norm)


def test_a_text_within_the_window_takes_the_way_without_one():
    config, ids = CASES["modernbert"].make_config(), token_ids()[:, : WINDOW + 1]
    assert MODERNBERT.attention_mask(config, ids, None) == {FULL: None, SLIDING: None}
    padding = torch.ones_like(ids)
    masks = MODERNBERT.attention_mask(config, ids, padding)
    assert masks[FULL] is masks[SLIDING]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [8, 80])
@pytest.mark.parametrize("loss", [{"kl": 1.0}, {"kl": 0.0, "hidden": 0.0, "attention": 0.0, "embedding": 0.0}], ids=len)
def test_sequence_bytes_are_what_autograd_saves(case, loss, window, dtype):
    case(local_attention=window)
    batch, config = conformance.batch_of(token_ids(4)), LossConfig(**loss)
    batch = batch._replace(counts=LossCounts(*torch.tensor(batch.counts[:4]).unbind()))
    student, teacher = (kind(make_model("modernbert"), *more) for kind, more in ((Student, (config,)), (Teacher, ())))
    distils = student.objective.needs_teacher
    saved, held = saved_bytes(student.to(dtype), teacher.to(dtype) if distils else None, batch)
    learned = [p for n, p in student.projections.named_parameters() if p.requires_grad and n != "last.weight"]
    saved -= 4 * sum(p.numel() for p in learned) * distils
    # Once for the micro-batch: sine and cosine of both kinds, and the window that SDPA makes numbers of.
    saved -= 2 * 2 * TOKENS * 8 * dtype.itemsize
    if not keeps_probabilities("cpu", dtype):
        saved -= TOKENS**2 * dtype.itemsize * (window < 2 * TOKENS)
    rows = len(batch.target_index) / 4
    predicted = sequence_bytes(
        student.widths,
        student.widths,
        config,
        seq_len=TOKENS,
        target_rows=rows,
        vocab_size=VOCABULARY,
        student_bytes=dtype.itemsize,
        teacher_bytes=dtype.itemsize,
        lock_step=False,
        keeps_probabilities=keeps_probabilities("cpu", dtype),
        architecture=MODERNBERT.architecture,
    )
    first_gradient = rows * VOCABULARY * dtype.itemsize  # predicted, but never saved
    # fp32: index tensors and scalars. bf16: LayerNorm's statistics are bf16 on a CPU.
    tolerance = 0.002 if dtype == torch.float32 else 0.01
    assert 4 * (predicted.student + predicted.losses - first_gradient) == pytest.approx(saved, rel=tolerance)
    assert 4 * predicted.teacher == held


def _resolved(config: RunConfig, **sizes):
    config.pruning.compensation = "none"
    for name, size in sizes.items():
        setattr(config.student, name, size)
    return resolve_run(config, known_config("answerdotai/ModernBERT-base"))


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ({"hidden_size": 500, "num_attention_heads": 8}, (512, 8)),
        ({"hidden_size": 512, "num_attention_heads": 12}, (512, 8)),
        ({"hidden_size": 20, "num_attention_heads": 1}, (64, 1)),
    ],
)
def test_a_target_that_no_stock_class_has_is_refused_with_the_nearest(sizes, nearest):
    hidden, heads = nearest
    expected = (
        rf"^student.hidden_size: found .*keep their 64 dims .* student.hidden_size={hidden} student.num_attention"
    )
    with pytest.raises(UserError, match=rf"{expected}_heads={heads}$"):
        _resolved(RunConfig(student=StudentConfig(preset="custom")), **sizes, intermediate_size=768)


def test_sizes_that_are_proposed_can_be_exported():
    dims = {"layer.0.qk_dim": 64, "layer.0.vo_dim": 64}
    large = {"hidden": 448, "layer.0.ffn": 700, "layer.0.heads": 7, **dims}  # half of seven heads
    assert half_of(large, whole_heads=True) == Shape(192, 350, 3)
    given = {"hidden_size": None, "intermediate_size": 350, "num_attention_heads": None}
    assert in_proportion(given, large, whole_heads=True) == Shape(256, 350, 4)
    for size in (0.3, 0.5, 0.8):
        resolved = _resolved(RunConfig(), size=size)
        assert MODERNBERT.stock_head_dim(resolved.target) == 64
    with pytest.raises(UserError, match=r"half of .* set student.hidden_size=384 .*heads=6 \(or student.size=0.5\)$"):
        _resolved(RunConfig(student=StudentConfig(preset="custom")))


def test_milestones_have_whole_heads():
    config = RunConfig(student=StudentConfig(preset="custom"))
    config.run.export_milestones, config.pruning.width_multiple = [0.75, 0.6], 64
    resolved = _resolved(config, hidden_size=256, intermediate_size=384, num_attention_heads=4)
    shapes = [shape_of(milestone.widths) for milestone in resolved.route.milestones]
    assert [(s.hidden_size, s.num_attention_heads) for s in shapes] == [(576, 9), (448, 7)]
    assert all(MODERNBERT.stock_head_dim(milestone.widths) == 64 for milestone in resolved.route.milestones)


def test_an_export_is_fine_tuned_as_any_encoder(tmp_path):
    make_model("modernbert").save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), TASKS["cola"])
    assert type(model).__name__ == "ModernBertForSequenceClassification" and model.config.num_labels == 2
    assert torch.equal(model.head.dense.weight, make_model("modernbert").head.dense.weight)


def test_names_of_an_encoder_alone_and_of_older_configurations():
    assert MODERNBERT.tensor_name("layers.3.attn.Wqkv.weight") == "model.layers.3.attn.Wqkv.weight"
    assert MODERNBERT.tensor_name("head.dense.weight") == "head.dense.weight"
    written = {"model_type": "modernbert", "position_embedding_type": "sans_pos", "global_attn_every_n_layers": 2}
    check_values(written | {"hidden_size": 64, "num_attention_heads": 1}, "teacher.name: config.json")
    older = ModernBertConfig(**written, num_hidden_layers=5, reference_compile=True, local_rope_theta=5.0)
    assert older.layer_types == [FULL, SLIDING, FULL, SLIDING, FULL]
    widths = MODERNBERT.axis_table(make_model("modernbert")).widths
    student = MODERNBERT.student_config(older, widths)
    assert student.layer_types == [FULL, SLIDING] and student.rope_parameters[SLIDING]["rope_theta"] == 5.0


def test_layers_are_compiled_once_for_each_kind(case):
    """Full without a norm in front, sliding, and full with one."""
    case(**DEEP)
    model, batch = make_model("modernbert"), padded_batch()
    compiled = CompiledLayers(MODERNBERT.layers(model), num_events=0, backend="aot_eager")
    last = ActivationHooks(model, MODERNBERT).run(batch.input_ids, batch.padding_mask).last
    assert compiled.num_compilations() == MODERNBERT.num_layer_kinds(model) == 3
    plain = ActivationHooks(make_model("modernbert"), MODERNBERT).run(batch.input_ids, batch.padding_mask).last
    torch.testing.assert_close(last, plain)


def test_its_cuts_are_compensated():
    config, teacher = RunConfig(), CASES["modernbert"].make_config()
    settle(config, teacher)
    assert config.pruning.compensation == "full" and config.data.task == "mlm"
    assert (config.loss.attention_target, config.loss.hidden_space) == ("scores", "normalised")
