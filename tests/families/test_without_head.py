"""Every encoder family without its language-modelling head (task `none`): what is left, refitted and exported."""

import pytest
import torch
from families.cases import CASES, batch_of, make_model, token_ids
from support.small import random_keep
from transformers import AutoModel

from homodistil.config.schema import LossConfig
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.evaluation.distances import evaluate_distances
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.export.stock_model import stock_model
from homodistil.models import FAMILIES, family_of
from homodistil.models.activations import ActivationHooks
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.models.shapes import target_widths
from homodistil.models.stock_shape import Shape, shape_of
from homodistil.pruning.compensation import Options, compensate

ENCODERS = sorted(name for name, family in FAMILIES.items() if not family.is_causal)
CUTS = [(name, next(cut for cut in CASES[name].cuts if len(cut) > 2)) for name in ENCODERS]
LOSS = LossConfig(mlm=0.0, kl=0.0)


def headless(model_type: str) -> torch.nn.Module:
    model = make_model(model_type)
    family_of(model_type).drop_head(model)
    return model


def small(model_type: str, cut: dict[str, int]) -> dict[str, int]:
    """The widths after `cut`."""
    family = family_of(model_type)
    widths = family.axis_table(headless(model_type)).widths
    sizes = shape_of(widths)._asdict() | {name: size for name, size in cut.items() if name in Shape._fields}
    target = target_widths(Shape(**sizes), widths, None, family.whole_heads)
    return {axis: width for axis, width in target.items() if width < widths[axis]}


@pytest.mark.parametrize("model_type", ENCODERS)
def test_only_the_head_is_gone(model_type):
    family, whole, model = family_of(model_type), make_model(model_type), headless(model_type)
    assert family.has_head(whole) and not family.has_head(model)
    # Of tied parameters all names: XLM-R's class makes its head first.
    in_backbone = f"{family.backbone_name}."
    names = {name for name, _ in whole.named_parameters(remove_duplicate=False) if name.startswith(in_backbone)}
    assert {name for name, _ in model.named_parameters()} == names
    table = family.axis_table(model)
    assert table.widths == family.axis_table(whole).widths
    assert {use.parameter for use in table.uses} <= names


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_copy_is_at_distance_0_and_nothing_asks_for_words(model_type):
    student, batch = Student(headless(model_type), LOSS), batch_of(token_ids())
    for lock_step in (True, False):
        teacher = Teacher(headless(model_type), lock_step)
        values = evaluate_distances(student, teacher, [batch], torch.device("cpu"))
        tokens = values.pop("evaluated_tokens")
        assert tokens == batch.input_ids.numel()
        assert values == {"hidden_distance": 0, "attention_distance": 0, "embedding_distance": 0}
        gap = GapProbe(student, teacher, [batch], torch.device("cpu"))
        measured = gap.measure()
        assert gap.distance == "total" and measured["total"] == gap.distance_of(student) == 0
        assert not {"kl", "mlm"} & set(measured)


@pytest.mark.parametrize(("model_type", "cut"), CUTS, ids=ENCODERS)
def test_a_cut_student_is_its_stock_export(model_type, cut, tmp_path, capfd):
    """Same hidden states from a class of the library, saved and loaded again without our code; all but a pooler."""
    family, ids = family_of(model_type), token_ids()
    student = Student(headless(model_type), LOSS)
    keep = random_keep(student.axis_table(), small(model_type, cut), seed=5)
    slice_module(student, make_plan(student.axis_table(), keep))
    student.after_resize(keep)
    with torch.no_grad():
        expected = ActivationHooks(student.model, family).run(ids, None).last
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    stock_model(weights, student, CASES[model_type].make_config()).save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith("pooler.") for name in report["missing_keys"]) and not report["unexpected_keys"]
    assert loaded.config.architectures == [type(loaded).__name__]
    assert loaded.config.hidden_size == keep["hidden"].numel()
    with torch.no_grad():
        actual = loaded.eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "cut"),
    [(name, cut) for name, cut in CUTS if family_of(name).refit_obstacle(CASES[name].make_config()) is None],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refit_is_the_one_of_the_backbone_with_its_head(model_type, cut):
    family, batches = family_of(model_type), [batch_of(token_ids(8, seed)) for seed in range(4)]
    keep, refitted = None, []
    for model in (headless(model_type), make_model(model_type)):
        table = family.axis_table(model)
        keep = keep or random_keep(table, small(model_type, cut), seed=5)
        refitted.append(compensate(model, family, table, keep, batches, Options(mode="refit")))
    ours, theirs = (family.backbone(each.model).state_dict() for each in refitted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert refitted[0].report["lost"] == refitted[1].report["lost"] > 0
