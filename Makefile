# Every target does its own set-up in .venv.
PYTHON ?= python3
# On a machine without a GPU a CPU build is smaller: make demo PIP_EXTRA_INDEX_URL=<CPU index of PyTorch>
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint format train clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## Assemble the embedded VLM, calibrate a guard, compare, report
	$(BIN)/vlm-safeguard demo -o report

test: $(VENV)/.installed  ## All tests
	$(BIN)/python -m pytest

lint: $(VENV)/.installed  ## ruff, mypy, import-linter
	$(BIN)/ruff check src tests training
	$(BIN)/ruff format --check src tests training
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff format src tests training
	$(BIN)/ruff check --fix src tests training

train: $(VENV)/.installed  ## Train the embedded VLM's own weights again (about 90 minutes on 2 cores)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[training]"
	$(BIN)/python -m training.vision_tower --cache training/cache --out training/out/vision_tower
	$(BIN)/python -m training.self_answers --cache training/cache --out training/out
	$(BIN)/python -m training.align --cache training/cache --out training/out
	$(BIN)/python -m training.visual_tuning projector --cache training/cache --out training/out
	$(BIN)/python -m training.visual_tuning joint --cache training/cache --out training/out
	$(BIN)/python -m training.realign --cache training/cache --out training/out
	$(BIN)/python -m training.package_weights --out training/out
	$(BIN)/python -m training.measure --cache training/cache

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
