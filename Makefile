# Two commands do everything on a fresh machine: `make train` (the main job) and `make test`.
# `make test-fast` runs the unit tests that start no process; `make test-full` also runs the long matrices (every ZeRO
# option, every change of layout on resume) and what tests/only_in_full.txt names.

PYTHON ?= python3
RANKS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed builds its optimizers for the CPU here, apart from other projects' builds.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.torch_extensions
export TOKENIZERS_PARALLELISM := false
# Container images often set this: every process would compile thousands of files of its libraries anew.
unexport PYTHONDONTWRITEBYTECODE
# Read at recipe time: DeepSpeed's launcher and ninja must come from the same environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Python compiles what it imports when it first does; pip would spend the better part of a minute on all the rest.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

FREE_PORT = $(shell $(BIN)/python -m homodistil.distributed.free_port)

.PHONY: setup train quality quality-decoder test test-fast test-full lanes lint docs slurm clean prepared

setup: $(VENV)/.ready

# The pip of an older Python needs three times as long to choose what to install.
$(VENV)/.ready: requirements.txt requirements-dev.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "pip>=25" || true
	$(PIP_INSTALL) -r requirements-dev.txt setuptools wheel
	$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	touch $@

train: setup
	@if [ -d runs/quickstart ]; then \
		old=runs/quickstart-$$(date +%Y%m%d-%H%M%S); mv runs/quickstart $$old; echo "the run before is now $$old"; fi
	OMP_NUM_THREADS=1 deepspeed --log_level critical --num_accelerators $(RANKS) --master_port $(FREE_PORT) \
		launcher/train.py --deepspeed ds_configs/zero2.json

# Within an hour on two cores; what was measured is kept, so after an interruption the same command goes on.
quality: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.quality main

# Decoders against the peers of today: hours, and the same command goes on after an interruption.
# `make quality-decoder DECODER=--list` says what it will do and how long that takes; DECODER="--layers 30": the whole
# of SmolLM2.
DECODER ?=
quality-decoder: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.quality decoder $(DECODER)

# Three lanes on two cores, for tests often wait. A file is in one lane. They are dealt out in the order of the folders,
# the files of many short tests last: so all lanes end at about the same time. What is judged by the clock comes
# afterwards, not beside tests that need the processor; two files at a time, for they wait for the most part.
LANES ?= 3
BY_THE_CLOCK = tests/faults/test_interrupt.py tests/faults/test_watch.py
PYTEST = OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python -m pytest -q --durations=30 --durations-min=1
IN_LANES = -n $(LANES) --dist loadfile --no-loadscope-reorder $(BY_THE_CLOCK:%=--ignore=%)
AFTERWARDS = -n 2 --dist loadfile $(BY_THE_CLOCK)

test-fast: setup
	$(PYTEST) $(IN_LANES) tests/unit -m "not full and not process"

# The compiler works beside the first tests: those that load an op wait for it.
test: prepared
	@$(MAKE) --no-print-directory -j 2 lanes $(VENV)/.optimizers
	$(PYTEST) $(AFTERWARDS)

lanes: $(VENV)/.imported
	$(PYTEST) $(IN_LANES)

# Once before the lanes, which would each compile the same modules.
$(VENV)/.imported: $(VENV)/.ready
	$(PYTEST) --collect-only -q > $@.txt
	mv $@.txt $@

test-full: prepared
	$(BIN)/python launcher/build_ops.py
	$(PYTEST) $(IN_LANES) -m "full or not full"
	$(PYTEST) $(AFTERWARDS) -m "full or not full"

# All that waits for a mirror, at the same time.
prepared:
	@$(MAKE) --no-print-directory -j 3 slurm lint setup

# DeepSpeed's own optimizer for the CPU under ZeRO (optimizer.implementation=deepspeed_fused): `make train` does without
# it. The one of stage 0 is built by `make test-full`.
$(VENV)/.optimizers: $(VENV)/.ready
	$(BIN)/python launcher/build_ops.py CPUAdamBuilder
	touch $@

# A real SLURM for tests/slurm; where it cannot be installed they are skipped.
slurm:
	@tests/slurm/install.sh

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

# The site of docs/ in site/. It needs no torch: the config reference is committed, and a test says when it is stale.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --clean

$(VENV)/.docs: requirements-docs.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) .torch_extensions build site *.egg-info .pytest_cache .ruff_cache .hypothesis
