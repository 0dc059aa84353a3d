# make demo     from nothing to a pruned model, its perplexity beside that of the dense one, and a sample of both
# make test     all checks: style, types, tests
# make faults   signals, full disks, damaged files at random, and hostile inputs; nothing may be lost (takes a while)

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

# The demo is limited on purpose: calibration of DEMO_SAMPLES x DEMO_SEQLEN tokens, perplexity on DEMO_WINDOWS windows.
DEMO_SAMPLES ?= 32
DEMO_SEQLEN ?= 512
DEMO_SPARSITY ?= 0.5
DEMO_WINDOWS ?= 8
DEMO_PROMPT ?= The capital of France is

BIN := $(abspath $(VENV))/bin

.PHONY: demo test faults

demo: $(VENV)/installed
	mkdir -p .demo
	@echo "demo: $(DEMO_SAMPLES) x $(DEMO_SEQLEN) calibration tokens, the first $(DEMO_WINDOWS) windows of WikiText-2"
	cd .demo && $(BIN)/besa prune --sparsity $(DEMO_SPARSITY) --data bundled --samples $(DEMO_SAMPLES) --seqlen $(DEMO_SEQLEN)
	cd .demo && $(BIN)/besa eval ppl wikitext2 --limit $(DEMO_WINDOWS)
	cd .demo && $(BIN)/besa eval sample "$(DEMO_PROMPT)"

test: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS)

faults: $(VENV)/installed-dev
	$(BIN)/python tests/faults/interruptions.py --write benchmarks/results/FAULTS.md
	$(BIN)/python tests/faults/hostile --write benchmarks/results/FAULTS.md

# Dependency groups need pip 25.1; the pip that comes with Python may be older.
$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard besa_cli/ops/kernels/*.cpp besa_cli/ops/kernels/*.h)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev
	touch $@
