# Two commands do everything: `make demo` (the main job) and `make test`. Both make .venv on first use.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
TEST_READY := $(VENV)/.installed-test
LINT_READY := $(VENV)/.installed-lint

# Without it, `python -m pytest` here would import this folder's kernels/ in place of the package of that name.
export PYTHONSAFEPATH := 1

.PHONY: demo test lint aot bench gpu bench-gpu readme links clean

demo: $(INSTALLED)
	$(VENV)/bin/grat image "a red fox in the snow" --model demo --seed 2 --out demo.png --overwrite

# A file's tests share their models, so a file stays in one process; each takes up to 4 GiB.
test: $(TEST_READY)
	$(RUN) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

lint: $(LINT_READY) links
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

# Compiles every kernel configuration for every architecture, with each version of Triton that GPU machines may have, and
# reads the machine code; needs no GPU. AOT=--help says what else.
AOT_TRITON := 3.6.0 3.7.1
aot: $(INSTALLED)
	@status=0; for version in $(AOT_TRITON); do \
		folder=build/triton-$$version; \
		test -d $$folder/triton || $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
			--target $$folder triton==$$version || exit 1; \
		PYTHONPATH=$$folder:tests/aot $(RUN) -m aot $(AOT) || status=1; \
	done; exit $$status

# Planning, start-up and memory of the CPU path; `grat bench` times attention.
bench: $(TEST_READY)
	$(RUN) tests/support/cpu_benchmark.py

# On a machine with a GPU, in whatever environment has torch, triton and pytest: nothing is installed.
GPU_PYTHON = PYTHONPATH=.links:tests/gpu $(PYTHON)

# Trials, tests and timings of every kernel within nine minutes, whatever hangs or faults: OUT=folder gets summary.md.
gpu: links
	$(GPU_PYTHON) tests/gpu/run_all.py --out $(or $(OUT),$(error say where to: make gpu OUT=folder)) $(GPU_ARGS)

# Writes kernels/results/<gpu>-<date>.json, from which `make readme` makes the README's table.
bench-gpu: links
	$(GPU_PYTHON) tests/gpu/bench_kernels.py $(BENCH_ARGS)

readme: $(INSTALLED)
	$(RUN) -m grat_cli.bench.readme $(wildcard kernels/results/*.json)

# The import names of the source folders, for tools that do not read installed packages.
links:
	@mkdir -p .links
	@ln -sfn ../kernels .links/grat_kernels
	@ln -sfn ../presets .links/grat_presets
	@ln -sfn ../grat_cli .links/grat_cli

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(TEST_READY): $(INSTALLED)
	$(PIP) --editable '.[test]'
	@touch $@

$(LINT_READY): $(TEST_READY)
	$(PIP) --editable '.[test,lint]'
	@touch $@

clean:
	rm -rf build .links .pytest_cache .hypothesis .ruff_cache *.egg-info
