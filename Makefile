# Every target sets up what it needs by itself (tools/setup); `make setup` is there for those who like to do it apart.

SHELL := /bin/bash
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# -B: no compiled files of root's in a user's tree
PYTHON := .venv/bin/python -B
comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup vm-setup demo test test-pure test-vm test-long lint bench docs reference bpf clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## install what is missing: system packages (through sudo), .venv
	@tools/setup

vm-setup: ## install what virtual machines need: User-Mode Linux, QEMU, Debian's kernel (in ~/.cache/krelay-vm)
	@tools/setup --group vm

demo: ## client, relay and server on this one machine: DNS and HTTP, step by step; VM=uml or VM=qemu: in virtual machines
	@tools/setup --group run$(if $(VM),$(if $(filter uml,$(VM)),$(comma)uml,$(comma)vm))
	@$(AS_ROOT) env "XDG_CACHE_HOME=$${XDG_CACHE_HOME:-$$HOME/.cache}" $(PYTHON) -m krelay demo $(if $(VM),--vm $(VM))

test: ## all checks: ruff, mypy, the tests; those in network namespaces through sudo
	@tools/setup --group test
	@tools/check

test-pure: ## the tests that need neither root nor namespaces
	@tools/setup --group test
	@tools/check --pure

test-vm: ## the tests in virtual machines: User-Mode Linux and QEMU; through sudo
	@tools/setup --group test,vm
	@tools/check --vm

test-long: ## before a release: what `make test` leaves out or cuts short, hours of it, and the virtual machines; as root
	@tools/setup --group test,vm
	@$(AS_ROOT) env "XDG_CACHE_HOME=$${XDG_CACHE_HOME:-$$HOME/.cache}" tools/check --long

lint: ## ruff, its format, mypy
	@tools/setup --group test
	@tools/check --lint

bench: ## the benchmarks, in network namespaces, as root
	@tools/setup --group bench
	@$(AS_ROOT) $(PYTHON) -m benchmarks

docs: reference ## the site of docs/, in build/docs; a warning is an error
	@$(PYTHON) -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo build/docs/index.html

reference: ## the tables of docs/reference, from the code's own
	@tools/setup --group docs
	@$(PYTHON) -m tools.reference

bpf: ## the byte code of the data path's programs, krelay/offload/*.o, from their source, by clang
	@tools/setup --group bpf
	@$(PYTHON) -m tools.bytecode

clean: ## remove .venv and all caches
	@rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
