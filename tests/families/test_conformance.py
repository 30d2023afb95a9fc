"""What every family has to do, each by the same tests: nothing of an architecture is registered that does not pass.

Live engines under ZeRO are in test_live_resize.py, the comparison with another tool in test_torch_pruning.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from families.cases import CASES, LAYERS, TOKENS, VOCABULARY, batch_of, make_config, make_model, token_ids
from support.small import random_keep
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from homodistil.config.schema import LossConfig, PruningConfig
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.export.stock_model import stock_model
from homodistil.kernels.attention_map import TARGETS
from homodistil.models import FAMILIES, family_of
from homodistil.models.activations import ActivationHooks
from homodistil.models.axes import AxisTable, Keep
from homodistil.models.flops import backbone_flops, head_flops
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.models.shapes import target_widths
from homodistil.models.stock_shape import Shape, shape_of
from homodistil.pruning.activation_scores import activation_scores
from homodistil.pruning.importance import Importance

AUTO = {"AutoModelForMaskedLM": AutoModelForMaskedLM, "AutoModelForCausalLM": AutoModelForCausalLM}
MODEL_TYPES = sorted(FAMILIES)
CUTS = [(model_type, cut) for model_type in MODEL_TYPES if model_type in CASES for cut in CASES[model_type].cuts]


def cut_student(model_type: str, cut: dict[str, int]) -> Student:
    """A copy of the model, cut to a target by random selection."""
    teacher = family_of(model_type).axis_table(make_model(model_type)).widths
    sizes = shape_of(teacher)._asdict() | {name: size for name, size in cut.items() if name in Shape._fields}
    whole_heads = family_of(model_type).whole_heads
    return cut_to(model_type, target_widths(Shape(**sizes), teacher, cut.get("num_key_value_heads"), whole_heads))


def cut_to(
    model_type: str,
    target: dict[str, int],
    loss: LossConfig | None = None,
    model: nn.Module | None = None,
    keep: Keep | None = None,
) -> Student:
    """A copy of the model, cut to `target` by random selection, or to what is to be kept."""
    student = Student(make_model(model_type) if model is None else model, loss or LossConfig())
    table = student.axis_table()
    keep = keep or random_keep(
        table, {axis: width for axis, width in target.items() if width < table.widths[axis]}, seed=5
    )
    slice_module(student, make_plan(table, keep))
    student.after_resize(keep)
    return student.eval()


def test_every_registered_architecture_has_a_case():
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_parameter_is_named_or_listed(model_type):
    model, family = make_model(model_type), family_of(model_type)
    table, shapes = family.axis_table(model), {name: p.shape for name, p in model.named_parameters()}
    named = {use.parameter for use in table.uses}
    assert all(name.endswith(CASES[model_type].untouched) for name in shapes.keys() - named)
    assert all(shapes[name][dim] == size for (name, dim), size in table.dim_sizes().items())
    # A matrix inside a layer shrinks along both dims; tables and the decoder along the residual stream or by head.
    dims = {name: {dim for n, dim in table.dim_sizes() if n == name} for name in named}
    whole = {name for name in named if len(dims[name]) < len(shapes[name])}
    tables = ("embed", "relative", "decoder", "lm_head", ".wte", ".wpe")
    assert all(any(part in name for part in tables) for name in whole)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("space", ["raw", "normalised"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_terms_of_a_copy_are_zero(model_type, space, target):
    model, batch = make_model(model_type), batch_of(token_ids())
    config = LossConfig(kl=1.0, attention_target=target, hidden_space=space)
    for lock_step in (True, False):
        student = Student(copy.deepcopy(model), config)
        terms = student(batch, Teacher(copy.deepcopy(model), lock_step)(batch)).terms
        assert {"kl", "hidden", "attention", "embedding"} <= set(terms)
        for name, value in terms.items():
            assert (float(value) == 0) == (name != "mlm"), (name, lock_step)


@pytest.mark.parametrize(("model_type", "cut"), [pair for pair in CUTS if len(pair[1]) > 2], ids=str)
def test_a_teacher_beside_its_student_takes_nothing_of_it(model_type, cut):
    """Its layers run one by one with the masks and positions of the batch, and otherwise as by itself."""
    student, batch = cut_student(model_type, cut), batch_of(token_ids())
    batch.attention_mask[1, -3:] = 0
    batch = batch._replace(token_index=batch.attention_mask.flatten().nonzero().squeeze(1))
    with torch.no_grad():
        for parameter in student.parameters():  # tables of positions among them
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        beside, alone = (student(batch, Teacher(make_model(model_type), way)(batch)).terms for way in (True, False))
    assert beside == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_position_sees_what_its_mask_hides(model_type, dtype):
    """The last token, and a padded one: what the taps' way of attention lets through."""
    model, family = make_model(model_type).to(dtype), family_of(model_type)
    hooks, ids = ActivationHooks(model, family), token_ids()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 7) % (VOCABULARY - 5) + 5
    with torch.no_grad():
        before, after = (hooks.run(each, None).last[:, :-1] for each in (ids, changed))
        assert torch.equal(before, after) == family.is_causal
        padding = torch.ones_like(ids)
        padding[:, -1] = 0
        before, after = (hooks.run(each, padding).last[:, :-1] for each in (ids, changed))
        assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_layer_sees_what_its_kind_of_mask_says(model_type, padded, dtype):
    """Each layer alone: which positions notice that a token in the middle is another one."""
    family, ids, middle = family_of(model_type), token_ids(), TOKENS // 2
    changed = ids.clone()
    changed[:, middle] = (ids[:, middle] + 7) % (VOCABULARY - 5) + 5
    padding = torch.ones_like(ids)
    padding[:, -2:] = 0
    for i in range(LAYERS):
        model = make_model(model_type).to(dtype)
        kind = family.mask_kind(model, i)
        family.keep_layers(model, [i])
        hooks = ActivationHooks(model, family)
        with torch.no_grad():
            before, after = (hooks.run(each, padding if padded else None).last for each in (ids, changed))
        positions = torch.arange(TOKENS - 2)
        sees = (positions - middle <= (TOKENS if kind.before is None else kind.before)) & (
            middle - positions <= (TOKENS if kind.after is None else kind.after)
        )
        notices = (before != after).any(-1)[:, : TOKENS - 2]
        assert not (notices & ~sees).any(), i
        # Rounding to bf16 may swallow what a position does see.
        assert (notices | ~sees).all() or dtype == torch.bfloat16, i


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_stock_model_computes_the_same(model_type):
    """Backbone, final norm, transform and decoder, each called by itself, against the model's own forward."""
    model, family, ids = make_model(model_type), family_of(model_type), token_ids()
    stock = make_model(model_type, attention="eager")
    with torch.no_grad():
        seen = ActivationHooks(model, family).run(ids, None)
        norm = family.final_norm(model)
        assert torch.equal(seen.last, seen.layers[-1] if norm is None else norm(seen.layers[-1]))
        logits = family.decoder(model)(family.lm_transform(model)(seen.last))
        assert torch.equal(logits, family.lm_head(model)(seen.last))
        torch.testing.assert_close(logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_type", "cut"), CUTS, ids=str)
def test_a_cut_student_is_its_stock_export(model_type, cut, tmp_path):
    """Same logits from a class of the library, saved and loaded again without our code."""
    student, family, ids = cut_student(model_type, cut), family_of(model_type), token_ids()
    with torch.no_grad():
        expected = family.lm_head(student.model)(ActivationHooks(student.model, family).run(ids, None).last)
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    stock_model(weights, student, CASES[model_type].make_config()).save_pretrained(tmp_path)
    loaded = AUTO[family.auto_class].from_pretrained(tmp_path).eval()
    assert loaded.config.hidden_size == cut.get("hidden_size", CASES[model_type].make_config().hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    if family.is_causal:
        generated = loaded.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)  # with its KV cache
        assert generated.shape[1] == TOKENS + 3 or int(generated[0, -1]) == loaded.config.eos_token_id


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if not FAMILIES[t].architecture.has_rotary_positions])
def test_heads_that_are_narrower_than_the_stock_ones_are_padded(model_type):
    family, model = family_of(model_type), make_model(model_type)
    widths = family.axis_table(model).widths
    student = cut_to(model_type, {axis: 4 for axis in widths if axis.endswith(("qk_dim", "vo_dim"))})
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    stock = stock_model(weights, student, CASES[model_type].make_config())
    assert family.axis_table(stock).widths == widths
    with torch.no_grad():
        expected = family.lm_head(student.model)(ActivationHooks(student.model, family).run(token_ids(), None).last)
        torch.testing.assert_close(stock(input_ids=token_ids()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_type", "cut"), [pair for pair in CUTS if len(pair[1]) > 2], ids=str)
def test_flops_are_what_torch_counts(model_type, cut):
    family, ids = family_of(model_type), token_ids()
    student = cut_student(model_type, cut)
    student.model.set_attn_implementation("eager")  # products by name: a fused kernel counts otherwise
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        family.lm_head(student.model)(family.backbone(student.model)(input_ids=ids)[0].flatten(0, 1))
    expected = backbone_flops(student.widths, ids.numel(), TOKENS, family.architecture)
    expected += head_flops(student.widths, ids.numel(), VOCABULARY, family.architecture)
    # Older versions of transformers make rotary angles by a product, which is no part of the model's cost.
    by_module = counter.get_flop_counts().items()
    angles = sum(sum(counts.values()) for name, counts in by_module if name.endswith("rotary_emb"))
    assert counter.get_total_flops() - angles == expected


@pytest.mark.parametrize("normalisation", ["none", "per_tensor"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_importance_is_theta_times_gradient_by_brute_force(model_type, normalisation):
    """Every axis entry's score: the sum over all elements that an event would remove with it, or over their shares of
    what their parameters have."""
    student = Student(make_model(model_type), LossConfig(kl=0.0, hidden=0.0, attention=0.0, embedding=0.0))
    student(batch_of(token_ids())).total.backward()
    table, parameters = student.axis_table(), dict(student.named_parameters())
    no_gradient = torch.zeros(())
    scored = {n: (p.detach() * (p.grad if p.grad is not None else no_gradient)).abs() for n, p in parameters.items()}
    if normalisation == "per_tensor":
        scored = {name: score / (_total(name, scored) or 1) for name, score in scored.items()}
    config = PruningConfig(ema_beta=0.0, score_normalisation=normalisation)
    importance = Importance(table, config, 0, torch.device("cpu"))
    pieces = [_Piece(name, p) for name, p in parameters.items() if p.grad is not None]
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    scores = importance.measure(pieces, table, shapes)
    for axis, score in scores.items():
        if score.ndim > 1 or table.widths[axis] == 1:
            continue
        for entry in {0, table.widths[axis] - 1}:
            kept = torch.tensor([i for i in range(table.widths[axis]) if i != entry])
            index = make_plan(table, {axis: kept}).index
            removed = [_removed(scored[name], dim, kept) for name, dims in index.items() for dim, kept in dims.items()]
            assert float(score[entry]) == pytest.approx(sum(removed), rel=1e-4), (axis, entry)


def _total(name: str, scored: dict[str, torch.Tensor]) -> float:
    """Of the parameter, a bias and its weight together. The projections of the losses are not scored."""
    ends = ("weight", "bias") if name.endswith((".weight", ".bias")) else (name.rpartition(".")[2],)
    beside = (f"{name.rpartition('.')[0]}.{end}" for end in ends)
    return sum(float(scored[each].sum()) for each in beside if each in scored)


def _removed(scored: torch.Tensor, dim: int, kept: torch.Tensor) -> float:
    """Sum over what is not `kept` along `dim`."""
    rows = scored.movedim(dim, 0).reshape(scored.shape[dim], -1).sum(1)
    return float(rows.sum() - rows[kept].sum())


class _Piece:
    def __init__(self, name: str, parameter: torch.nn.Parameter) -> None:
        self.name, self.start = name, 0
        self.weight, self.gradient = parameter.detach().flatten(), parameter.grad.flatten()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_entry_without_weights_has_no_activations(model_type):
    """Of every axis: once all that an event would remove with an entry is 0, so is its score, and no other's."""
    before = _activation_scores(make_model(model_type))
    for axis, score in before.items():
        if score.ndim > 1 or len(score) == 1 or axis == "embedding":
            continue
        entry, model = len(score) // 2, make_model(model_type)
        _silence(model, family_of(model_type).axis_table(model), axis, entry)
        after = _activation_scores(model)[axis]
        assert float(after[entry]) == 0 < float(score[entry]), axis
        assert float(after[torch.arange(len(after)) != entry].min()) > 0, axis


def _activation_scores(model: torch.nn.Module) -> Keep:
    return activation_scores(Student(model, LossConfig()), [[batch_of(token_ids())]])


@torch.no_grad()
def _silence(model: torch.nn.Module, table: AxisTable, axis: str, entry: int) -> None:
    kept = torch.tensor([i for i in range(table.widths[axis]) if i != entry])
    for name, dims in make_plan(table, {axis: kept}).index.items():
        parameter = model.get_parameter(name)
        for dim, index in dims.items():
            left = torch.zeros(parameter.shape[dim]).index_fill(0, index, 1)
            parameter.mul_(left.view([-1 if i == dim else 1 for i in range(parameter.ndim)]))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fewer_layers(model_type):
    model, family = make_model(model_type), family_of(model_type)
    family.keep_layers(model, [1])
    student = Student(model, LossConfig())
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    stock = stock_model(weights, student, CASES[model_type].make_config())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=token_ids()).logits, stock(input_ids=token_ids()).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_student_whose_layers_left_is_its_stock_export(model_type, tmp_path):
    """Five layers of both kinds, three of which stay in two events: kinds of layers follow, and so does all that the
    student numbers by layers. Loaded again without our code; the teacher's layers come after one another in the map."""
    family, batch = family_of(model_type), batch_of(token_ids())
    student = Student(make_model(model_type, layers=5), LossConfig(kl=1.0)).eval()
    student.keep_layers([0, 1, 3, 4])
    assert (student.layers, student.layer_map.layers) == ((0, 1, 3, 4), (0, 2, 3, 4))
    student.keep_layers([0, 1, 2])
    assert (student.layers, student.layer_map.layers) == ((0, 1, 3), (0, 2, 4))
    assert student.widths == family.axis_table(student.model).widths
    stock_model(dict(student.named_parameters()), student, make_config(model_type, 5)).save_pretrained(tmp_path)
    loaded = AUTO[family.auto_class].from_pretrained(tmp_path).eval()
    with torch.no_grad():
        terms = student(batch, Teacher(make_model(model_type, layers=5))(batch)).terms
        logits = loaded(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.target_index]
        torch.testing.assert_close(logits, student.predict(batch), rtol=1e-4, atol=1e-4)
    assert loaded.config.num_hidden_layers == 3
    # The first layer is still the teacher's; the others read what they have never seen.
    of_layers = [float(terms[f"hidden/layer.{i}"]) for i in range(3)]
    assert of_layers[0] == 0 and min(of_layers[1:]) > 0 and "hidden/layer.3" not in terms


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_shape_is_the_configurations(model_type):
    config, family = CASES[model_type].make_config(), family_of(model_type)
    shape = family.shape(config)
    assert (shape.hidden_size, shape.num_hidden_layers) == (config.hidden_size, config.num_hidden_layers)
    widths = family.axis_table(make_model(model_type)).widths
    assert shape_of(widths) == Shape(shape.hidden_size, shape.intermediate_size, shape.num_attention_heads)
    too_long = torch.full((1, shape.max_tokens), 5)
    with torch.no_grad():
        assert torch.isfinite(make_model(model_type)(input_ids=too_long).logits).all()
    family.set_dropout(config, 0.25)
    assert all(getattr(config, field) == 0.25 for field in family.dropout_fields)
