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

.PHONY: demo test lint install docs figures evidence notebooks readme clean

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

docs: install ## the how-to's hours, then the site in build/site, warnings as errors
	$(BIN)/python docs/hours.py
	$(BIN)/mkdocs build --strict

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

NBCONVERT = $(BIN)/python -m nbconvert --to notebook --inplace

# Then what changes with every run is taken out, and what lives in a running kernel only.
notebooks: install ## the notebooks' outputs, each from a fresh kernel in a folder of its own
	rm -rf build/notebooks && mkdir -p build/notebooks && cp notebooks/*.ipynb build/notebooks
	WORKBENCH_SHARED=$${WORKBENCH_SHARED:-$(CURDIR)/../shared} \
	  $(NBCONVERT) build/notebooks/*.ipynb --execute --ExecutePreprocessor.timeout=600 \
	  --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.record_timing=False \
	  --ExecutePreprocessor.store_widget_state=False
	$(NBCONVERT) build/notebooks/*.ipynb --CoalesceStreamsPreprocessor.enabled=True \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_all_outputs_tags=live
	$(BIN)/python docs/tidy_notebooks.py build/notebooks/*.ipynb
	cp build/notebooks/*.ipynb notebooks

readme: install ## the README's tables and findings, from data/testbed/results and data/bench
	$(BIN)/workbench testbed table
	$(BIN)/workbench bench --from data/bench/cpu-2-cores.json --readme README.md

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
