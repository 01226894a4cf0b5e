# `make` alone lists the targets. Everything runs from .venv; nothing outside this folder is touched.
SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Nothing phones home, and Prefect keeps its database in this folder.
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export PREFECT_HOME := $(CURDIR)/.prefect
PORT ?= 5000
N ?= 30
SEED ?= 1
EXAMPLES ?= 10000

.PHONY: help setup setup-dev repro flow server worker deploy stop verify ui real-text pretrained check test bench chaos fuzz lock

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: .venv/runtime          ## create .venv and install the locked set

setup-dev: .venv/dev          ## the same, with the test tools

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/runtime: requirements.lock pyproject.toml | .venv/bin/python
	python -m pip install --quiet --constraint requirements.lock .
	touch $@

.venv/dev: requirements.lock requirements-dev.lock pyproject.toml | .venv/runtime
	python -m pip install --quiet --constraint requirements.lock --constraint requirements-dev.lock '.[dev,pretrained,postgresql,s3,docker]'
	touch $@

repro: setup                  ## run what is stale of the whole pipeline, then print what came out
	@python -m pipeline.check
	python -m dvc repro
	@python -m pipeline.summary

flow: setup                   ## the same stages as tasks of a Prefect flow
	@python -m pipeline.check
	python -m flows.pipeline
	@python -m pipeline.summary

server: setup                 ## a Prefect server in the background, its pages on http://127.0.0.1:4200
	@python -m flows.services server

worker: setup                 ## a worker in the background: runs here what is scheduled
	@python -m flows.services worker

deploy: setup                 ## tell the server of the deployments in prefect.yaml
	@python -m flows.services deploy

stop: setup                   ## end worker and server
	@python -m flows.services stop

verify: setup                 ## read again every byte that is recorded (REPAIR=1 also restores what is damaged)
	@python -m pipeline.verify $(if $(REPAIR),--repair)

ui: setup                     ## browse runs and models in MLflow, on http://127.0.0.1:5000 (PORT=... for another)
	@case "$$MLFLOW_TRACKING_URI" in http*) echo "MLflow is at $$MLFLOW_TRACKING_URI";; \
	*) echo "MLflow's pages: http://127.0.0.1:$(PORT) (Ctrl-C ends them)"; \
	  MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_LOGGING_LEVEL=WARNING exec python -m mlflow server \
	  --host 127.0.0.1 --port $(PORT) --workers 1 --artifacts-destination mlartifacts \
	  --backend-store-uri "$$(python -c 'from pipeline import tracking; print(tracking.uri())')";; esac

real-text: setup              ## the whole pipeline on real English, in .examples/real-text
	python -m examples.run real-text

pretrained: setup             ## fine-tune a real pretrained model on it, in .examples/pretrained
	python -m pip install --quiet --constraint requirements.lock --constraint requirements-dev.lock '.[pretrained]'
	python -m examples.run pretrained

check: setup-dev              ## format, lint, types, fast tests: two minutes at most
	python -m ruff format --check .
	python -m ruff check .
	python -m mypy
	python -m pytest -m 'not slow'

test: setup-dev               ## every test, end-to-end ones included
	python -m ruff format --check .
	python -m ruff check .
	python -m mypy
	python -m pytest -m 'not served'
	python -m pytest -m served --numprocesses 3

fuzz: setup-dev               ## bad input by the thousand (EXAMPLES=...)
	EXAMPLES=$(EXAMPLES) python -m pytest --numprocesses 0 --timeout 0 tests/test_fuzz.py tests/test_corpus.py tests/test_foreign.py

bench: setup                  ## training speed beside transformers.Trainer, in one run
	python -m pip install --quiet --constraint requirements.lock --constraint requirements-dev.lock '.[bench]'
	python -m bench.training

chaos: setup                  ## break a tiny run N times (N=30 SEED=1) and compare every byte with an undisturbed one
	python -m chaos --tries $(N) --seed $(SEED)

lock:                         ## install the newest allowed versions in a fresh environment and pin them
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet .
	{ echo '# The exact set that a fresh machine installs, as a pip constraints file. Made by `make lock`.'; \
	  .venv-lock/bin/python -m pip freeze --exclude gpt2-pipeline | sed 's/+cpu$$//'; } > requirements.lock
	.venv-lock/bin/python -m pip install --quiet --constraint requirements.lock '.[dev,bench,pretrained,postgresql,s3,docker]'
	{ echo '# What the test tools and the optional extras add to requirements.lock. Made by `make lock`.'; \
	  .venv-lock/bin/python -m pip freeze --exclude gpt2-pipeline | sed 's/+cpu$$//' | grep -vxFf requirements.lock; } > requirements-dev.lock
	rm -rf .venv-lock
