"""The front door: the wheel, installed apart from this checkout, and what can be done with it from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_job import make_materials

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("homodistil", "ds_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TIMEOUT_S = 300
# Of the quickstart, what makes it last seconds. test_slurm_train.py and the notebook below use the same corpus.
TINY = (
    "train.steps=4 teacher.correction_steps=0 run.compare=[] train.eval_every_steps=0 data.sources=embedded:bible "
    "data.seq_len=16 data.heldout_fraction=0.002 pruning.interval_steps=1 pruning.end_fraction=0.5 "
    "pruning.compensation_sequences=32 train.save_every_steps=0 run.report=false"
).split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel. Built from a copy: setuptools writes beside its sources."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(wheels)], check=True)
    (wheel,) = wheels.glob("homodistil-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """A random BERT of hidden size 24 with its tokenizer, and text."""
    folder = tmp_path_factory.mktemp("materials")
    make_materials(folder)
    texts = [path.read_text() for path in sorted((folder / "text").iterdir())]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    return folder


@pytest.fixture
def call(installed, tmp_path, monkeypatch, cache_dir):
    """Runs the installed command, or Python, in an empty folder; checks the exit code and returns the output."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HOMODISTIL_COMMAND"):
        environment.pop(name, None)

    def run(*words: object, code: int = 0, **changes: str) -> str:
        program = [sys.executable, str(installed / "bin" / "homodistil")]
        line = [sys.executable, *words[1:]] if words[0] == "python" else [*program, *words]
        done = subprocess.run(
            list(map(str, line)),
            cwd=tmp_path,
            env=environment | changes,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    return run


def test_the_package_comes_from_the_wheel_and_its_import_is_light(call, installed):
    heavy = "torch', 'transformers', 'deepspeed', 'numpy', 'yaml"
    program = (
        f"import sys, homodistil; print(homodistil.__file__, [name for name in ['{heavy}'] if name in sys.modules])"
    )
    assert call("python", "-c", program).split(maxsplit=1) == [str(installed / "homodistil" / "__init__.py"), "[]\n"]


def test_help_and_recipes_from_any_folder(call):
    text = call("--help")
    names = "train check plan prepare-data glue squad mteb lm-eval probe report recipes axes"
    for name in names.split():
        assert f"\n  {name} " in text
    lines = call("recipes").splitlines()
    assert any(line.startswith("baselines/tinybert ") for line in lines) and all(len(x.split()) > 5 for x in lines)
    assert call("recipes", "quickstart") == (ROOT / "homodistil/config/recipes/quickstart.yaml").read_text()
    assert "did you mean 'quickstart'" in call("recipes", "quikstart", code=2)
    assert call("tran", code=2).startswith("error: homodistil: found 'tran'")
    assert "--ranks: found 'many'" in call("train", "--ranks", "many", code=2)


def test_axes_of_a_saved_config(server, materials):
    job = server.start("-m homodistil.cli", ["axes", "--teacher", str(materials / "teacher")], num_ranks=1)
    assert job.wait(timeout_s=60) == [0], job.output()
    text = job.output()
    assert "layer.*.ffn: 40 entries in each of 3 layers; one entry is 49 parameters" in text  # 24 in, 24 out, a bias
    assert "bert.encoder.layer.*.attention.self.query.weight" in text and "[heads*qk_dim, hidden]" in text


def test_train_needs_no_launcher_no_compiler_and_no_port(call, tmp_path, cache_dir):
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "ops"), "PYTHONPROFILEIMPORTTIME": "1"}
    output = call("train", *TINY, f"data.cache_dir={cache_dir}", **environment)
    assert "KL to teacher" in output and "\nhomodistil " in output and "start: 1 rank on 1 machine, ZeRO-2" in output
    assert not (tmp_path / "ops").exists(), "an op was built"
    # Each takes seconds to import: a compiler that is not used, and what would draw a report.
    assert " torch\n" in output and " torch._inductor.compile_fx\n" not in output and " matplotlib\n" not in output
    assert [row["name"] for row in json.loads((tmp_path / "runs/quickstart/result.json").read_text())][
        1
    ] == "homodistil"
    card = (tmp_path / "runs/quickstart/export/README.md").read_text()
    assert "\nhomodistil train train.steps=4 " in card


def two_steps(folder: Path, materials: Path) -> list[str]:
    fields = [f"teacher.name={materials / 'teacher'}", f"data.sources={materials / 'text'}", "data.seq_len=16"]
    fields += [
        f"data.cache_dir={folder / 'cache'}",
        "student.preset=teacher",
        "pruning.schedule=none",
        "run.report=false",
    ]
    return [*fields, "train.steps=2", "run.dir=two", "data.heldout_fraction=0.2", "--deepspeed", "zero2_fp32"]


def test_ranks_are_started_by_the_command_itself(call, tmp_path, materials):
    output = call("train", "--ranks", "2", *two_steps(tmp_path, materials))
    assert "start: 2 ranks on 1 machine, ZeRO-2" in output and "KL to teacher" in output


def test_the_code_of_ranks_that_refuse_is_the_commands(call, tmp_path, materials):
    """One rank would take this batch: the two ranks that were started have joined when they refuse it."""
    batch = ["train.global_batch_size=5", "train.micro_batch_size=1"]
    output = call("train", "--ranks=2", *two_steps(tmp_path, materials), *batch, code=2)
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: train.global_batch_size: 5 is not divisible by") and "1 x 2" in last, output
    assert "Traceback" not in output and not (tmp_path / "two").exists()


EXAMPLE = """
import os, sys

for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]  # as where no launcher has started the program
import homodistil

TEACHER = sys.argv[1]
run = homodistil.distill(
    TEACHER, text=["corpus.jsonl"], hidden_size=12, num_attention_heads=2, steps=6, out="runs/half",
    seq_len=16, heldout_fraction=0.2, cache_dir="cache",
    **{"pruning.ffn_multiple": 1, "pruning.interval_steps": 1, "pruning.compensation": "refit"},
)
assert type(run.student).__name__ == "BertForMaskedLM" and type(run.student).__module__.startswith("transformers.")
assert (run.student.config.hidden_size, run.student.config.intermediate_size) == (12, 20)  # half of 40: in proportion
assert run.tokenizer("fox").input_ids and run.report.is_file() and run.folder.name == "half"
assert [row["name"] for row in run.result] == ["teacher", "homodistil"] and "homodistil" in repr(run)
again = homodistil.distill(
    TEACHER, text="corpus.jsonl", steps=2, out="runs/again", seq_len=16, heldout_fraction=0.2, cache_dir="cache",
    schedule="none", preset="teacher", deepspeed="zero0",
)
assert again.result[1]["hidden_size"] == 24
print("both are done")
"""


def test_from_python_twice_in_one_process(server, tmp_path, materials):
    shutil.copy(materials / "corpus.jsonl", tmp_path)
    (tmp_path / "program.py").write_text(EXAMPLE)
    environment, teacher = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}, str(materials / "teacher")
    job = server.start(tmp_path / "program.py", [teacher], num_ranks=1, env=environment, cwd=tmp_path)
    assert job.wait(timeout_s=120) == [0], job.output()
    output = job.output()
    assert output.endswith("both are done\n") and "step 6/6" in output and not (tmp_path / "ops").exists()


RUN_NOTEBOOK = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
try:
    import nbclient, nbformat
except ImportError:
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    print(names["run"].report)
else:
    done = nbclient.NotebookClient(nbformat.read(sys.argv[1], as_version=4), timeout=280).execute()
    print(done.cells[-1].outputs)
"""


def run_notebook(call, folder: Path, cache_dir: Path, name: str, shorter: dict[str, str]) -> str:
    """The last output of a notebook of docs/, in which some texts are replaced to make its run short."""
    text = (ROOT / "docs" / "notebooks" / name).read_text()
    for long, short in shorter.items():
        assert long in text
        text = text.replace(long, short)
    (folder / "notebook.ipynb").write_text(text.replace("out=", f"cache_dir={str(cache_dir)!r}, out="))
    return call("python", "-c", RUN_NOTEBOOK, "notebook.ipynb")


def test_the_notebook(call, tmp_path, cache_dir):
    shorter = {"correction_steps=100": "correction_steps=0", "steps=100": "steps=4, seq_len=16"}
    shorter |= {'_sequences\\": 64': '_sequences\\": 32', '_fraction\\": 0.02': '_fraction\\": 0.002'}
    output = run_notebook(call, tmp_path, cache_dir, "quickstart.ipynb", shorter)
    assert "report.html" in output.splitlines()[-1]


@pytest.mark.full
def test_the_notebook_of_an_embedder(call, tmp_path, cache_dir):
    pytest.importorskip("sentence_transformers")
    shorter = {"steps=60": 'steps=2, compensation_sequences=32, **{\\"data.heldout_fraction\\": 0.003}'}
    output = run_notebook(call, tmp_path, cache_dir, "embedder.ipynb", shorter)
    assert "onnx-int8" in output and (tmp_path / "runs/embedder/export/onnx/model.onnx").is_file()
