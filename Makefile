# Evergreen. `make` shows what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
PIP_INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check
RUN := .venv/bin/
OUT ?= runs/default
LOG ?= runs/log
WORKERS ?= 2

##@ Use
.PHONY: help
help:  ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z][a-z0-9-]*:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: .venv/.ready  ## Install uv (by pip, if missing) and the locked environment into .venv

# Byte-code is compiled once here: without it every step of a pipeline compiles torch and feast for itself.
.venv/.ready: uv.lock pyproject.toml
	@command -v uv >/dev/null 2>&1 || $(PYTHON) -m uv --version >/dev/null 2>&1 || \
	  { echo "installing uv by pip"; $(PIP_INSTALL) uv || $(PIP_INSTALL) --user --break-system-packages uv; }
	@echo "installing the locked environment into .venv (7.5 GB, most of it torch's CUDA build; 1 to 5 minutes)"
	@$$(command -v uv || echo "$(PYTHON) -m uv") sync --frozen --compile-bytecode $(if $(CI),--quiet)
	@touch $@

.PHONY: run
run: setup $(LOG)/config.json  ## From a simulated click log to a served recommendation (OUT=runs/default)
	$(RUN)evergreen run --mapping simulated --data $(LOG) --out $(OUT)

$(LOG)/config.json:
	$(RUN)evergreen simulate log --out $(LOG)

DEMO ?= runs/demo
.PHONY: demo
demo: setup  ## A world whose tastes shift, the loop that answers, and one page that shows it (DEMO=runs/demo)
	$(RUN)evergreen demo --out $(DEMO)

.PHONY: compile
compile: setup  ## Compile the pipelines to pipelines/compiled/*.yaml for `kfp run create` (GPU=1: train on GPU nodes)
	$(RUN)evergreen compile $(if $(GPU),--gpu)

##@ Cluster
OVERLAY ?= kind
.PHONY: images
images:  ## Build both images with docker, podman or buildah, named by content (REGISTRY=host/path: and push them)
	images/build $(if $(REGISTRY),--registry $(REGISTRY) --push)

.PHONY: kind-up
kind-up:  ## A kind cluster with cert-manager, KServe, Kubeflow Pipelines and this deployment (DRY_RUN=1: only say how)
	manifests/kind/cluster up $(if $(DRY_RUN),--dry-run)

.PHONY: kind-down
kind-down:  ## Remove the kind cluster
	manifests/kind/cluster down $(if $(DRY_RUN),--dry-run)

.PHONY: deploy
deploy:  ## This deployment on the cluster of KUBECONFIG, which has Kubeflow already (OVERLAY=kind)
	OVERLAY=$(OVERLAY) manifests/kind/cluster deploy $(if $(DRY_RUN),--dry-run)

##@ Develop
# Files that wait for servers and brokers first: the others fill the time.
PYTEST = $(RUN)pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not heavy and not cluster and not e2e"

.PHONY: test
test: setup  ## Run all tests but the heavy ones and the cluster's
	$(PYTEST)

.PHONY: coverage
coverage: setup  ## The same with coverage, at least 85 %; takes half as long again
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=85

.PHONY: test-heavy
test-heavy: setup  ## Run the heavy tests: brokers that are killed, servers beside servers, Airflow; about 7 minutes
	$(RUN)pytest -n $(WORKERS) --dist loadfile -m "heavy and not cluster and not e2e"

.PHONY: test-cluster
test-cluster: setup  ## Overlays, images and releases on the cluster of KUBECONFIG (Kubernetes with KServe)
	$(RUN)pytest -m cluster tests/cluster

.PHONY: test-e2e
test-e2e: setup  ## The whole loop on the cluster of KUBECONFIG (with Kubeflow Pipelines), then cleaned up
	$(RUN)pytest -m e2e -s tests/e2e

.PHONY: lint
lint: setup  ## Check style and the import rules
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)lint-imports

.PHONY: typecheck
typecheck: setup  ## Check types, strictly
	$(RUN)mypy

BENCHMARK_CACHE ?= build/benchmarks

.PHONY: benchmark
benchmark: setup  ## Measure against FuxiCTR, Vowpal Wabbit, the truth (DESKDROP=folder: the evaluation); about 90 minutes
	$(RUN)python benchmarks/trainer.py --cache $(BENCHMARK_CACHE) --out benchmarks/trainer.md
	$(RUN)python benchmarks/vowpal_wabbit.py --cache $(BENCHMARK_CACHE) --csv --out benchmarks/vowpal_wabbit.md
	$(RUN)python benchmarks/position_bias.py --out benchmarks/position_bias.md
	$(if $(DESKDROP),$(RUN)python benchmarks/evaluation.py --data $(DESKDROP) --out benchmarks/evaluation.md)
	$(RUN)python benchmarks/simulator.py --out benchmarks/simulator.md
	$(RUN)python benchmarks/truth.py --models dlrm --out benchmarks/truth.md
	$(RUN)python benchmarks/truth.py --models dlrm --out benchmarks/truth_settled.md \
	  --world '{"taste_half_life_days": 365, "segment_taste_share": 0.9}'

.PHONY: benchmark-data
benchmark-data: setup  ## Measure joins, materialization, Spark, the stream and the filter; wants redis-server, Java and Maven
	$(RUN)python benchmarks/point_in_time.py --out benchmarks/point_in_time.md
	$(RUN)python benchmarks/materialize.py --out benchmarks/materialize.md
	$(RUN)python benchmarks/growth.py --out benchmarks/growth.md
	$(RUN)python benchmarks/spark.py --out benchmarks/spark.md
	$(RUN)python -m benchmarks.stream
	$(RUN)python benchmarks/fraud.py $(if $(DESKDROP),--deskdrop $(DESKDROP)) --out benchmarks/fraud.md
	$(if $(NAB),$(RUN)python benchmarks/alarms.py --nab $(NAB) --out benchmarks/alarms.md)

.PHONY: benchmark-serving
benchmark-serving: setup  ## Measure serving: its floor, load, outages, bad requests; wants redis-server; 15 minutes
	for name in compare catalogue endurance redis_outage bad_requests; do \
	  $(RUN)python -m benchmarks.serving.$$name --work $(BENCHMARK_CACHE)/serving --out benchmarks/serving/$$name.md; done
	$(RUN)python -m benchmarks.online_read --out benchmarks/online_read.md
	$(RUN)python benchmarks/impressions.py --out benchmarks/impressions.md

.PHONY: benchmark-loop
benchmark-loop: setup  ## Measure the loop over seeds: scenarios, gate, canary, policies on logs (DESKDROP=folder); many hours
	$(RUN)python -m benchmarks.loop.scenarios --work $(BENCHMARK_CACHE)/loop --out benchmarks/loop/scenarios.md
	$(RUN)python benchmarks/loop/gate.py --work $(BENCHMARK_CACHE)/gate --out benchmarks/loop/gate.md
	$(RUN)python benchmarks/loop/canary.py --work $(BENCHMARK_CACHE)/canary --out benchmarks/loop/canary.md
	$(RUN)python benchmarks/loop/backtest.py --work $(BENCHMARK_CACHE)/backtest $(if $(DESKDROP),--deskdrop $(DESKDROP)) --out benchmarks/loop/backtest.md
	$(RUN)python benchmarks/loop/drift_gate.py --out benchmarks/loop/drift_gate.md
	$(RUN)python benchmarks/loop/world.py --out benchmarks/loop/world.md

.PHONY: quality
quality: setup  ## Published settings on files that you give: FRAPPE=folder ML1M=file (benchmarks/quality/README.md)
	@test -n "$(FRAPPE)$(ML1M)" || { echo "give FRAPPE=folder or ML1M=file; see benchmarks/quality/README.md"; exit 2; }
	$(if $(FRAPPE),$(RUN)python benchmarks/quality/frappe.py $(foreach s,train valid test,--$(s) $(firstword $(wildcard $(FRAPPE)/$(s)*))) --out benchmarks/quality/frappe.md)
	$(if $(ML1M),$(RUN)python benchmarks/quality/movielens_1m.py --data $(ML1M) --out benchmarks/quality/movielens_1m.md)

.PHONY: clean
clean:  ## Remove what was built and run (not .venv)
	rm -rf build dist runs local_outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
