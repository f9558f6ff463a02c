# Two commands do everything on a fresh Debian 12 or 13 machine, as root: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SOURCES := $(wildcard native/*.[ch] native/src/*.[ch] guestagent/src/*.[ch] hostd/drivers/oci/src/*.[ch] hostd/drivers/qemu/src/*.c) setup.py pyproject.toml
PROTOS := $(wildcard controlplane/api/v1/*.proto)
C_FILES := $(shell git ls-files '*.c' '*.h' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick soak-unique lint bench bench-abi soak-abi bench-sharing bench-start bench-clone bench-erofs bench-balloon-host bench-classes bench-pool bench-fork bench-fabric bench-scale bench-plan bench-elastic proto clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install what is missing: Debian packages, a venv, the native build

$(STAMP): $(SOURCES) deploy/install-packages.sh
	deploy/install-packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup ## the main job: four guests of one real image, shared, resized, measured, taken down
	$(BIN)/python -m tests.demo

test: setup ## lint, then the whole suite on real guests (under 25 minutes on 2 cores)
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m tests.suite

test-quick: setup ## what needs no guest and is quick (under 2 minutes)
	$(BIN)/pytest -m 'not guest and not slow' -q

soak-unique: setup ## 1,000 clones give no two equal random values (about half an hour)
	$(BIN)/pytest -m soak tests/integration/test_uniqueness.py

lint: setup ## ruff, strict mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	clang-format --dry-run --Werror $(C_FILES)

bench: bench-erofs bench-sharing bench-start bench-clone bench-balloon-host bench-classes bench-pool bench-fork bench-fabric bench-plan bench-elastic bench-abi ## every benchmark: a table and a JSON line each

bench-erofs: setup ## layer conversion against tar -x and mkfs.erofs
	$(BIN)/python -m tests.bench.bench_erofs

bench-sharing: setup ## host memory of N guests with DAX against the same guests on virtio-blk
	$(BIN)/python -m tests.bench.bench_sharing

bench-start: setup ## cold start by phase
	$(BIN)/python -m tests.bench.bench_start

bench-clone: setup ## clones against cold boots and QEMU's ordinary restore: milliseconds, MiB, 8 together, a herd of 50, 100 alive at once
	$(BIN)/python -m tests.bench.bench_clone

bench-balloon-host: setup ## punching a recorded list of frames: coalesced against page by page
	$(BIN)/python -m tests.bench.bench_balloon_host

bench-classes: setup ## user-kernel and host-kernel sandboxes against bare runsc and crun; 50 of one image in memory
	$(BIN)/python -m tests.bench.bench_classes

bench-pool: setup ## a warm pool's claim against a clone, to the first byte of a command, with the account of it
	$(BIN)/python -m tests.bench.bench_pool

bench-elastic: setup ## taking memory from guests and giving it back: the balloon against virtio-balloon and virtio-mem
	$(BIN)/python -m tests.bench.bench_elastic

bench-fork: setup ## 20 forks of a sandbox with 512 MiB in use: memory, and the first one against QEMU's ordinary restore
	$(BIN)/python -m tests.bench.bench_fork

bench-fabric: setup ## durable creates on etcd against puts and a bare echo; a leader that is killed, and one that is paused; placement
	@$(BIN)/python -m tests.bench.bench_fabric; fabric=$$?; $(BIN)/python -m tests.bench.bench_placement && exit $$fabric

bench-plan: setup ## the planner against SimPy, CloudSim Plus's figure, and a MILP's bound
	$(BIN)/python -m tests.bench.bench_plan

bench-scale: setup ## 10,000 simulated hosts and 200,000 sandboxes on one control plane and etcd: correct, and at what cost
	$(BIN)/python -m tests.bench.bench_scale

bench-abi: setup ## the service boundary, a system call at a time: passing, served (against runsc), woken at once
	$(BIN)/python -m tests.bench.bench_abi

soak-abi: setup ## a million fuzzed frames and packets of the services, and every policy's filter, under sanitizers
	$(BIN)/pytest -m soak tests/fuzz/test_services_fuzz.py

proto: setup ## generate the API's Python from the protos
	$(BIN)/python -m grpc_tools.protoc -I. --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=. --grpc_python_out=. \
		--mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)

clean: ## remove everything that was built
	rm -rf $(VENV) build *.egg-info native/*.so guestagent/_build hostd/drivers/*/_build
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
