# The tasks of this repository. Each target is a script below e2e/ that can be read and run alone.
SHELL := /usr/bin/env bash
.DEFAULT_GOAL := help
.PHONY: help demo demo-down test test-engine test-long test-overload test-clients fuzz cluster-up cluster-down cluster-status kubectl images models report bench-cpu bench-gateway soak-gateway bench-operator fmt lint audit release test-sources bench-pod

NODES ?= 1
export IMAGE_REGISTRY IMAGE_TAG MODEL_URI TAG BENCH_ROUNDS BENCH_ONLY OPERATOR_BENCH_MODELS OPERATOR_BENCH_RATE CLIENTS GATEWAY_BENCH_SECONDS SOAK_SECONDS SOURCES POD_BENCH_SWAPS POD_BENCH_RELOADS POD_BENCH_STREAMS POD_BENCH_MIB OPERATOR_BENCH_ALONE OPERATOR_BENCH_ONLY

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  With KUBECONFIG set, demo, demo-down and kubectl work on that cluster; everything else uses the cluster of this machine."
	@echo "  Caches: $${XDG_CACHE_HOME:-$$HOME/.cache}/trustformers"

demo: ## from nothing to tokens on a Kubernetes on this machine (Linux, root)
	@e2e/tasks/demo.sh

demo-down: ## removes the demo and everything that it made
	@e2e/tasks/demo-down.sh

test: ## every stage: lints, unit tests, parity, engine, scenarios on a two-node cluster; prints the time of each
	@e2e/tasks/test.sh

test-long: ## the scenarios that take minutes: faults under load, nodes, killed operators, autoscaling, verdicts
	@e2e/tasks/test.sh long

test-engine: ## memory, classes, fairness and quality of the engine against objectives; 15 minutes on an idle machine
	@e2e/tasks/test-engine.sh

test-overload: ## four times as many requests as a server can answer, for a minute, on an idle machine [OVERLOAD_SECONDS=60]
	@e2e/tasks/test-overload.sh $${OVERLOAD_SECONDS:-60}

test-sources: ## the pod's program against S3 (moto), a hub, a registry and web servers that cut, stall and damage [SOURCES=s3]
	@e2e/tasks/test-sources.sh $${SOURCES:+--only $$SOURCES}

test-clients: ## clients of OpenAI, Anthropic, KServe, gRPC and WebSocket, unchanged, against trustformers-serve [CLIENTS=curl,grpcio]
	@e2e/tasks/test-clients.sh $${CLIENTS:+--only $$CLIENTS}

fuzz: ## the fuzz targets of everything that reads bytes from outside; 10 minutes of processor time each, two at a time [FUZZ_SEED=1]
	@e2e/tasks/fuzz.sh $${FUZZ_SECONDS:-600}

cluster-up: ## a Kubernetes on this machine [NODES=2] [WITH="metrics-server kwok=20 gpu=2"]
	@e2e/cluster/up.sh --nodes $(NODES) --with "$(WITH)"

cluster-down: ## stops the cluster and prints what is left: nothing
	@e2e/cluster/down.sh

cluster-status: ## the state of the cluster
	@e2e/cluster/status.sh

kubectl: ## kubectl on the cluster: make kubectl ARGS="get pods -A"
	@e2e/cluster/kubectl.sh $(ARGS)

images: ## images of our programs, without a container engine; loaded into the running cluster [TAG=v0.1.0]
	@e2e/images/build.sh

models: ## SmolLM2 and its image, loaded into the running cluster [MODELS="smollm2 minilm qwen-0.5b qwen-1.5b gemma-270m classifier adapter"]
	@e2e/models/fetch.sh $(MODELS)

report: ## time to first token, image sizes, decode speed, the times of the last cold and warm `make test`
	@e2e/tasks/report.sh

bench-cpu: ## our runtime beside llama.cpp, OpenVINO, ONNX Runtime and torch on this processor, as ratios [BENCH_ROUNDS=3] [BENCH_ONLY=minilm]
	@e2e/bench/run.sh

bench-pod: ## one pod: start to ready and first token, 100 swaps under 32 streams, fetching beside loopback and disk [POD_BENCH_SWAPS=100]
	@e2e/bench/pod.sh

bench-gateway: ## the gateway beside Envoy, nginx and SGLang's router before one mock pod: latency, processor time, memory [GATEWAY_BENCH_SECONDS=5]
	@e2e/bench/gateway.sh

soak-gateway: ## the gateway at saturation beside hostile callers: latency of the others, memory, leaks; alone on a machine [SOAK_SECONDS=600]
	@e2e/bench/soak.sh $${SOAK_SECONDS:-600}

bench-operator: ## the operator beside KServe's manager, each with 1,000 models on fake nodes, as ratios [OPERATOR_BENCH_MODELS=100] [OPERATOR_BENCH_RATE=10] [OPERATOR_BENCH_ALONE=5000] [OPERATOR_BENCH_ONLY=at-once]
	@e2e/bench/operator.sh

fmt: ## formats the code
	@cargo fmt --all

lint: ## format, lints of Rust, shell, Python, chart and manifests, licences, the repository's own rules
	@e2e/tasks/lint.sh

audit: ## known vulnerabilities in dependencies (fetches the advisory database)
	@e2e/tasks/tool.sh cargo-deny check advisories

release: ## optimised programs in target/release
	@cargo build --locked --release --workspace --bins
