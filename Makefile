# make gpu runs where PyTorch with CUDA, Triton, pytest and a GPU are; the other targets make their own .venv.
# Everything starts from a machine with python3 (3.11 or newer) and make.
#   make demo   the main job on real household histories: prepare, train, evaluate, index, recommend (10 min, 2 cores)
#   make test   every test that needs no GPU

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
DEMO ?= runs/demo

# Beside another busy process torch's spinning threads are 15-20 times slower; this must be set before Python starts.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.PHONY: all setup demo test lint types imports gpu bench nightly clean
all: test

setup: $(INSTALLED)

$(INSTALLED): requirements-cpu.txt pyproject.toml packaging/install.py packaging/fbgemm-gpu-stub/pyproject.toml
	$(PYTHON) packaging/install.py $(VENV)
	@touch $@

$(TESTABLE): $(INSTALLED) requirements-test.txt
	$(PYTHON) packaging/install.py $(VENV) requirements-test.txt
	@touch $@

demo: setup
	$(BIN)/ksa demo --out $(DEMO)

test: $(TESTABLE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/basedpyright

imports: setup
	$(BIN)/lint-imports

gpu:
	$(PYTHON) -m pytest -q -m gpu -p no:cacheprovider tests/ksa_kernels tests/recsys_ksa/model/test_pages.py tests/ksa_serving/test_gpu_service.py
	! command -v compute-sanitizer || compute-sanitizer --target-processes all --error-exitcode 9 \
		$(PYTHON) -m pytest -q -m gpu -p no:cacheprovider tests/ksa_kernels -k "append or catalogue or outweigh or (reference and 64)"
	PYTHONPATH=kernels $(PYTHON) kernels/benchmarks/run.py --out results.json

bench: setup
	$(BIN)/python -m benchmarks.append

# FULL=1: more examples, kills, power cuts, simulations, moves, steps, deletions, swaps, fuzzed requests, cancelled calls, and a
# soak of 20 minutes.
nightly: export KSA_KILLS := $(if $(FULL),1000,300)
nightly: export KSA_KILLS_AT_A_POINT := $(if $(FULL),100,6)
nightly: export KSA_STORY_STEPS := $(if $(FULL),100000,30000)
nightly: export KSA_FUZZ := $(if $(FULL),100000,30000)
nightly: export KSA_CANCELLED := $(if $(FULL),100000,10000)
nightly: export KSA_DELETED := $(if $(FULL),10000,600)
nightly: export KSA_SWAPS := $(if $(FULL),1000,100)
nightly: export KSA_MOVES := $(if $(FULL),40,10)
nightly: export KSA_DAMAGES := $(if $(FULL),1000,200)
nightly: export KSA_SIMULATIONS := $(if $(FULL),10000,1000)
nightly: export KSA_POWER_CUTS := $(if $(FULL),10000,1000)
nightly: export KSA_REPLAYED_EVENTS := 100000
nightly: export KSA_SOAK_SECONDS := $(if $(FULL),1200,120)
nightly: $(TESTABLE)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -q -m "not gpu"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
