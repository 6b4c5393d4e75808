# `make help` lists the targets. Variables:
#   PYTHON=python3.13   the Python to set up with, where it matters which
#   VENV=DIR            another folder for the environment
#   ARGS="..."          more arguments, for the example or for pytest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

EXTRAS := examples,lint,tests
RUN := $(VENV)/bin/python
OURS := $(VENV)/.made-by-make
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train train-cnn train-multihost train-test-gap export paper notebooks test test-all test-torch lint format bench bench-full bench-programs bench-newest counts clean FORCE

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile
	@echo 'Variables: PYTHON=python3.13, VENV=DIR, ARGS="..." for the example or for pytest'

train: $(READY) ## Train the MLP of the example, with ARGS="--steps 300 --help ..."
	$(RUN) examples/train_mlp.py $(ARGS)

train-cnn: $(READY) ## Train the CNN of the example, and fold it at the end
	$(RUN) examples/train_cnn.py $(ARGS)

train-multihost: $(READY) ## Train on all devices, ARGS="--local-processes 2 ..." in more processes
	$(RUN) examples/train_multihost.py $(ARGS)

train-test-gap: $(READY) ## Plant, find and cure each cause of a gap between training and evaluation
	$(RUN) examples/train_test_gap.py $(ARGS)

export: $(READY) ## Export a trained network to one file, ARGS="--run-dir runs/mlp-001 --folded"
	$(RUN) examples/export_model.py $(ARGS)

paper: $(READY) ## Run the long experiments, ARGS="--data mnist --data-dir DIR" or "--scale 0.01"
	$(RUN) examples/paper_mnist.py $(ARGS)

notebooks: $(READY) ## Run the notebooks, and save them with their outputs
	$(RUN) notebooks/run.py $(ARGS)
	$(RUN) benchmarks/tables.py

test: $(READY) ## Run the tests
	$(RUN) -m pytest -n auto -m "not slow" $(ARGS)

test-all: $(READY) ## Run the tests, those included that are too long for every run
	$(RUN) -m pytest -n auto $(ARGS)

test-torch: $(READY) ## Run the tests that need torch, which this installs
	@$(INSTALL) -e '.[benchmarks]'
	BNJAX_REQUIRE_TORCH=1 $(RUN) -m pytest tests/test_interop_peers.py $(ARGS)

lint: $(READY) ## Check format, style and types
	$(RUN) -m ruff format --check --diff
	$(RUN) -m ruff check
	$(RUN) -m mypy
	$(RUN) benchmarks/tables.py --check

format: $(READY) ## Rewrite the files in the checked format
	$(RUN) -m ruff format
	$(RUN) -m ruff check --fix

bench: $(READY) ## Compare with other implementations: accuracy, and times of few shapes, in minutes
	@$(INSTALL) -e '.[benchmarks]'
	for s in accuracy derivatives peers "speed --quick" "steps --quick" "dispatch --quick"; do \
	  set -- $$s; KERAS_BACKEND=jax $(RUN) benchmarks/$$1.py $$2 || exit 1; \
	done
	$(RUN) benchmarks/tables.py

bench-full: $(READY) ## All of it, about an hour; writes benchmarks/results, figures and the README
	@$(INSTALL) -e '.[benchmarks,tpu]'
	for s in accuracy derivatives peers speed steps dispatch tracing figures \
	  corrections small_batches devices collectives monitor; do \
	  KERAS_BACKEND=jax $(RUN) benchmarks/$$s.py || exit 1; \
	done
	$(RUN) benchmarks/tables.py

bench-newest: $(READY) ## Times beside Flax, and memory, with a newer jax: PYTHON=python3.13 VENV=.venv-newest
	@$(INSTALL) -e '.[benchmarks]'
	@$(RUN) -c 'import jax, sys; v = jax.__version__; jax.__version_info__ < (0, 11, 1) and sys.exit(f"Error: needs jax 0.11.1 or newer, here is {v}. Fix: PYTHON=python3.13 VENV=.venv-newest")'
	KERAS_BACKEND=jax $(RUN) benchmarks/speed.py --flax
	$(RUN) benchmarks/memory.py --time
	$(RUN) benchmarks/figures.py
	$(RUN) benchmarks/tables.py

bench-programs: $(READY) ## Count what programs compiled for a CPU, a TPU and a GPU move and keep: about an hour
	@$(INSTALL) -e '.[peers,reports]'
	$(RUN) benchmarks/counts.py
	$(RUN) benchmarks/memory.py --time
	$(MAKE) counts VENV="$(VENV)-tpu" EXTRAS=peers,tpu ARGS="--platform tpu"
	$(MAKE) counts VENV="$(VENV)-cuda" EXTRAS=peers,cuda ARGS="--platform cuda"
	$(RUN) benchmarks/figures.py
	$(RUN) benchmarks/tables.py

counts: $(READY)
	$(RUN) benchmarks/counts.py $(ARGS)
	$(RUN) benchmarks/memory.py $(ARGS)

clean: ## Delete the environment, caches and builds; runs/ stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find bnjax benchmarks examples notebooks tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -e "$(OURS)" ]; then echo "rm -rf $(VENV)"; rm -rf "$(VENV)"; fi

# --- the environment -------------------------------------------------------
#
# $(READY) is written last and holds the checkout's path, so it is missing after an interrupted
# set-up and wrong in a copied checkout. Only a folder marked with $(OURS) is ever deleted.

SHOW_VERSION := -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])'
ifneq ($(wildcard $(VENV)),)
  READY_VERSION := $(shell { $(RUN) $(SHOW_VERSION); } 2>/dev/null)
  ASKED_VERSION := $(READY_VERSION)
  ifneq ($(origin PYTHON),file)
    ASKED_VERSION := $(shell { $(PYTHON) $(SHOW_VERSION); } 2>/dev/null)
  endif
  ifneq ($(shell cat $(READY) 2>/dev/null) $(or $(READY_VERSION),none),$(CURDIR) $(ASKED_VERSION))
    $(READY): FORCE
  endif
endif

$(READY): pyproject.toml
	@if [ -e "$(OURS)" ] && { [ ! -e "$@" ] || [ -n "$(filter FORCE,$^)" ]; }; then \
	  $(CHECK_PYTHON) && echo "Setting up $(VENV) anew." && rm -rf "$(VENV)"; \
	fi
	@rm -f "$@"
	@if [ ! -e "$(VENV)" ]; then \
	  $(CHECK_PYTHON) && mkdir -p "$(VENV)" && touch "$(OURS)" && $(CREATE); \
	elif [ "$(READY_VERSION)" != "$(ASKED_VERSION)" ] || [ ! -x $(RUN) ]; then \
	  echo "Error: $(VENV) was not made by this Makefile, and its Python is not" \
	    "the one asked for. Delete it, or choose another folder: make VENV=DIR" >&2; \
	  exit 1; \
	fi
	@echo "Installing bnjax and what its tests and examples need into $(VENV); the first time" \
	  "takes minutes."
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@echo "$(CURDIR)" >"$@"

FORCE:

ifneq ($(shell command -v uv 2>/dev/null),)
  # Without PYTHON, uv looks for a Python that pyproject.toml allows.
  CHECK_PYTHON := true
  CREATE := uv venv --quiet --allow-existing \
    $(if $(filter file,$(origin PYTHON)),,--python "$(PYTHON)") "$(VENV)"
  INSTALL := uv pip install --quiet --python "$(RUN)"
else
  CHECK_PYTHON := { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
    echo "Error: bnjax needs Python 3.11 or newer; \`$(PYTHON) --version\` says:" \
      "$$($(PYTHON) --version 2>&1 | head -n 1). Name a newer one: make PYTHON=python3.13" >&2; \
    exit 1; }; }
  CREATE := $(PYTHON) -m venv "$(VENV)"
  INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
endif
