# make demo   pictures from the toybox, composed by every method      make test   everything that CI checks
# Both set up what they need in .venv. PYTHON=python3.12 chooses another Python, 3.10 or newer.
#
# The first run downloads 81 packages, torch's among them: 0.3 GB, 1.5 GB on the disk, with torch's build for processors.
# On Linux pip takes its build for NVIDIA cards, some gigabytes more; where the smaller one is wanted, install it into
# .venv first, or name its index to pip (PIP_EXTRA_INDEX_URL).

PYTHON ?= python3
PORT ?= 7861
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: help demo serve test lint pytest venvs clean

help:
	@sed -n 's/^# //p' Makefile | head -2
	@echo "make serve  the toybox as a page, PORT=7861                   make lint   only style, types, import contracts, table of knobs"
	@echo "make clean  remove the virtual environments and caches"

demo: $(VENV)/standalone
	@echo "== Three of the toybox's LoRAs by every method, and two characters in their places, into loratorio-demo/"
	@$(BIN)/loratorio demo
	@echo "The command is $(BIN)/loratorio: $(BIN)/loratorio generate --help"

serve: $(VENV)/standalone
	@$(BIN)/loratorio demo --serve --port $(PORT)

test: lint venvs pytest

lint: $(VENV)/dev
	@echo "== ruff, mypy, the import contracts and README's table of knobs"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/loratorio-lab knob-table --check

pytest: $(VENV)/dev
	@echo "== pytest (ten minutes and more on two cores)"
	@$(BIN)/python -m pytest

# The WebUIs' Gradio versions, for the tests of the panel. Without them those tests are skipped, and say so.
venvs:
	@echo "== Gradio 3 and 4, as the WebUIs have them, in .venvs"
	@sh tests/webui_page/make_venvs.sh || echo "WARNING: the panel will not be tested: its Gradio versions could not be installed." >&2

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "This needs Python 3.10 or newer as $(PYTHON). Name another: make PYTHON=python3.11" >&2; exit 1; }
	@echo "== A virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/torch: $(VENV)/python constraints.txt
	@echo "== torch (the largest download; minutes)"
	@$(PIP) -c constraints.txt torch
	@touch $@

$(VENV)/standalone: $(VENV)/torch pyproject.toml
	@echo "== LoRAtorio and what it needs without a WebUI"
	@$(PIP) -c constraints.txt -e '.[standalone]'
	@touch $@

$(VENV)/dev: $(VENV)/standalone
	@echo "== The tools for testing"
	@$(PIP) -c constraints.txt -e '.[standalone,dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venvs .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
