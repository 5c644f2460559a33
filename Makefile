# Every target starts from nothing: it makes the environment if there is none.
# PROFILE=smoke|demo|medium|bench|paper  what `make repro` builds (default: what the line `run:` of params.yaml says)
# JOBS=n                                 stages or tests side by side (default: the number of cores)
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
PROFILE ?=
JOBS    ?=
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
export DVC_NO_ANALYTICS := 1
export PYTHONDONTWRITEBYTECODE := 1
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: setup repro test coverage docs lab bench bench-metrics corpus real export clean help
.DEFAULT_GOAL := help

setup: $(VENV)/.stamp  ## make the environment in .venv: every package at its pinned version

$(VENV)/.stamp: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "talkingface needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps face-alignment==1.5.0
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# espeak-ng is GPL-3: only rebuilding the corpus (and testing that) installs it
$(VENV)/.stamp-corpus: $(VENV)/.stamp requirements-corpus.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-corpus.txt
	@touch $@

data: $(VENV)/.stamp data.dvc
	$(BIN)/dvc pull --quiet data.dvc
	@touch data

# medium and bench build a larger corpus, which needs espeak-ng
repro: data $(if $(filter medium bench,$(PROFILE)),$(VENV)/.stamp-corpus)  ## the main job: corpus, training, evaluation, every table and figure of the profile
	@mkdir -p paper_figures/studies
	$(BIN)/python -m talkingface repro $(if $(PROFILE),--profile $(PROFILE)) $(if $(JOBS),--jobs $(JOBS))

test: data $(VENV)/.stamp-corpus  ## every test: notebooks, parity with goldens, properties, the whole pipeline at smoke size
	$(BIN)/python -m pytest -n $(or $(JOBS),$(shell nproc)) --dist loadfile

docs: data $(VENV)/.stamp-corpus  ## the documentation site in _docs/, links checked
	$(BIN)/python nbs/_docs/build.py

coverage: data $(VENV)/.stamp-corpus  ## the tests with the lines that they run
	$(BIN)/python -m pytest -n $(or $(JOBS),$(shell nproc)) --dist loadfile --cov=talkingface --cov-report=term

lab: data  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs/index.ipynb

bench: data  ## speed, as ratios measured in one run: rendering, preparing, reading, training steps
	$(BIN)/python -m talkingface repro --stages prepare $(if $(PROFILE),--profile $(PROFILE))
	$(BIN)/python -m talkingface bench $(if $(PROFILE),--profile $(PROFILE))

bench-metrics: data  ## what metrics cost: against the bare networks, the usual scripts, one by one; memory
	$(BIN)/python -m talkingface repro --stages prepare train_expert train_landmarker train_features $(if $(PROFILE),--profile $(PROFILE))
	$(BIN)/python -m talkingface bench-metrics $(if $(PROFILE),--profile $(PROFILE))

corpus: data $(VENV)/.stamp-corpus  ## rebuild the tracked corpus and compare its bytes with data/corpus
	$(BIN)/python -m talkingface corpus check --rebuild

real: data  ## train if that is to be done, then run the models on real clips (folder TALKINGFACE_REAL_CLIPS)
	$(BIN)/python -m talkingface repro --stages train_expert train_landmarker train_generator $(if $(PROFILE),--profile $(PROFILE))
	$(BIN)/python -m talkingface real $(if $(PROFILE),--profile $(PROFILE))

export: $(VENV)/.stamp  ## notebooks -> talkingface/ and README.md
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(BIN)/python nbs/_docs/readme.py

clean:  ## remove results, caches and the built site; keeps .venv and data
	rm -rf runs _docs _proc _docs_src .pytest_cache

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS="$$(printf '\t')" read -r a b; do printf '  make %-13s %s\n' "$$a" "$$b"; done
	@echo '  variables: PROFILE=smoke|demo|medium|bench|paper  JOBS=stages side by side  PYTHON=python3.11'
