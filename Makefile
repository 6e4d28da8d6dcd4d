# make venv | test | lint | demo | gpu        PYTHON=python3.12 picks another interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,preprocess,convert,deepspeed

.PHONY: venv test lint demo gpu gpu-correctness gpu-layer gpu-bench bench clean

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py megatron_gdn/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRAS)]'
	# Beside the packages, for one test: Transformer Engine's recipe classes, without a compiled part.
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/transformer-engine transformer-engine==2.20.2
	# For another test, the newest release that layers and training support, where Python has a wheel of it.
	-$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --only-binary :all: \
		--target $(VENV)/megatron-core-0.19 megatron-core==0.19.2
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Each worker takes whole files, and keeps pools of up to 8 ranks.
TEST_WORKERS ?= 2

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/gpu -n $(TEST_WORKERS) --dist loadfile

# On a machine with a GPU: make gpu [PART=correctness|layer|bench], each under 9 minutes. It takes the python at hand,
# which needs torch, Triton, numpy and pytest; what needs Megatron-Core is skipped without it.
PART ?= correctness layer bench
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
ON_GPU := TRITON_INTERPRET=0 PYTHONPATH=$(CURDIR) timeout -s INT

gpu: $(addprefix gpu-,$(PART))

gpu-correctness:
	$(ON_GPU) 170 $(GPU_PYTHON) -m tests.gpu.warm
	$(ON_GPU) 360 $(GPU_PYTHON) -m pytest tests/gpu --ignore tests/gpu/test_layer.py -q

gpu-layer:
	$(ON_GPU) 530 $(GPU_PYTHON) -m pytest tests/gpu/test_layer.py -q

gpu-bench bench:
	$(ON_GPU) 530 $(GPU_PYTHON) -m tests.bench.gpu kernels rule operators mixer --save

demo: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

clean:
	rm -rf $(VENV) runs build *.egg-info
