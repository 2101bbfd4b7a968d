# `make demo` and `make test` work on a fresh machine: the first one to run sets up .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-gpt test check clean

# Four ranks run on the CPU where a host has GPUs, but fewer than four.
DEVICE = launch.device=$$($(BIN)/python -m hybrid.launch.devices 4)

demo: $(INSTALLED)
	$(BIN)/hybrid compare launch/jobs/mnist.toml --nproc 4 --set $(DEVICE) --out out/demo

demo-gpt: $(INSTALLED)
	$(BIN)/hybrid compare launch/jobs/gpt_demo.toml --strategies single,fsdp,2d \
	  --set $(DEVICE) --out out/demo-gpt
	$(BIN)/hybrid generate out/demo-gpt/2d --prompt "def " --tokens 300

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 3 --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build hybrid.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or later is needed, as PYTHON=...; $(PYTHON) is: $$($(PYTHON) -V 2>&1)"; \
	  exit 1; }
	@echo "[1/2] virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/2] packages, a few minutes this once"
	@$(BIN)/pip install -qq --disable-pip-version-check --no-compile \
	  -e '.[demo,text,track,report,dev]'
	@# pip would compile on one core, and no editable package; templates of some packages cannot be.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV) hybrid tests benchmarks || true
	@touch $@
