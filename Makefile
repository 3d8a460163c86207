# Two commands do everything, set-up included: `make digits` and `make test`; `make demo` shows what they made, and
# `make gpu` measures on a GPU.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: digits demo table1 gpu test test-all lint format docs notebook dist clean

# The main job: train a shortcut model on real images, sample it in 1 ... 128 steps, print the table.
digits: $(STAMP)
	$(BIN)/python recipes/digits.py $(ARGS)

# A page to play with the digits in the browser; trains them first if no run has finished.
demo: $(STAMP)
	ls runs/digits/*/weights.safetensors > /dev/null 2>&1 || $(MAKE) digits ARGS=
	$(BIN)/shortcutflow demo runs/digits --open $(ARGS)

# The paper's table 1 on digits: every objective, equal compute, three seeds; about an hour on two cores.
table1: $(STAMP)
	$(BIN)/python benchmarks/table1.py $(ARGS)

# Everything that needs a GPU: tests, speed, memory, CIFAR-10; under 25 minutes on one H100, goes on where it stopped.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# What CI runs: lint, types, import contracts, then all tests but the slow ones.
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site: every link, anchor and documented name must exist, and nothing may come from another host.
# Not --quiet, under which mkdocs counts no warnings and --strict passes whatever is wrong.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep -rnE '<(script|img|link)[^>]+(src|href)="?(https?:)?//' build/site --include '*.html'

# Runs the notebook, writes its outputs into it, and the page docs/two_dimensions.md from both.
notebook: $(STAMP)
	$(BIN)/python notebooks/build.py $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The package, sdist and wheel, as it is uploaded.
dist: $(STAMP)
	rm -f dist/shortcutflow-*
	$(BIN)/python -m hatchling build
	$(BIN)/python -m twine check --strict dist/*

# constraints.txt pins what was tested; pyproject.toml says what works.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# clean-fid and timm ask for torchvision, whose newer builds crash beside a torch they were not built for; 0.15.2 loads
	# beside any. Where it cannot be had (Python 3.12 on) the tests that need it are skipped and say so.
	-$(BIN)/python -m pip install --quiet --no-deps clean-fid==0.1.35 timm==1.0.31 torchvision==0.15.2
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
