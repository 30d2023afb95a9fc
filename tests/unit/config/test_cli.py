"""Command line: precedence, shipped recipes, help, and one-line errors that name the field."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from homodistil.config.command_line import parse
from homodistil.config.schema import RunConfig
from homodistil.config.shipped import RECIPES, recipe_names
from homodistil.errors import UserError

REPO = Path(__file__).parents[3]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_says_what_it_sets(name):
    config = parse([f"recipe={name}"])
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for section, fields in written.items():
        for field, value in fields.items():
            assert getattr(getattr(config, section), field) == value, (section, field)
    assert config.run.name == name.split("/")[-1]
    assert not name.startswith("homobert") or config.student.preset == name.removesuffix("-paper")


def test_recipes_of_a_folder_go_by_folder_and_name():
    assert {"quickstart", "homobert-base", "homobert-base-paper", "paper", "baselines/distilbert"} <= set(
        recipe_names()
    )
    with pytest.raises(UserError, match=r"did you mean 'baselines/tinybert'"):
        parse(["recipe=baselines/tinybrt"])


def test_overrides_win_over_the_file_wherever_they_stand(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 7, lr: 0.5}\ndata: {sources: [/a]}\n")
    config = parse(["train.steps=9", "--config", str(file), "data.sources=[/data/wiki,/data/books]", "run.dir=/runs/x"])
    assert (config.train.steps, config.train.lr) == (9, 0.5)
    assert config.data.sources == ["/data/wiki", "/data/books"] and config.run_dir == "/runs/x"
    assert config.teacher.correction_steps == 0  # a file of one's own does not start from the quickstart


def test_without_a_file_the_quickstart_is_run():
    assert parse([]) == parse(["recipe=quickstart"]) == parse(["run.resume=never"])


def test_another_teacher_does_not_get_the_quickstarts_values():
    plain = RunConfig()
    plain.teacher.name = "/mine"
    for arguments in (["teacher.name=/mine"], ["--teacher.name", "/mine"], ["--teacher.name=/mine"]):
        assert parse(arguments) == plain
    assert parse(["recipe=quickstart", "teacher.name=/mine"]).student.preset == "quickstart"


def test_the_defaults_are_the_best_that_is_measured():
    """docs/results.md, and what the quickstart and HomoBERTs are made of; the paper's form is asked for by name."""
    ours = {"compensation": "full", "end_fraction": 0.1, "max_event_fraction": 0.5, "importance": "sensitivity"}
    ours |= {"protect_outliers": 0.1, "carry_moments": True, "compensation_limit": 0.25}
    losses = {"mlm": 1.0, "kl": 4.0, "hidden": 1.0, "attention": 1.0, "embedding": 1.0, "cosine": 0.0}
    losses |= {"relations": 0.0, "projection": "student", "projection_learned": True, "kl_positions": "masked"}
    sizes = ("base", "small", "xsmall", "tiny")
    recipes = {name: parse([f"recipe={name}"]) for name in ("quickstart", *(f"homobert-{size}" for size in sizes))}
    defaults = RunConfig()
    assert defaults.pruning.compensation == "auto"  # full, where the teacher's family has it
    defaults.pruning.compensation = "full"
    for name, config in {"defaults": defaults, **recipes}.items():
        assert {field: getattr(config.pruning, field) for field in ours} == ours, name
        assert {field: getattr(config.loss, field) for field in losses} == losses, name
    schedules = {name: config.pruning.schedule for name, config in recipes.items()}
    assert schedules.pop("quickstart") == "cubic"  # compared with one_shot in its table
    assert set(schedules.values()) == {"one_shot"} and defaults.pruning.schedule == "auto"
    defaults.pruning.schedule = "cubic"
    assert defaults.pruning == recipes["quickstart"].pruning and RunConfig().pruning.interval_steps == 5
    assert RunConfig().loss == recipes["quickstart"].loss

    papers = {"compensation": "none", "end_fraction": 0.7, "importance": "sensitivity", "schedule": "cubic"}
    for name in ("paper", *(f"homobert-{size}-paper" for size in sizes)):
        config = parse([f"recipe={name}"])
        assert {field: getattr(config.pruning, field) for field in papers} == papers, name
        assert (config.loss.kl, config.loss.projection) == (1.0, "teacher"), name


def test_resolved_config_is_a_file_that_gives_the_same_config(tmp_path):
    config = parse(["recipe=homobert-tiny", "train.lr=1e-4"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["teacher.nam=x"], r"teacher\.nam: unknown field.*did you mean 'name'"),
        (["trian.lr=1"], r"trian: unknown section.*did you mean 'train'"),
        (["train.lr=fast"], r"train\.lr.*fast"),
        (["loss.projection=both"], r"loss\.projection: found .both., allowed: student, teacher; set"),
        (["pruning.end_fraction=1.5"], r"pruning\.end_fraction: found 1\.5, allowed \[0, 1\]"),
        (["data.heldout_fraction=0"], r"data\.heldout_fraction: found 0.*\(0, 1\)"),
        (["data.mask_probability=-0.1"], r"data\.mask_probability"),
        (["pruning.start_fraction=0.6"], r"pruning\.end_fraction: 0\.1 is before"),
        (["data.sources=[]"], r"data\.sources: found an empty list"),
        (["loss.mlm=0", "loss.kl=0", "loss.hidden=0", "loss.attention=0", "loss.embedding=0"], "every weight is 0"),
        (["recipe=homobert-smal"], r"recipe: found 'homobert-smal'.*did you mean 'homobert-small'"),
        (["--config", "/nowhere.yaml"], r"--config: cannot read '/nowhere.yaml'"),
        (["run.export_milestones=[0.5,1.5]"], r"run\.export_milestones: found 1\.5"),
    ],
)
def test_mistakes_are_one_line_that_names_the_field(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message", [("train: {lrr: 3}", "lrr: unknown field"), ("- a", "holds a list"), ("a: [", "not valid YAML")]
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        parse(["--config", str(tmp_path / "bad.yaml")])
    assert "bad.yaml" in str(caught.value)


def _train(*arguments):
    return subprocess.run(
        [sys.executable, str(REPO / "launcher/train.py"), *arguments], capture_output=True, text=True, cwd=REPO
    )


@pytest.mark.process
def test_help_explains_every_field():
    done = _train("--help")
    assert done.returncode == 0
    text = re.sub(r"\s+", " ", done.stdout)
    for section in dataclasses.fields(RunConfig):
        for field in dataclasses.fields(section.default_factory):
            option = text.split(f"--{section.name}.{field.name} ")
            # The usage line and the explanation; the explanation is a sentence.
            assert len(option) >= 3 and re.search(r"[a-z]{3,} ", option[-1][:200]), (section.name, field.name)


@pytest.mark.process
def test_print_config_prints_the_resolved_values():
    done = _train("--print_config", "train.lr=0.25")
    assert done.returncode == 0
    printed = yaml.safe_load(done.stdout)
    assert printed["train"]["lr"] == 0.25 and printed["student"]["preset"] == "quickstart"


@pytest.mark.process
def test_the_script_exits_with_2_and_one_line():
    done = _train("--deepspeed", "ds_configs/zero2.json", "train.lrr=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: train.lrr: unknown field")


def test_a_single_path_needs_no_brackets(tmp_path):
    assert parse(["data.sources=/data/wiki"]).data.sources == ["/data/wiki"]
    assert parse(["data.sources=[/data/wiki,/data/books]"]).data.sources == ["/data/wiki", "/data/books"]
    (tmp_path / "mine.yaml").write_text("data: {sources: /data/wiki}\n")
    assert parse(["--config", str(tmp_path / "mine.yaml")]).data.sources == ["/data/wiki"]


@pytest.mark.process
@pytest.mark.parametrize("script", ["train", "plan", "prepare_data", "glue", "squad", "report"])
def test_help_needs_no_heavy_imports(script):
    command = [sys.executable, "-X", "importtime", str(REPO / f"launcher/{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "homodistil.distributed.script_exit" in imported
    assert not imported & {"torch", "transformers", "deepspeed", "datasets"}
