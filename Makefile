# `make demo` and `make test` do everything on a machine with Python 3.11, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Where a CPU build of torch is wanted from PyTorch's own index:
#   make demo TORCH_INDEX=--index-url=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Two processes' worth of OpenMP threads on two cores slow each other down several times over.
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint install figures readme clean

demo: install ## score, analyse, sweep and steer the built-in testbed
	$(BIN)/workbench probe testbed --max-new-tokens 12 --out runs/demo

test: install lint ## every check and test
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# torch first: asked for by another package, a newer build with gigabytes of CUDA would come.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# The committed figures are the demo's; HTML stays out, it needs plotly.js beside it.
figures: demo ## the testbed's figures, from a run of the demo
	cp runs/demo/figures/*.png runs/demo/figures/*.svg runs/demo/figures/*.csv figures/

readme: install ## the README's tables, from data/testbed/results and data/bench
	$(BIN)/workbench testbed table
	$(BIN)/workbench bench --from data/bench/cpu-2-cores.json --readme README.md

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
