# Two commands for a newcomer: `make demo` and `make test`. Both make .venv and install into it what they need.

PYTHON ?= python3
VENV ?= .venv
# The index of PyTorch's CPU builds, for Linux machines without an NVIDIA driver. Set it to nothing to leave it out.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TRANSFORMERS_VERSION := $(shell sed -n 's/^transformers==//p' constraints.txt)
# Arguments for pytest, such as ARGS="tests/cli -x".
ARGS ?= -n auto --maxprocesses=8 --dist worksteal
# Where `test-sglang` keeps SGLang and its versions of everything, and its arguments for pytest: two servers at a time,
# one of each module or class.
SGLANG_VENV ?= .venv-sglang
SGLANG_ARGS ?= -n 2 --dist loadscope
# Where `test-lmms` keeps lmms-eval and what it brings.
LMMS_VENV ?= .venv-lmms
# Versions of transformers that `test-hosts` runs, oldest first, where it keeps each, and its arguments for pytest.
HOSTS ?= 5.17.0 5.19.0 $(TRANSFORMERS_VERSION)
HOSTS_VENV ?= .venv-hosts
HOSTS_ARGS ?= tests/hf tests/cache tests/token_pruning tests/calibration
# Where `evals-quick` writes; results are never overwritten.
QUICK := $(or $(QUICK),runs/quick-$(shell date +%Y%m%d-%H%M%S))
# Where `gpu` writes, and its Python: machines with a GPU often have one with all that is needed, and no network.
GPU := $(or $(GPU),runs/gpu-$(shell date +%Y%m%d-%H%M%S))
GPU_PYTHON ?= $(or $(wildcard $(VENV)/bin/python),$(PYTHON))
# The demo's own: IMAGE=page.png QUESTION="row 3?" MODEL=name-or-path SPARSITY=0.75 OUT=folder
export IMAGE QUESTION MODEL SPARSITY OUT

# How the C++ of the kernels is laid out.
CLANG_STYLE := {BasedOnStyle: Google, IndentWidth: 4, ColumnLimit: 120, AllowShortCaseLabelsOnASingleLine: true, \
	AccessModifierOffset: -2}
CPP := kernels/rotatek_kernels/cpu/*

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# With bytecode: where Python is told to write none, every process would compile what it imports.
INSTALL := $(PIP) install

.DEFAULT_GOAL := help
.PHONY: help demo demo-sglang test test-hosts test-sglang test-lmms evals-quick gpu gpu-compiled report lint format clean

help:  ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo 'The demo takes IMAGE=page.png QUESTION="row 3?" MODEL=name-or-path SPARSITY=0.75 OUT=folder; test takes ARGS=...'

demo: $(VENV)/.demo  ## Read a page with the dense cache and with RotateKCache; print and draw what that gives
	$(strip $(BIN)/rotatek demo $(if $(IMAGE),--image "$$IMAGE") $(if $(QUESTION),--question "$$QUESTION") \
		$(if $(MODEL),--model "$$MODEL") $(if $(SPARSITY),--sparsity "$$SPARSITY") $(if $(OUT),--out "$$OUT"))

test: $(VENV)/.dev  ## Run the tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(ARGS)

test-hosts:  ## Run the tests that concern transformers on its oldest, a middle and its newest version
	@failed=; for version in $(HOSTS); do \
		$(MAKE) --no-print-directory VENV="$(HOSTS_VENV)/$$version" "$(HOSTS_VENV)/$$version/.host" && \
		echo "transformers $$version" && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
			"$(HOSTS_VENV)/$$version/bin/python" -m pytest $(HOSTS_ARGS) $(filter-out tests%,$(ARGS)) || \
			failed="$$failed $$version"; \
	done; if [ -n "$$failed" ]; then echo "FAILED on transformers$$failed" >&2; exit 1; fi

demo-sglang:  ## Serve a tiny random model with SGLang on the CPU, compressed, and ask it about an image
	PYTHON="$(PYTHON)" tests/integrations/sglang/make_env.sh "$(SGLANG_VENV)"
	$(SGLANG_VENV)/bin/python -m rotatek_sglang.demo

test-sglang:  ## Run the tests of the SGLang plug-in, servers on the CPU included
	PYTHON="$(PYTHON)" tests/integrations/sglang/make_env.sh "$(SGLANG_VENV)"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(SGLANG_VENV)/bin/python -m pytest tests/integrations/sglang $(SGLANG_ARGS)

test-lmms:  ## Run lmms-eval itself with our plug-in, and our metrics against its own
	$(MAKE) --no-print-directory VENV="$(LMMS_VENV)" "$(LMMS_VENV)/.lmms"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(LMMS_VENV)/bin/python -m pytest tests/integrations/test_lmms_eval.py tests/evals/test_metrics.py

# One thread: a small model gains nothing by two, and loses much where a machine is busy.
evals-quick: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)
evals-quick: $(VENV)/.evals  ## Accuracy, diagnostics and latency of the reader with a report, in some minutes
	$(BIN)/python -m evals.accuracy --config evals/settings/quick.yaml --out $(QUICK)/accuracy_reader
	$(BIN)/python -m evals.diagnostics --samples 8 --pages 64 --out $(QUICK)/diagnostics_reader.json --figures $(QUICK)
	$(BIN)/python -m evals.bench.latency --shape four-layers --contexts 512 1024 --tokens 16 --rounds 3 --device cpu \
		--out $(QUICK)/latency_four_layers.json
	$(BIN)/python -m evals.report --results $(QUICK) --out $(QUICK)/report

gpu gpu-compiled: export PYTHONPATH := .:kernels:integrations$(if $(PYTHONPATH),:$(PYTHONPATH))

gpu:  ## On an NVIDIA GPU, in four minutes: tests, decode table, splits, seals, tokens of an 8B model
	$(GPU_PYTHON) -m evals.bench.gpu --out $(GPU)

gpu-compiled:  ## The same beside StaticCache as transformers compiles it, a minute a length
	$(GPU_PYTHON) -m evals.bench.gpu --only compile compiled --out $(GPU)

report: $(VENV)/.evals  ## One page, report/report.html, out of the stored results
	$(BIN)/python -m evals.report --results evals/results --out report

lint: $(VENV)/.dev  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --style='$(CLANG_STYLE)' --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff format
	$(BIN)/clang-format --style='$(CLANG_STYLE)' -i $(CPP)

# On CPU builds of torch the torchvision of lmms-eval cannot be imported, and transformers would try.
$(VENV)/.lmms: $(VENV)/.torch pyproject.toml
	$(INSTALL) --quiet --quiet -c constraints.txt -e ".[dev,lmms]"
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
		$(PIP) uninstall --quiet --yes torchvision timm; fi
	@touch $@

# An older transformers wants an older hub client.
$(VENV)/.host: $(VENV)/.torch pyproject.toml
	sed -E '/^(transformers|huggingface_hub)==/d' constraints.txt > $(VENV)/constraints.txt
	$(INSTALL) --quiet --quiet -c $(VENV)/constraints.txt "transformers==$(notdir $(VENV))" -e ".[dev]"
	@touch $@

clean:  ## Remove what these commands made
	rm -rf $(VENV) $(SGLANG_VENV) $(LMMS_VENV) $(HOSTS_VENV) build dist demo_output report *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The CPU build of torch saves gigabytes where no NVIDIA driver could use the CUDA build. In order: a wheel at hand in a
# folder that pip is configured to look into, PyTorch's CPU index if it answers, the default index.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo 'Python lacks venv (on Debian: apt install python3-venv)' >&2; exit 1; }
	@if nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
		set -x; $(INSTALL) torch==$(TORCH_VERSION) -c constraints.txt; \
	elif $(INSTALL) --quiet --no-index --no-deps torch==$(TORCH_VERSION) 2>/dev/null; then \
		echo 'torch $(TORCH_VERSION) installed from a local wheel'; \
	elif [ -n "$(TORCH_INDEX)" ] && $(BIN)/python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=10)' \
			"$(TORCH_INDEX)/torch/" 2>/dev/null; then \
		set -x; $(INSTALL) torch==$(TORCH_VERSION)+cpu -c constraints.txt --extra-index-url "$(TORCH_INDEX)"; \
	else \
		set -x; $(INSTALL) torch==$(TORCH_VERSION) -c constraints.txt; \
	fi
	@touch $@

$(VENV)/.demo $(VENV)/.evals $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	@echo 'Installing into $(VENV), some minutes the first time'
	$(INSTALL) --quiet --quiet -c constraints.txt -e ".[$*]"
	@touch $@
