# Every command works on a fresh machine with Python 3.11 or newer; the first one makes .venv and installs into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all test-oldest lint types docs clean

install: $(STAMP)

# torch first and on its own: a CPU build of this version, from an extra index, counts as newer than PyPI's CUDA build.
# TorchRec last and without its dependencies: they are FBGEMM's build for CUDA and a torchmetrics that is older than
# Lightning's; the rest of them is in the extra `distributed`. Of 27,000 Python files most are never imported: they are
# compiled when they are.
$(STAMP): pyproject.toml constraints.txt
	@echo "Making $(VENV) and installing the pinned packages (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)" --constraint constraints.txt
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable ".[ann,dev,distributed,docs,judgements,onnx,pgvector,ray,serve,tensorboard,text,tracking,tune]"
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps $$(grep -E '^(torchrec|fbgemm-gpu-cpu)==' constraints.txt)
	@touch $(STAMP)
	@echo "Installed: $(BIN)/twotower"

demo: install
	$(BIN)/twotower train movielens-100k --set data.split=leave-last-out --out demo/movielens-100k --force
	$(BIN)/twotower recommend demo/movielens-100k --query 1 --query 42 --query 300
	@echo
	@echo "That was a real model on real data. Try next:"
	@echo "  $(BIN)/twotower similar demo/movielens-100k --item 50           # like Star Wars"
	@echo "  $(BIN)/twotower recommend demo/movielens-100k --history 50,181,172"
	@echo "  $(BIN)/twotower evaluate demo/movielens-100k --json"
	@echo "  $(BIN)/twotower train YOUR.parquet --out my-model"
	@echo
	@echo "And look at it: start the service, open http://127.0.0.1:8000/ in a browser, stop it with Ctrl-C."
	@echo "  $(BIN)/twotower serve demo/movielens-100k"

# Files of tests in so many processes of one thread each: two threads gain nothing on tensors as small as theirs. In
# their own order: by the number of its tests the README, which takes minutes, would come last and alone.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST)

test-all: install
	$(PYTEST) -m "slow or not slow"

# The declared lower bounds of the dependencies and of the extras `serve` and `judgements`, in an environment of their
# own; the tools of the tests are the newest. PyPI has only the CUDA build of an old torch, about 4 GB. Old versions use
# names that newer versions of their own dependencies deprecate, so DeprecationWarning is no error here.
OLDEST := .venv-oldest
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra judgements --extra serve pyproject.toml --output-file $(OLDEST)/oldest.txt
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --requirement $(OLDEST)/oldest.txt --no-deps --editable .
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --requirement $(OLDEST)/oldest.txt bm25s httpx hypothesis pandas pyarrow pytest pytest-timeout
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -W ignore::DeprecationWarning tests/data tests/system tests/serving/test_retriever.py tests/training tests/run tests/cli

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(OLDEST) site demo .mypy_cache .pytest_cache .ruff_cache
