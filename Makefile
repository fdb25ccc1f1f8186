# Everything a newcomer types: `make demo` and `make test`. Each target makes its own .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two ranks share two cores here; more threads a rank only get in each other's way.
export OMP_NUM_THREADS ?= 1
# DeepSpeed: on the CPU, and without compiling its kernels at installation.
export DS_ACCELERATOR ?= cpu
export DS_BUILD_OPS ?= 0
# What it compiles when it is first used: one place for each environment, or two checkouts would take turns.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

.PHONY: demo test test-long test-zero-grid fuzz attacks crash flips soak lint format bench bench-quick quality quality-long browser clean

demo: $(VENV)/.demo
	$(BIN)/python examples/train_fsdp.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-long: $(VENV)/.test
	TAILOR_TEST_LONG=1 $(BIN)/python -m pytest

# Every combination of stage, ranks, dtype, param groups and family against real DeepSpeed.
test-zero-grid: $(VENV)/.test
	$(BIN)/python -m tests.converters.zero_grid

# Coverage-guided fuzzing of every parser, some minutes of it; docs/fuzzing.md has the long form.
fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz

# The long forms of what `make test` does in small: every attack, kills at every call, flipped bits, a run of 2,000 saves.
attacks: $(VENV)/.test
	$(BIN)/python -W ignore -m tests.attacks --json benchmarks/results/attacks.json

crash: $(VENV)/.test
	$(BIN)/python -m tests.crash --minutes 18 --json benchmarks/results/crash.json

flips: $(VENV)/.test
	$(BIN)/python -m tests.flips --flips 12000

soak: $(VENV)/.test
	$(BIN)/python -m benchmarks.soak --saves 2000 --json benchmarks/results/soak.json

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every benchmark beside its peer, in one table and in benchmarks/results.md.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.all

bench-quick: $(VENV)/.test
	$(BIN)/python -m benchmarks.all --quick

# What resuming loses, policy by policy: minutes on two cores, or an hour and more on an idle machine.
quality: $(VENV)/.test
	$(BIN)/python -m benchmarks.resume_quality

quality-long: $(VENV)/.test
	$(BIN)/python -m benchmarks.resume_quality --form long --work quality-run --json benchmarks/results/resume_quality.json

# A browser for the tests of pages, which are skipped where there is none. On Debian, as root, if not there yet.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || ( \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core )

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Installing again is quick when nothing changed, so both stamps follow the two files that decide.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[hf,plot]"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo-run zero-run zero-to-fsdp-run quality-run fuzz-run build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
