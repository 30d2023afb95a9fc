"""ELECTRA's two forms: embeddings of a width of their own, which the suite has as its case, and of the hidden size."""

from __future__ import annotations

import pytest
import torch
from families import test_conformance as conformance
from families.cases import CASES
from transformers import ElectraConfig

from homodistil.config.schema import PruningConfig, RunConfig
from homodistil.errors import UserError
from homodistil.models.encoders.electra import ELECTRA
from homodistil.models.known_configs import known_config
from homodistil.models.shapes import target_widths
from homodistil.models.size_search import find_shape
from homodistil.models.stock_shape import Shape, shape_of
from homodistil.pruning.milestones import plan_route
from homodistil.training.settle import settle

SMALL = "google/electra-small-generator"


def table_of(config: ElectraConfig):
    with torch.device("meta"):
        model = ELECTRA.empty_model(config)
    return ELECTRA.axis_table(model), {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_embeddings_as_wide_as_the_layers_conform_too(tmp_path, monkeypatch):
    case = CASES["electra"]

    def make_config() -> ElectraConfig:
        config = case.make_config()
        config.embedding_size = config.hidden_size
        return config

    monkeypatch.setitem(CASES, "electra", case._replace(make_config=make_config))
    assert "embedding" not in table_of(make_config())[0].widths
    conformance.test_every_parameter_is_named_or_listed("electra")
    conformance.test_all_terms_of_a_copy_are_zero("electra", "raw", "scores")
    conformance.test_the_stock_model_computes_the_same("electra")
    for i, cut in enumerate(case.cuts):
        conformance.test_a_cut_student_is_its_stock_export("electra", cut, tmp_path / str(i))
    conformance.test_flops_are_what_torch_counts("electra", case.cuts[-1])
    conformance.test_fewer_layers("electra")


def test_a_student_as_wide_as_the_embeddings_is_refused_and_never_chosen():
    """The stock class would leave the linear between both out."""
    table, shapes = table_of(known_config(SMALL))
    with pytest.raises(UserError, match=r"student.hidden_size: found 128, the width of .* embeddings.*use 126 or 130"):
        target_widths(Shape(128, 512, 2), table.widths)
    assert ELECTRA.stock_head_dim(table.widths | {"hidden": 128}) is None
    with torch.device("meta"):
        half = ELECTRA.empty_model(ElectraConfig(hidden_size=124, intermediate_size=512, num_attention_heads=2))
    wanted = sum(p.numel() for p in half.parameters())
    sized = [find_shape(table, shapes, wanted * by, "student.size").shape.hidden_size for by in (0.99, 1.0, 1.01)]
    assert 128 not in sized
    config = RunConfig().run
    config.export_milestones = [0.5]
    target = target_widths(Shape(64, 256, 1), table.widths)
    route = plan_route(config, PruningConfig(width_multiple=8), table.widths, table.widths, target)
    assert shape_of(route.milestones[0].widths).hidden_size == 192  # 3 heads of 64, not 2


@pytest.mark.parametrize(("embedding_size", "chosen"), [(128, "none"), (256, "full")])
def test_compensation_needs_embeddings_on_the_residual_stream(embedding_size, chosen):
    config, shape = RunConfig(), ElectraConfig(embedding_size=embedding_size)
    settle(config, shape)
    assert config.pruning.compensation == chosen
    config.pruning.compensation = "refit"
    if chosen == "full":
        settle(config, shape)
        return
    with pytest.raises(UserError, match=r"found refit, allowed is none for this teacher, whose embeddings \(128\) are"):
        settle(config, shape)
