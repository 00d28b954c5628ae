# make demo   one picture in, views, mesh and film in out/demo
# make test   what CI runs: ruff, mypy and the tests of the installed package
# Needs Python >= 3.10 and make; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
# A fixed version: a plain "torch" takes whatever is newest. For the CPU build from PyTorch's own index, or
# another version, set TORCH to what pip should be given.
TORCH ?= torch==2.13.0
PICTURE ?= examples/robot.png
OUT ?= out/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# Folders are listed too, so that a file that is gone counts as a change.
SOURCES := __init__.py py.typed setup.py \
	$(shell find engine kernels export benchmarks -not -path '*__pycache__*' -not -name '.*' 2>/dev/null)

.PHONY: demo test install clean

demo: $(VENV)/.package
	$(BIN)/imagedream-rt generate $(PICTURE) -o $(OUT)

test: $(VENV)/.dev $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --durations=25

install: $(VENV)/.package

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "imagedream-rt needs Python 3.10 or newer: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

# Not editable: the demo and the tests use what a user gets. build/ goes first, or modules that are gone since
# the last build would be packed again.
$(VENV)/.package: $(VENV)/.torch pyproject.toml README.md LICENSE $(SOURCES)
	rm -rf build
	$(PIP) .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml | $(VENV)/.package
	rm -rf build
	$(PIP) ".[dev]"
	@touch $@
