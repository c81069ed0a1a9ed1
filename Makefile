# `make serve`: from nothing to five models on :8001. `make test`: everything CI runs.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
# One line that counts, in place of pip's hundreds.
COUNT = awk '/^Collecting/ { printf "\r   package %d", ++n; fflush() } END { print "" }'
# Where torch comes from when no wheel of it is at hand (PIP_FIND_LINKS). For a GPU:
# make serve TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH = torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

MODELS = mobilenet resnet lstm gpt bert
# Their checkpoints are in runs/quick, so that python -m train finds its own folders free.
ENTRIES = $(MODELS:%=models/%/1/model.onnx)
CPUS = $(shell nproc)
# So many trainings at once, the CPUs divided among them: one thread each is faster than taking turns with two.
JOBS ?= 2
THREADS = $(shell echo $$(( $(CPUS) > $(JOBS) ? $(CPUS) / $(JOBS) : 1 )))
# Each line says whose it is. Ctrl-C reaches this filter too, which must outlive the last message.
NAMED = 2>&1 | (trap '' INT; sed -u -e '/^next: /d' -e '/^$*: /!s/^/$*: /')
FLAGS ?=
# `make loadtest`: the runs, and a server that is there already instead of one of its own.
SUITE ?= loadtest/targets.toml
URL ?=

.DEFAULT_GOAL := help
.PHONY: help serve models entries test test-deploy lint loadtest bench proto clean
.SECONDARY:

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

# The stamp is older than the files that say what to install whenever these change.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== creating the environment in $(VENV) (about a minute, the first time only)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet -c constraints.txt pip
	@echo "== installing $(TORCH): a wheel at hand, or the one of $(TORCH_INDEX)"
	@$(PIP) install --quiet --no-index --no-deps $(TORCH) 2>/dev/null || \
	  $(PIP) install --no-deps --index-url $(TORCH_INDEX) $(TORCH) || \
	  { echo "$(TORCH) could not be had: name the folder of a wheel with PIP_FIND_LINKS=..., or another"; \
	    echo "index with make TORCH_INDEX=..."; exit 1; }
	@echo "== installing onnxedge and the tools"
	@$(PIP) install -c constraints.txt --group dev -e '.[images,text]' | $(COUNT)
	@touch $@

# The checkpoint is there after every epoch, so only the stamp says that training has ended.
runs/quick/%.trained: | $(VENV)/installed
	@if [ -e runs/quick/$*/checkpoint.json ]; then \
	  echo "== training of $* goes on from runs/quick/$*"; \
	  OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m train $* --resume --out runs/quick/$* $(NAMED); \
	else \
	  echo "== training $*: the quick recipe, about a minute"; \
	  OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m train $* --recipe quick --out runs/quick/$* $(NAMED); \
	fi
	@touch $@

models/%/1/model.onnx: | runs/quick/%.trained
	@echo "== exporting $* to ONNX"
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m export runs/quick/$* --to models $(NAMED)

entries: $(ENTRIES)
	@:

models: $(VENV)/installed ## train and export what `make serve` serves
	@$(MAKE) --no-print-directory --jobs $(JOBS) entries

serve: models ## train, export and serve on :8001, metrics on :8002
	@echo "== serving; Ctrl-C stops. In another terminal:"
	@echo "   $(BIN)/onnxedge infer mobilenet --image tests/data/boot.png"
	@echo "   $(BIN)/onnxedge generate gpt_generate 'ROMEO:'"
	@$(BIN)/onnxedge serve --model-repository models $(FLAGS)

lint: $(VENV)/installed ## ruff and mypy
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@echo "== mypy --strict"
	@$(BIN)/mypy

test: lint ## everything CI runs
	@echo "== tests"
	@$(BIN)/python -m pytest

test-deploy: models ## image, ARM emulation, systemd, proxies: as root on Debian, a quarter of an hour
	@deploy/docker/build_without_registry.sh
	@deploy/arm64/try_under_emulation.sh
	@deploy/systemd/try_on_debian.sh
	@$(BIN)/python -m tests.deploy.proxies runs/proxies
	@$(BIN)/python -m tests.deploy.rolling_restarts

loadtest: models ## a minute of load on what `make serve` serves, and a verdict on loadtest/targets.toml
	@$(BIN)/python -m loadtest suite $(SUITE) --out runs/loadtest $(if $(URL),--url $(URL),--serve models)

bench: $(VENV)/installed ## timings on this machine, printed, not judged
	@for script in tests/benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

proto: $(VENV)/installed ## generate serve/pb/ from proto/
	@$(BIN)/python -m grpc_tools.protoc -Iserve/pb=proto --python_out=. --pyi_out=. serve/pb/model_config.proto
	@$(BIN)/python -m grpc_tools.protoc -Iserve/pb=proto --python_out=. --pyi_out=. --grpc_python_out=. \
	  serve/pb/grpc_service.proto

clean: ## remove the environment and caches; runs/ and models/ stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
