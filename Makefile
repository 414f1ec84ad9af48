# `make` lists the targets. Needs Python 3.11 or newer with pip, and bash; everything else lands in .venv.
#
#   PYTHON=...   the Python that .venv is made from (default: the first of python3, python3.13, python3.12,
#                python3.11 that is 3.11 or newer)
#   GPU_PYTHON=...  the Python that `make gpu` uses (default: python3)
#   MINUTES=...  for the benchmarks of `make gpu` (default: 6, so that all of it fits ten)
#   ARGS=...     further arguments for `make demo`, `make bench`, `make gpu`, `make conformance`
#                (architectures: `make conformance ARGS='llama t5'`) and `make matrix` (see
#                tests/matrix.py); for a few tests: `make tests ARGS='-k fork'`

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-all checks lint format types tests slow test-browser pictures conformance setup-services docs diagrams matrix vllm sglang crash storm simulate bench bench-scheduler bench-kernels bench-generate bench-prompts bench-tiers bench-memory bench-same-tokens bench-throughput gpu clean

PYTHON ?= python3 python3.13 python3.12 python3.11
GPU_PYTHON ?= python3
MINUTES ?= 6
ARGS ?=

BIN := .venv/bin
STAMP := .venv/ready
ROOT := $(CURDIR)
CODE := kvpager kernels integrations

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 24

demo: $(STAMP) ## see paging at work: a small model, on the CPU, offline
	@mkdir -p build && $(BIN)/kvpager demo --report build/demo.html $(ARGS)

test: lint checks ## before every commit: lint, types, the tests that are quick

test-all: lint checks slow test-browser ## all that CI checks, and `make vllm` and `make sglang` if their environments can be made
	@$(MAKE) --no-print-directory vllm OPTIONAL=1
	@$(MAKE) --no-print-directory sglang OPTIONAL=1

# mypy keeps one core busy for a minute, and the tests end on one: together they fill both.
checks: $(STAMP)
	@$(MAKE) --no-print-directory -j2 types tests

lint: $(STAMP) ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP) ## fix and format the code with ruff
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

types: $(STAMP) ## mypy --strict over the library
	@$(BIN)/mypy kvpager

tests: $(STAMP) ## the quick tests alone
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m 'not slow and not browser' $(ARGS)

slow: $(STAMP) ## the slow tests alone: every architecture, compilers, wheels, long simulations
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m slow $(ARGS)

test-browser: $(STAMP) ## the page of `kvpager report` in Debian's chromium, which `make setup-services` installs
	@$(BIN)/python -m pytest -q -rs -m browser tests/report $(ARGS)

docs: $(STAMP) ## the documentation as a site, in build/site; needs no network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

diagrams: $(STAMP) ## draw the diagrams of the documentation
	@$(BIN)/python docs/diagrams

pictures: $(STAMP) ## take the README's picture of the report of `make demo`, in chromium
	@mkdir -p build && $(BIN)/kvpager demo --report build/demo.html
	@$(BIN)/python docs/diagrams/pictures.py build/demo.html

conformance: $(STAMP) ## every architecture of transformers in every mode, patched and not; renews docs/models.md
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.report $(ARGS)

setup-services: ## install what some tests start: Debian's redis-server, for TLS, and chromium, for the browser tests
	@apt=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get); \
	[ "$$(id -u)" = 0 ] || apt=(sudo -n "$${apt[@]}"); \
	for program in redis-server chromium; do \
	  if command -v "$$program" >/dev/null; then continue; fi; \
	  { "$${apt[@]}" -qq update && "$${apt[@]}" -qqy install --no-install-recommends "$$program"; } >/dev/null \
	  || echo "make setup-services: cannot install $$program here; the tests that need it are skipped."; \
	done

matrix: ## the tests on the oldest and newest releases of Python, torch and transformers, in .venv-matrix
	@python=$$(command -v $(PYTHON) | head -n 1); "$$python" tests/matrix.py $(ARGS)

# OPTIONAL=1: without the environment, as on a machine without a network, the tests are skipped.
vllm: $(STAMP) ## kvpager's tiers below vLLM itself, on the CPU, in .venv-vllm (1.3 GB, made once)
	@if $(BIN)/python -m tests.environments.vllm; then \
	  HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -q -n 2 --dist loadfile -o filterwarnings= -o faulthandler_timeout=900 tests/integrations/vllm $(ARGS); \
	elif [ -n "$(OPTIONAL)" ]; then echo "make vllm: skipped, because its environment cannot be made."; \
	else exit 1; fi

sglang: $(STAMP) ## kvpager's stores below SGLang itself, on the CPU, in .venv-sglang over .venv-vllm (made once)
	@if $(BIN)/python -m tests.environments.sglang; then \
	  HF_HUB_OFFLINE=1 .venv-sglang/bin/python -m pytest -q -o filterwarnings= -o faulthandler_timeout=900 tests/integrations/sglang $(ARGS); \
	elif [ -n "$(OPTIONAL)" ]; then echo "make sglang: skipped, because its environment cannot be made."; \
	else exit 1; fi

crash: $(STAMP) ## the disk store: 1,000 killed processes and power losses, flipped bits, damage; ARGS='--kills 50' for fewer
	@$(BIN)/python tests/crash.py $(ARGS)

storm: $(STAMP) ## 100,000 requests that end at random moments while tiers fetch and save; takes minutes
	@KVPAGER_STORM=100000 $(BIN)/python -m pytest -q -m slow -o faulthandler_timeout=1800 tests/engine/test_storms.py $(ARGS)

simulate: $(STAMP) ## 100,000 requests through the scheduler, at random; ARGS='--requests 1e6 --seed 7' for others
	@$(BIN)/python -m tests.support.serving_simulation --requests 1e5 --processes 2 $(ARGS)

bench: $(STAMP) ## what the control plane costs, a JSON line for each figure
	@$(BIN)/python benchmarks/control_plane.py $(ARGS)

bench-scheduler: $(STAMP) ## what planning a step costs
	@$(BIN)/python benchmarks/scheduler.py $(ARGS)

bench-kernels: $(STAMP) ## the CPU kernels beside torch's own, and vLLM's with ARGS='--vllm PATH'
	@$(BIN)/python benchmarks/kernels_cpu.py $(ARGS)

bench-generate: $(STAMP) ## what a token costs in generate, paged and not
	@$(BIN)/python benchmarks/generate.py $(ARGS)

bench-prompts: $(STAMP) ## what beams, shared beginnings and padding cost, paged and not
	@$(BIN)/python benchmarks/prompts.py $(ARGS)

bench-tiers: $(STAMP) ## stores of cached blocks beside the raw device and client; one part with ARGS='--only first-token'
	@$(BIN)/python benchmarks/tiers.py $(ARGS)

bench-memory: $(STAMP) ## what keys and values take; draws it with ARGS='--plot FILE.svg'
	@$(BIN)/python benchmarks/memory.py $(ARGS)

bench-same-tokens: $(STAMP) ## share of replies equal to DynamicCache's, by dtype
	@$(BIN)/python benchmarks/same_tokens.py $(ARGS)

bench-throughput: $(STAMP) ## continuous batching beside its peers; vLLM with ARGS='--vllm-python PATH'
	@$(BIN)/python benchmarks/throughput.py $(ARGS)

# Runs in the Python that is there: a GPU machine has its own torch, which nothing here may replace.
gpu: ## the GPU tests and benchmarks, in the current Python, where torch finds a GPU
	@state=0; $(GPU_PYTHON) -c "$$GPU_PROBE" || state=$$?; \
	case $$state in 0) ;; 3) exit 0 ;; *) exit $$state ;; esac; \
	workers=$$($(GPU_PYTHON) -c "$$GPU_WORKERS"); \
	$(GPU_PYTHON) -m pytest -m gpu tests $$workers $(ARGS) || state=$$?; \
	if [ $$state = 5 ]; then echo "make gpu: no test is marked gpu, so nothing was checked."; exit 1; fi; \
	$(GPU_PYTHON) benchmarks/gpu.py --minutes $(MINUTES) || state=$$?; \
	exit $$state

define ON_THE_PATH
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "kvpager-checkout.pth").write_text(sys.argv[1] + "\n")
endef
export ON_THE_PATH

define GPU_PROBE
import sys
try:
    import torch
except ImportError as error:
    print(f"make gpu: skipped, because torch cannot be imported by {sys.executable}: {error}")
    print("          (another Python: make gpu GPU_PYTHON=/path/to/python)")
    sys.exit(3)
if not torch.cuda.is_available():
    print(f"make gpu: skipped, because torch {torch.__version__} finds no GPU on this machine.")
    sys.exit(3)
print(f"make gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}")
endef
export GPU_PROBE

# Most of the tests' time is compiling, which workers do at once.
define GPU_WORKERS
import importlib.util, os
if importlib.util.find_spec("xdist"):
    print(f"-n {max(1, min(12, (os.cpu_count() or 2) - 2))}")
endef
export GPU_WORKERS

clean: ## remove .venv, caches and builds
	rm -rf .venv .venv-matrix .venv-sglang .venv-vllm .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find $(CODE) tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One environment, remade when what it holds is to change. A Python without ensurepip (some Linux
# distributions keep it in a package of its own) still works: its pip fills the environment from outside.
# This folder is put on the path as well: otherwise a program started beside a checkout named kvpager
# would import the checkout, as a namespace package.
$(STAMP): pyproject.toml constraints.txt
	@set -euo pipefail; \
	python=; \
	for candidate in $(PYTHON); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or newer among: $(PYTHON). Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	start=$$SECONDS; \
	echo "Setting up .venv with $$("$$python" --version) (once; PyTorch makes it a minute or more) ..."; \
	if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  "$$python" -m venv --clear .venv >/dev/null 2>&1 || "$$python" -m venv --clear --without-pip .venv; \
	fi; \
	if $(BIN)/python -m pip --version >/dev/null 2>&1; \
	then pip=($(BIN)/python -m pip); \
	else pip=("$$python" -m pip --python $(BIN)/python); fi; \
	"$${pip[@]}" install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	$(BIN)/python -c "$$ON_THE_PATH" "$(ROOT)"; \
	touch $(STAMP); \
	echo "Ready after $$((SECONDS - start)) s: $$($(BIN)/python -c 'import importlib.metadata as m; print(", ".join(f"{n} {m.version(n)}" for n in ("torch", "transformers", "numpy")))')"
