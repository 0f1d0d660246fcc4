.DEFAULT_GOAL := help
.PHONY: help install demo test readme merge hub style quality bench clean

# Everything lives in a virtual environment of its own, made at the first use and again when setup.py changes.
VENV ?= .venv
BASE_PYTHON ?= python3
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
CHECKED := hf_zoo tests benchmarks setup.py

# make merge TASKS=sst,mnli [METHOD=average] [POPULATION=runs/zoo-bert-tasks] [BASE=...] [JOINT=...] [DATA=sst=path,mnli=path] [HUB=org]
# METHOD=all compares every method that can be tried and makes the best; JOINT is a jointly trained model to compare with.
METHOD ?= average
POPULATION ?= runs/zoo-bert-tasks
comma := ,

help: ## say what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-8s %s\n", $$1, $$2}'

install: $(INSTALLED) ## set up the virtual environment

$(INSTALLED): setup.py
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -e .[dev]
	touch $@

demo: $(INSTALLED) ## train, publish, merge and load a small population on this machine, in minutes
	$(PYTHON) -m hf_zoo.demo

test: $(INSTALLED) ## run the tests
	$(PYTHON) -m pytest -n auto --dist loadfile

readme: $(INSTALLED) ## run every command of the README as written, in minutes
	$(PYTHON) -m pytest -m readme tests/test_readme.py

merge: $(INSTALLED) ## merge members: TASKS=sst,mnli METHOD= (all compares) POPULATION= BASE= JOINT= DATA= HUB=
	@test -n "$(TASKS)" || { echo "say which tasks: make merge TASKS=sst,mnli" >&2; exit 2; }
	@if [ "$(POPULATION)" = runs/zoo-bert-tasks ] && [ ! -e runs/zoo-bert-tasks/population.json ]; then \
		echo "runs/zoo-bert-tasks does not exist yet: training it on embedded text (minutes)"; \
		$(PYTHON) -m hf_zoo.pretrain recipes/bert_mlm.yaml && $(PYTHON) -m hf_zoo.finetune recipes/bert_tasks.yaml; \
	fi
	$(PYTHON) -m hf_zoo.merge recipes/merge_tasks.yaml tasks=[$(TASKS)] method=$(METHOD) population=$(POPULATION) \
		$(if $(BASE),base=$(BASE)) $(if $(JOINT),joint=$(JOINT)) $(foreach pair,$(subst $(comma), ,$(DATA)),data.$(subst =,.path=,$(pair))) \
		$(if $(HUB),publish.namespace=$(HUB))

hub: $(INSTALLED) ## serve the demo's Hub again
	$(PYTHON) -m hf_zoo.cli hub serve runs/demo/hub

style: $(INSTALLED) ## put the code in order
	$(VENV)/bin/ruff check --fix $(CHECKED)
	$(VENV)/bin/ruff format $(CHECKED)

quality: $(INSTALLED) ## check the code: ruff, mypy, layering
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/ruff format --check $(CHECKED)
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest -q tests/test_layering.py

check: quality

bench: $(INSTALLED) ## run the benchmarks whose tables stand in benchmarks/README.md
	$(PYTHON) -m benchmarks

clean: ## remove what was built, but no runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
