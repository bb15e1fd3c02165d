SHELL := /bin/bash
JOBS ?= 2# tests run in so many processes, whole files in each
PYTEST := $$PYTHON -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
ENV := set -euo pipefail; . scripts/env.sh;

.PHONY: help setup test test-slow test-vllm fuzz check format demo bench tradeoff conformance

help: ## list the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-14s %s\n", $$1, $$2}'

setup: ## install the project and what it needs (activated environment, else .venv)
	@bash scripts/setup.sh

test: ## the tests, under 8 minutes on 2 cores
	@$(ENV) $(PYTEST) $(ARGS)

test-slow: ## the tests that take minutes
	@$(ENV) $(PYTEST) -m slow $(ARGS)

test-vllm: ## the tests of serving with vLLM, in its own environment (bash scripts/vllm_env.sh makes it)
	@OMP_NUM_THREADS=1 "$(or $(VLLM_ENV),.venv-vllm)/bin/python" -m pytest -q -m "slow or not slow" tests/vllm $(ARGS)

fuzz: ## damaged input of every kind for every reader, ROUNDS= times as long as in the tests
	@$(ENV) FUZZ_ROUNDS=$(or $(ROUNDS),20) $$PYTHON -m pytest -q tests/fuzz $(ARGS)

check: ## lint, format and types
	@$(ENV) $$PYTHON -m ruff check . && $$PYTHON -m ruff format --check . && $$PYTHON -m mypy

format: ## fix what lint and format can fix
	@$(ENV) $$PYTHON -m ruff check --fix . && $$PYTHON -m ruff format .

demo: ## a page to chat with MODEL= (default: the newest), beside COMPARE=; needs pip install '.[demo]'
	@$(ENV) $$PYTHON -m serve.demo $(if $(MODEL),"$(MODEL)") $(if $(COMPARE),--compare "$(COMPARE)") $(ARGS)

eval-%: ## evaluate MODEL= on a benchmark (eval-mmbench, ..., eval-all) with DATA= (default: newest model, embedded set)
	@$(ENV) $$PYTHON -m playground.data.build && $$PYTHON -m eval.run --benchmarks $* \
		$(foreach m,$(MODEL),--model "$(m)") $(foreach d,$(DATA),--data "$(d)") $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

bench: ## time, memory and FLOPs of every preset (SIZE=width-1024, MODE=growth; MODE=device writes the page of a GPU)
	@$(ENV) $$PYTHON -m eval.study.bench $(or $(MODE),whole) $(if $(DEVICE),--device $(DEVICE)) $(if $(SIZE),--size $(SIZE)) $(ARGS)

tradeoff: METHODS ?= all
tradeoff: BUDGETS ?= 18,12,6
tradeoff: ## score against FLOPs and time: MODEL="DENSE SKIPPING" METHODS=random,grid BUDGETS=18,12,6 (default: embedded set)
	@$(ENV) $$PYTHON -m playground.data.build && $$PYTHON -m eval.tradeoff $(foreach m,$(MODEL),--model "$(m)") \
		--methods "$(METHODS)" --budgets "$(BUDGETS)" $(foreach d,$(DATA),--data "$(d)") \
		$(if $(BENCHMARKS),--benchmarks $(BENCHMARKS)) $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

conformance: ## compare the library with the golden tensors in GOLDENS=
	@$(ENV) $$PYTHON -m tests.conformance $(if $(GOLDENS),"$(GOLDENS)") $(ARGS)
