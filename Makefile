# The environment lies in .venv. For a CUDA build of torch: change torch's line in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-slow test-serving lint types clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Quantize the bundled Llama, evaluate it beside the original, let it speak.
demo: setup
	$(BIN)/quantkit quantize llama --recipe fireq --overwrite
	$(BIN)/quantkit eval llama-fireq --ppl sample
	$(BIN)/quantkit generate llama-fireq "And it came to pass" --max-new-tokens 32

test: setup
	$(BIN)/python -m pytest -n 2 -m 'not slow and not gpu and not serving'

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu and not serving'

# With vLLM's CPU build in an environment of its own, whose interpreter $$QUANTKIT_VLLM_PYTHON names.
test-serving: setup
	$(BIN)/python -m pytest -m serving tests/serving

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info llama-*
