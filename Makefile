# Every target that runs something first makes the virtual environment .venv and installs everything into it.
# A stamp file remembers that, so a second call starts at once. No shell activation is needed.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first of these that is a suitable Python; name another with `make PYTHON=/path/to/python3.12 ...`.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(or $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(SUITABLE)' 2>/dev/null && echo $$python && break; done),python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# setuptools and wheel come first: the packages that are published as source only are built with these versions.
BUILD_TOOLS = $$(sed -nE 's/^((setuptools|wheel)==[^ ]+).*/\1/p' requirements.txt)
# For example: make test ARGS="tests/networks -k vgg"
ARGS ?=
# One process for each core, each with one thread. The tests of a file stay together, because they share what is slow.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile -ra --durations=15

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint bench gpu soak clean distclean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## make .venv and install everything into it

demo: $(STAMP)  ## the whole comparison on generated data; report in output/demo (about 6 minutes on 2 cores)
	$(BIN)/python projects/coco_transfer/run.py --scale demo --parallel 2 --output output/demo $(ARGS)

test: $(STAMP)  ## all tests but those marked slow
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)  ## all tests
	$(PYTEST) $(ARGS)

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check $(or $(ARGS),.)

bench: $(STAMP)  ## speed beside plain torch and torchvision, of what the machine can run; reports in output/bench
	@mkdir -p output/bench
	for what in pretrain data detect evaluate; do \
		$(BIN)/python tools/benchmark.py $$what --json output/bench/$$what.json $(ARGS) > output/bench/$$what.md || exit; \
		cat output/bench/$$what.md; \
	done

gpu: $(STAMP)  ## on a GPU: the tests that need one and the benchmarks; report in output/gpu (ARGS="--parts tests data")
	$(BIN)/python tools/check_gpu.py $(ARGS)

soak: $(STAMP)  ## a detector through kills, full disks and resumes (10 minutes); report in output/soak (ARGS="--data TRAIN TEST")
	$(BIN)/python projects/soak/run.py --output output/soak $(ARGS)

clean:  ## remove build outputs and caches; keeps .venv and output/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV)

$(STAMP): requirements.txt requirements-dev.txt setup.py tools/install_detectron2.py
	@command -v $(PYTHON) >/dev/null || \
	{ echo 'No Python found ($(PYTHON)); install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -c '$(SUITABLE)' || \
	{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo 'Installing into $(VENV); torch and its CUDA libraries are a download of about 3 GB.'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(BUILD_TOOLS)
	$(PIP) install --quiet --no-build-isolation --requirement requirements-dev.txt
	$(BIN)/python tools/install_detectron2.py
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) check
	@touch $@
