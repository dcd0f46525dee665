# `make study` and `make test` set up what they need: a virtual environment in .venv, by ordinary pip, once.
# Settings: make study CONFIG=config/smoke.yaml CORES=4 ARGS=--dry-run; make test PYTHON=/path/to/python3.12

SHELL  := /bin/sh
CONFIG ?= config/rooms.yaml
CORES  ?= all
ARGS   ?=
PYTHON ?=

# Refused before anything is set up; Snakemake would show where in its own code it found no file.
ifneq (,$(filter study,$(MAKECMDGOALS)))
$(foreach file,$(CONFIG),$(if $(wildcard $(file)),,$(error CONFIG=$(file): no such file; the shipped ones are in config/)))
endif

# Threads that wait for work sleep: spinning ones cost a busy machine most of its time.
export OMP_WAIT_POLICY ?= PASSIVE
# The tools of .venv first; rules call the Python that Snakemake runs in.
WITH_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

# Set-up is done when this file is there. Its name holds what set-up depends on, the folder included (scripts of a venv hold its path),
# so new requirements or a moved clone are noticed, a changed date is not.
READY := .venv/.ready-$(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup study paper test clean

help: ## Show this text
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1@\2/p' $(MAKEFILE_LIST) | tr '@' '\t'

setup: $(READY) ## Set up .venv, which study and test do by themselves

study: $(READY) ## Run the study: results/rooms, or the study of CONFIG=config/<study>.yaml
	@$(WITH_VENV) snakemake --cores $(CORES) $(ARGS) --configfile $(CONFIG)

paper: $(READY) ## Run the paper's own study, LSUN-bedroom and LSUN-church: on a cluster with ARGS="--profile slurm"
	@$(WITH_VENV) snakemake $(or $(ARGS),--cores $(CORES)) --configfile config/paper.yaml
	@$(WITH_VENV) snakemake $(or $(ARGS),--cores $(CORES)) --configfile config/paper-church.yaml

test: $(READY) ## Run the tests, the smoke study among them
	@$(WITH_VENV) python -m pytest tests -m "not slow and not full_study" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

clean: ## Remove the intermediates of all studies; tables, figures, pages and .venv stay
	@if [ -d results ]; then find results -mindepth 2 -maxdepth 2 ! -name tables ! -name figures ! -name timings.md ! -name index.html ! -name manifest.json -exec rm -rf {} +; fi
	@rm -rf .snakemake .pytest_cache .ruff_cache build *.egg-info

# A .venv is used as it is if its Python is new enough and lives here; else, and after an interrupted set-up (.installing), it is made anew.
$(READY):
	@set -eu; \
	suits() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	if [ -e .venv/.installing ] || ! suits .venv/bin/python || ! .venv/bin/pip --version 2>/dev/null | grep -qF "$(CURDIR)/.venv/"; then \
	    found=; \
	    for python in $${PYTHON:-python3.11 python3.12 python3.13 python3}; do \
	        if suits "$$python"; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "make: no Python >= 3.11 with venv and pip found (tried $${PYTHON:-python3.11, python3.12, python3.13, python3}); name one with PYTHON=/path/to/python" >&2; exit 1; \
	    fi; \
	    rm -rf .venv; "$$found" -m venv .venv; \
	fi; \
	echo "Setting up .venv from constraints.txt: several GB, some minutes the first time"; \
	touch .venv/.installing; rm -f .venv/.ready-*; \
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,paper,slurm]'; \
	rm .venv/.installing; touch $@
