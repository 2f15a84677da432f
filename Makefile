# Baton's tasks; `make` lists them.
VENV ?= .venv
TORCH := $(shell grep '^torch==' constraints.txt)
# The first Python that constraints.txt is made for; `make PYTHON=python3.x` takes another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
# Where generated code goes; tests compare it with what is committed.
PROTOS_OUT ?= protos

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PROTOC := $(BIN)/python -m grpc_tools.protoc -Iprotos
PROTOS := $(patsubst protos/%,%,$(wildcard protos/baton_protos/*.proto))

MODEL ?=
EXECUTORS ?= 1
PORT ?= 50051
WORKER ?=
HTTP_PORT ?= 30000
GATEWAY_VENV ?= .venv-gateway
KSERVE_VENV ?= .venv-kserve
NODE_EXAMPLE := docs/examples/node

.PHONY: help setup protos run-cluster run-gateway test test-gateway test-kserve test-node lint format types clean \
  bench-core bench-cluster bench-stream bench-split bench-serve bench-peers bench-kernels bench-quantization bench-sampler profile-step kill-test determinism detection false-alarms overload fuzz simulate test-mutants gpu-check
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv with everything in it [PYTHON=python3.x] [TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu]

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  [ -n "$(PYTHON)" ] || { echo 'error: Baton needs Python 3.11 to 3.13; name one with PYTHON=...' >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo 'error: $(PYTHON) is not Python 3.11 or newer; name another with PYTHON=...' >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); \
	fi
	@echo 'installing into $(VENV); the first time this takes minutes' >&2
	@$(PIP) install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) '$(TORCH)'
	@$(PIP) install -c constraints.txt -e '.[scheduler,executor,dev]'
	@$(BIN)/python -m kernels.native.build >&2 || true # without them executors run the torch reference, and say so
	@touch $@

protos: $(STAMP) ## generate the code beside protos/baton_protos/*.proto
	@mkdir -p $(PROTOS_OUT)
	@$(PROTOC) --python_out=$(PROTOS_OUT) --pyi_out=$(PROTOS_OUT) $(PROTOS)
	@$(PROTOC) --grpc_python_out=$(PROTOS_OUT) baton_protos/generation.proto baton_protos/admin.proto \
	  baton_protos/open_inference.proto

# exec: signals find the cluster itself, with no shell in between.
run-cluster: $(STAMP) ## run a scheduler and executors here [MODEL=dir] [EXECUTORS=n] [PORT=p]
	@exec $(BIN)/baton cluster --interrupt-ok $(if $(MODEL),--model '$(MODEL)') --executors $(EXECUTORS) --port $(PORT)

# smg and its clients, and tritonclient, live apart: they go with other versions of protobuf.
$(GATEWAY_VENV)/.installed: deploy/gateway/requirements.txt
	@[ -x $(GATEWAY_VENV)/bin/python ] || $(BIN)/python -m venv $(GATEWAY_VENV)
	@$(GATEWAY_VENV)/bin/python -m pip --quiet --disable-pip-version-check install -r $<
	@touch $@

$(GATEWAY_VENV)/.tested: tests/gateway/requirements.txt $(GATEWAY_VENV)/.installed
	@$(GATEWAY_VENV)/bin/python -m pip --quiet --disable-pip-version-check install -r $<
	@touch $@

$(KSERVE_VENV)/.installed: tests/kserve/requirements.txt
	@[ -x $(KSERVE_VENV)/bin/python ] || $(BIN)/python -m venv $(KSERVE_VENV)
	@$(KSERVE_VENV)/bin/python -m pip --quiet --disable-pip-version-check install -r $<
	@touch $@

run-gateway: $(STAMP) $(GATEWAY_VENV)/.installed ## serve OpenAI's and Anthropic's HTTP APIs [WORKER=grpc://host:port, or as run-cluster] [HTTP_PORT=p]
	@exec $(BIN)/python deploy/gateway/run.py --gateway $(GATEWAY_VENV)/bin/smg --http-port $(HTTP_PORT) \
	  $(if $(WORKER),--worker '$(WORKER)') $(if $(MODEL),--model '$(MODEL)') --executors $(EXECUTORS) --port $(PORT)

test: $(STAMP) ## run the tests that every change must pass
	@$(BIN)/pytest -q -n auto --maxprocesses 4 --dist loadfile

test-gateway: $(STAMP) $(GATEWAY_VENV)/.tested ## test OpenAI's and Anthropic's clients through the gateway
	@$(BIN)/pytest -q tests/gateway

test-kserve: $(STAMP) $(KSERVE_VENV)/.installed ## test Triton's clients
	@$(BIN)/pytest -q tests/kserve

$(NODE_EXAMPLE)/node_modules/.installed: $(NODE_EXAMPLE)/package.json
	@npm install --prefix $(NODE_EXAMPLE) --silent --no-audit --no-fund --no-package-lock --ignore-scripts
	@touch $@

test-node: $(STAMP) $(NODE_EXAMPLE)/node_modules/.installed ## test the example for Node.js
	@$(BIN)/pytest -q tests/node

lint: $(STAMP) ## check style and layout
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .

format: $(STAMP) ## fix what can be fixed of style and layout
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

types: $(STAMP) ## check types, strictly
	@$(BIN)/mypy

bench-core: $(STAMP) ## measure the scheduling core
	@$(BIN)/python benchmarks/bench_core.py

bench-cluster: $(STAMP) ## measure one scheduler that drives up to 64 shadow executors
	@$(BIN)/python benchmarks/bench_cluster.py

bench-stream: $(STAMP) ## measure delivery over many streams
	@$(BIN)/python benchmarks/bench_stream.py

bench-split: $(STAMP) ## measure what the split costs
	@$(BIN)/python benchmarks/bench_split.py

bench-serve: $(STAMP) ## measure what callers get
	@$(BIN)/python benchmarks/bench_serve.py

bench-peers: $(STAMP) ## compare with other systems that are installed
	@$(BIN)/python benchmarks/bench_peers.py

# As in executors: a thread of OpenMP that spins after torch's work takes a core from what is measured next.
QUIET_THREADS := OMP_WAIT_POLICY=PASSIVE

bench-kernels: $(STAMP) ## measure the CPU kernels [ARGUMENTS='--only attention']
	@$(QUIET_THREADS) $(BIN)/python -m benchmarks.bench_kernels $(ARGUMENTS)

bench-quantization: $(STAMP) ## measure what int8 weights change of logits and tokens
	@$(BIN)/python benchmarks/quantization.py

profile-step: $(STAMP) ## measure where the time of an executor's step goes on CPU [ARGUMENTS='--shapes qwen3-small']
	@$(QUIET_THREADS) $(BIN)/python -m benchmarks.profile_step $(ARGUMENTS)

bench-sampler: $(STAMP) ## measure sampling with each feature
	@$(BIN)/python benchmarks/bench_sampler.py

kill-test: $(STAMP) ## kill executors under load; no stream may change [ARGUMENTS='--streams 10000 --faults 200']
	@exec $(BIN)/python -m benchmarks.kill_test $(ARGUMENTS)

determinism: $(STAMP) ## run one request 1,000 times among others and kills; its output may not vary [ARGUMENTS='--runs 100']
	@exec $(BIN)/python -m benchmarks.determinism $(ARGUMENTS)

detection: $(STAMP) ## measure how soon frozen, cut-off, stuck and drained executors are replaced [ARGUMENTS='--repetitions 3']
	@exec $(BIN)/python -m benchmarks.detection $(ARGUMENTS)

false-alarms: $(STAMP) ## compute the longest steps; no executor may be taken for stuck [ARGUMENTS='--minutes 3']
	@exec $(BIN)/python -m benchmarks.false_alarms $(ARGUMENTS)

overload: $(STAMP) ## offer three times what a cluster can give [ARGUMENTS='--seconds 60']
	@exec $(BIN)/python -m benchmarks.overload $(ARGUMENTS)

fuzz: $(STAMP) ## throw hostile messages at decoders and sockets [ARGUMENTS='--messages 1000000 --socket-messages 100000']
	@$(BIN)/python -m tests.fuzz $(ARGUMENTS)

simulate: $(STAMP) ## run the whole system under faults on a virtual clock [ARGUMENTS='--seconds 60', '--events 10000000 --workers 2' or '--seed 7 --request r3']
	@$(BIN)/python -m tests.simulation $(ARGUMENTS)

test-mutants: $(STAMP) ## plant defects one by one; the tests have to notice each [ARGUMENTS='--only lease']
	@$(BIN)/python -m tests.mutants $(ARGUMENTS)

# A machine with a GPU may have no network: without .venv, a Python that has torch and triton is used as it is.
gpu-check: ## check everything on a CUDA device, then measure it [ARGUMENTS='--results DIR']
	@if [ ! -x $(BIN)/python ] && $(PYTHON) -c 'import torch, triton' 2>/dev/null; then \
	  exec $(PYTHON) -m benchmarks.gpu_check $(ARGUMENTS); \
	fi; \
	$(MAKE) --no-print-directory setup && exec $(BIN)/python -m benchmarks.gpu_check $(ARGUMENTS)

clean: ## remove caches and build output; the environment stays
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
