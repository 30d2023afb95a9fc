"""Bad input to the main job: one line that names field or file, and nothing written where the user's things are.

Runs the real job in this process as its only rank; exit codes and all ranks ending are in distributed/test_job.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.small import small_model
from transformers import BertTokenizerFast, OPTConfig

from homodistil.config.command_line import Job, parse, parse_job
from homodistil.errors import UserError
from homodistil.train import run
from homodistil.training.run_folder import check_run_folder, claim_run_folder

REPO = Path(__file__).parents[2]
ENGINE = REPO / "ds_configs" / "zero2_fp32.json"


@pytest.fixture
def teacher(tmp_path):
    """A small teacher in a folder, with the tokenizer it fits."""
    folder = tmp_path / "teacher"
    small_model().save_pretrained(folder)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"##{chr(97 + i)}" for i in range(26)),
        *map(chr, range(97, 123)),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(
            f"document {'abcdef'[i]} " + "the quick brown fox jumps over the lazy dog " * 20
        )
    return folder


@pytest.fixture
def attempt(tmp_path, teacher, corpus):
    """Run the job with overrides; returns the message of the `UserError` and checks that nothing was written."""

    def attempt(*overrides, engine=ENGINE, run_dir=None):
        run_dir = run_dir or tmp_path / "run"
        fields = {
            "teacher.name": teacher,
            "data.sources": f"[{corpus}]",
            "data.seq_len": 16,
            "data.cache_dir": tmp_path / "cache",
            "student.preset": "custom",
            "student.hidden_size": 12,
            "student.intermediate_size": 20,
            "student.num_attention_heads": 4,
            "train.steps": 2,
            "train.global_batch_size": 4,
            "train.micro_batch_size": 2,
            "pruning.compensation": "none",
            "pruning.end_fraction": 0.3,
            "pruning.interval_steps": 10,
            "pruning.max_event_fraction": 1.0,
            "loss.kl": 1.0,
            "run.dir": run_dir,
        }
        before = sorted(run_dir.rglob("*")) if run_dir.exists() else None
        arguments = [f"{name}={value}" for name, value in fields.items()]
        with pytest.raises(UserError) as caught:
            config = parse([f"--config={tmp_path / 'empty.yaml'}", *arguments, *overrides])
            run(Job(config, Path(engine)))
        assert (sorted(run_dir.rglob("*")) if run_dir.exists() else None) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "empty.yaml").write_text("{}")
    return attempt


def _engine(tmp_path, **changes):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads(ENGINE.read_text()) | changes))
    return path


def test_teacher_path_missing(attempt):
    assert "teacher.name: no folder '/nowhere/bert'" in attempt("teacher.name=/nowhere/bert")


def test_unknown_packaged_teacher(attempt):
    assert "embedded:bert-huge" in attempt("teacher.name=embedded:bert-huge")


def test_unsupported_architecture(attempt, tmp_path):
    OPTConfig().save_pretrained(tmp_path / "gpt")
    message = attempt(f"teacher.name={tmp_path / 'gpt'}")
    assert "architecture 'opt' is not supported; supported: bert" in message


def test_teacher_without_weights(attempt, teacher):
    (teacher / "model.safetensors").unlink()
    assert "teacher.name" in attempt()


def test_tokenizer_larger_than_the_embeddings(attempt, teacher):
    small_model(vocab_size=40).save_pretrained(teacher)
    message = attempt()
    assert "57 tokens, the model 40 embeddings" in message and str(teacher) in message


def test_target_wider_than_the_teacher(attempt):
    assert "student.hidden_size: found 32, the teacher has 24" in attempt("student.hidden_size=32")


def test_hidden_not_divisible_by_heads(attempt):
    assert "student.hidden_size: 13 is not divisible" in attempt("student.hidden_size=13")


def test_seq_len_above_the_positions(attempt):
    assert "data.seq_len: 17 is above the 16 tokens that the teacher has positions for" in attempt("data.seq_len=17")


def test_engine_file_missing_or_broken(attempt, tmp_path):
    assert "--deepspeed: cannot read" in attempt(engine=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    assert "is not valid JSON" in attempt(engine=tmp_path / "bad.json")


def test_batch_size_set_differently_in_both_places(attempt, tmp_path):
    message = attempt(engine=_engine(tmp_path, train_batch_size=64))
    assert "train_batch_size: the DeepSpeed JSON says 64, the run config says 4 (train.global_batch_size)" in message


def test_batch_not_divisible(attempt):
    assert "train.global_batch_size: 5 is not divisible by" in attempt("train.global_batch_size=5")


def test_optimizer_in_the_engine_file(attempt, tmp_path):
    message = attempt(engine=_engine(tmp_path, optimizer={"type": "Adam", "params": {"lr": 1}}))
    assert "'optimizer' in the DeepSpeed JSON" in message and "train.lr" in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled: true in the DeepSpeed JSON needs a GPU"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: found 4"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device: found 'nvme'",
        ),
    ],
)
def test_engine_options_that_cannot_run(attempt, tmp_path, changes, message):
    assert message in attempt(engine=_engine(tmp_path, **changes))


def test_fp16_teacher_on_cpu(attempt):
    assert "teacher.dtype: float16 needs a GPU" in attempt("teacher.dtype=float16")


def test_empty_corpus(attempt, corpus):
    for path in corpus.iterdir():
        path.write_text("")
    assert str(corpus) in attempt()


def test_binary_corpus(attempt, corpus):
    (corpus / "0.txt").write_bytes(b"PK\x03\x04\x00\x00\xff\xfe" * 50)
    assert str(corpus / "0.txt") in attempt()


def test_missing_corpus(attempt):
    assert "/nowhere/wiki" in attempt("data.sources=[/nowhere/wiki]")


def test_corpus_smaller_than_a_batch(attempt):
    message = attempt("train.global_batch_size=4096", "train.micro_batch_size=4096")
    assert "fewer than one train.global_batch_size (4096)" in message


def test_path_of_widths_that_cannot_be_walked(attempt):
    assert "pruning.max_event_fraction" in attempt("pruning.max_event_fraction=0.1")


def test_run_folder_not_empty(attempt, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    message = attempt(run_dir=folder)
    assert f"run.dir: '{folder}' is not empty" in message and "run.resume=auto" in message
    assert "not a run folder" in attempt("run.resume=auto", run_dir=folder)
    assert (folder / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("content", ["model: mine\n", "just a word", "a: [", "", "train: {lr: 1}\n"])
def test_another_projects_config_is_not_taken_for_a_run(attempt, tmp_path, content):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(content)
    (folder / "ds_config.json").write_text("{}")
    assert "not a run folder" in attempt("run.resume=auto", run_dir=folder)
    assert (folder / "config.yaml").read_text() == content


def test_resuming_with_another_config_names_the_first_difference(tmp_path):
    before = parse(["recipe=quickstart", f"run.dir={tmp_path / 'run'}"])
    claim_run_folder(check_run_folder(before), before, {})
    same = [f"run.dir={tmp_path / 'run'}", "run.resume=auto", "train.log_every_steps=3"]
    assert check_run_folder(parse(same)) == tmp_path / "run"  # logging may change
    with pytest.raises(UserError, match=r"train.lr: the run in '.*' has 0.003, this config 0.5; go on with the same"):
        check_run_folder(parse([*same, "train.lr=0.5"]))


def test_what_is_left_open_is_compared_once_it_is_settled(tmp_path):
    """A run of a version with another default rate: its own has to be named."""
    fields = ["teacher.name=/models/mine", "student.size=0.5", f"run.dir={tmp_path / 'run'}"]
    before = parse(fields)
    claim_run_folder(check_run_folder(before), before, {})
    now = parse([*fields, "run.resume=auto"])
    check_run_folder(now)
    now.train.lr, now.is_settled = 5e-4, True
    with pytest.raises(UserError, match=r"train.lr: the run in '.*' has 0.003, this config 0.0005; go on with the"):
        check_run_folder(now)
    assert check_run_folder(parse([*fields, "run.resume=auto", "train.lr=0.003"])) == tmp_path / "run"


def test_nothing_to_resume(attempt):
    assert "run.resume: must, but" in attempt("run.resume=must")


def test_encoder_without_mlm_head(attempt, teacher):
    model = small_model()
    shutil.rmtree(teacher / "model.safetensors", ignore_errors=True)
    model.bert.save_pretrained(teacher)
    message = attempt()
    assert "has no MLM head" in message and "teacher.correction_steps" in message


def test_apex_that_is_not_there(attempt):
    assert "apex_fused needs NVIDIA's apex" in attempt("optimizer.implementation=apex_fused")


def test_a_run_of_before_the_corrections_own_seed_keeps_its_teacher(tmp_path):
    fields = ["recipe=quickstart", "train.seed=3", f"run.dir={tmp_path / 'run'}"]
    before = parse(fields)
    claim_run_folder(check_run_folder(before), before, {})
    lines = (tmp_path / "run" / "config.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "config.yaml").write_text("".join(line for line in lines if "correction_seed" not in line))
    with pytest.raises(UserError, match=r"teacher.correction_seed: the run in '.*' has 3, this config 0; go on with"):
        check_run_folder(parse([*fields, "run.resume=auto"]))
    check_run_folder(parse([*fields, "run.resume=auto", "teacher.correction_seed=3"]))


@pytest.mark.parametrize(("weight", "is_refused"), [(1, True), (0, False)])
def test_a_run_of_before_there_were_spaces_keeps_to_raw_states(tmp_path, weight, is_refused):
    """A decoder's, whose default is another now: refused where it had a term that compared them."""
    fields = ["recipe=quickstart", f"run.dir={tmp_path / 'run'}", f"loss.hidden={weight}", f"loss.embedding={weight}"]
    before = parse(fields)
    claim_run_folder(check_run_folder(before), before, {})
    lines = (tmp_path / "run" / "config.yaml").read_text().splitlines(keepends=True)
    names = ("hidden_space", "skip_first_tokens")
    kept = [line for line in lines if not any(name in line for name in names)]
    (tmp_path / "run" / "config.yaml").write_text("".join(kept))
    resumed = [*fields, "run.resume=auto"]
    check_run_folder(parse(resumed))  # auto: settled, and looked at again, once the teacher is known
    check_run_folder(parse([*resumed, "loss.hidden_space=raw"]))
    for field, value in (("hidden_space", "normalised"), ("skip_first_tokens", 1)):
        config = parse([*resumed, f"loss.{field}={value}"])
        if not is_refused:
            check_run_folder(config)
            continue
        with pytest.raises(UserError, match=f"loss.{field}: the run in '.*' has (raw|0), this config {value}; go on"):
            check_run_folder(config)


REMOVED = "teacher.kernel_inject: .*the field was removed because .*teacher.runtime=compile"


def run_of_before(folder: Path, section: str, field: str, value: object) -> Path:
    """config.yaml of a quickstart run in `folder` by a version that had this field or value."""
    config = parse(["recipe=quickstart", f"run.dir={folder}"])
    claim_run_folder(check_run_folder(config), config, {})
    content = config.to_dict()
    content[section][field] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "config.yaml"


def test_a_run_goes_on_that_had_a_removed_field_at_its_default(tmp_path):
    file = run_of_before(tmp_path / "run", "teacher", "kernel_inject", False)
    fields = ["run.resume=auto", f"run.dir={tmp_path / 'run'}"]
    for source in ("recipe=quickstart", f"--config={file}"):
        config = parse([source, *fields])
        assert config == parse(["recipe=quickstart", *fields]) and check_run_folder(config) == tmp_path / "run"
    engine = ["--deepspeed", str(ENGINE), "recipe=quickstart", f"run.dir={tmp_path / 'job'}"]
    assert len(parse_job([*engine, "--teachers-once", str(_students_file(tmp_path))]).students) == 1


def _students_file(folder: Path) -> Path:
    (folder / "small.yaml").write_text("teacher: {kernel_inject: false}\n")
    return folder / "small.yaml"


@pytest.mark.parametrize("argument", ["teacher.kernel_inject=false", "teacher={kernel_inject: true}"])
def test_a_removed_field_says_what_to_use_instead(argument):
    with pytest.raises(UserError, match=REMOVED) as refused:
        parse([argument])
    assert "\n" not in str(refused.value)


def test_a_run_that_used_a_removed_field_is_refused(tmp_path):
    file = run_of_before(tmp_path / "run", "teacher", "kernel_inject", True)
    fields = ["run.resume=auto", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=REMOVED):
        parse([f"--config={file}", *fields])
    with pytest.raises(UserError, match="^teacher.kernel_inject: the run in .* has True, but .*another run.dir"):
        check_run_folder(parse(["recipe=quickstart", *fields]))


def test_a_removed_implementation_names_those_that_are_left(tmp_path):
    """A run that had it goes on with another: the optimizer's state is the same."""
    file = run_of_before(tmp_path / "run", "optimizer", "implementation", "homodistil_fused")
    fields = ["run.resume=auto", f"run.dir={tmp_path / 'run'}"]
    for arguments in (["optimizer.implementation=homodistil_fused"], [f"--config={file}", *fields]):
        with pytest.raises(UserError) as refused:
            parse(arguments)
        assert str(refused.value) == (
            "optimizer.implementation: found 'homodistil_fused', which was removed because it showed no gain (79 ms "
            "against 80 ms on the CPU), allowed: torch_fused, deepspeed_fused, apex_fused; set "
            "optimizer.implementation to an allowed value"
        )
    assert check_run_folder(parse(["recipe=quickstart", *fields])) == tmp_path / "run"
