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

.PHONY: demo test lint install figures evidence readme clean

demo: install ## score, analyse, sweep and steer the built-in testbed
	$(BIN)/workbench probe testbed --max-new-tokens 12 --out runs/demo

# Two workers, a file of tests each: the tests use one thread.
test: install lint ## every check and test
	$(BIN)/python -m pytest -n 2 --dist loadfile

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

# HTML stays out, it needs plotly.js beside it.
FIGURES = for kind in png svg csv; do cp $(1)/*.$$kind figures/; done
RESULTS = data/testbed/results

figures: install ## the testbed's figures and findings: the whole examination, planted heads, transfer
	rm -f figures/*
	$(BIN)/workbench probe testbed --full --max-new-tokens 12 --out runs/testbed --json > $(RESULTS)/examination.json
	$(call FIGURES,runs/testbed/figures)
	$(BIN)/workbench testbed planted --out runs/planted --json > $(RESULTS)/planted.json
	$(call FIGURES,runs/planted/figures)
	$(BIN)/workbench score testbed-small --out runs/testbed-small --json > /dev/null
	$(BIN)/workbench figures runs/testbed runs/testbed-small --out runs/transfer --json > $(RESULTS)/transfer-small.json
	$(call FIGURES,runs/transfer)

# What the README says beside the figures; trains a checkpoint of another seed on the way.
evidence: figures ## the smaller testbed's examination, and the testbed against another seed
	$(BIN)/workbench probe testbed-small --full --max-new-tokens 12 --out runs/examined-small --json > $(RESULTS)/examination-small.json
	$(BIN)/workbench testbed train --seed 1 --out runs/checkpoint-seed-1
	$(BIN)/workbench score runs/checkpoint-seed-1 --out runs/testbed-seed-1 --json > /dev/null
	$(BIN)/workbench figures runs/testbed runs/testbed-seed-1 --out runs/transfer-seed --json > $(RESULTS)/transfer-seed.json

readme: install ## the README's tables and findings, from data/testbed/results and data/bench
	$(BIN)/workbench testbed table
	$(BIN)/workbench bench --from data/bench/cpu-2-cores.json --readme README.md

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
