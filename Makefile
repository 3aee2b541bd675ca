# Every target does its own set-up: a virtual environment in .venv, filled from requirements.lock, refilled when that changes.
SHELL := /bin/bash
.DELETE_ON_ERROR:

VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST_ARGS ?= -q -n 2 --dist loadfile --no-loadscope-reorder
DEMO := recipes/smollm2_cpu
DEMO_SAMPLES ?= 120

.PHONY: help venv demo test quick lint lock

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(STAMP)  ## make the virtual environment (.venv)

$(STAMP): requirements.lock pyproject.toml
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "error: no C++ compiler found; install g++ (or clang as c++)"; exit 1; }
	@if [ ! -x $(PY) ]; then \
	  for name in python3.12 python3.11 python3 python; do \
	    if $$name -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then found=$$name; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "error: Python 3.11 or 3.12 is needed and neither is on PATH; install one"; exit 1; fi; \
	  echo "creating $(VENV) with $$($$found --version)"; \
	  $$found -m venv $(VENV) || { rm -rf $(VENV); echo "error: python -m venv failed; Debian and Ubuntu want the package python3-venv"; exit 1; }; \
	fi
	DS_BUILD_OPS=0 $(PY) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --disable-pip-version-check -e .
	@touch $@

test: $(STAMP)  ## run all tests that this machine can run (GPU tests are skipped without a GPU)
	$(PY) -m pytest $(PYTEST_ARGS)

quick: $(STAMP)  ## run the fast tests, in under 90 seconds
	$(PY) -m pytest $(PYTEST_ARGS) -m "not slow"

lint: $(STAMP)  ## run ruff over everything
	$(PY) -m ruff check .

lock: $(STAMP)  ## write the versions that .venv holds into requirements.lock
	@{ grep '^#' requirements.lock; $(PY) -m pip freeze --exclude-editable --exclude setuptools --exclude pip --exclude wheel | sed 's/+cpu$$//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock && git --no-pager diff --stat requirements.lock

demo: export PATH := $(abspath $(VENV))/bin:$(PATH)
demo: $(STAMP)  ## SmolLM2 on two CPU processes: capture, train, export, measure the acceptance length, report
	tools/fetch_embedded_target.py
	tools/prepare_hidden_states.py --recipe $(DEMO).json --limit $(DEMO_SAMPLES) --limit-eval 12 --device cpu,cpu
	deepspeed --num_gpus 2 $(DEMO).sh
	tools/export_draft.py runs/smollm2_cpu
	tools/eval_acceptance.py --recipe $(DEMO).json --baseline untrained --num-prompts 12 --max-new-tokens 48 --processes 2
	tools/make_report.py runs/smollm2_cpu
	@echo 'done: open runs/smollm2_cpu/report.html'
