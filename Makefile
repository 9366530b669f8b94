# Both commands of the README make their own environment: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LLAMA := .venv-llama
TORCH := torch==2.13.0
# `make claims` begins none after so many minutes.
MINUTES ?= 15
export LAYERWISE_ASSETS ?= $(wildcard ../shared/assets)

.PHONY: demo test trained check claims docs bench interop gptq env clean

env: $(VENV)/.ready

# torch comes first and alone: what else asks for it then takes the build that is there.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: env
	rm -rf demo
	$(BIN)/layerwise inspect builtin:tiny --measure lim,zd,error
	$(BIN)/layerwise compress builtin:tiny -o demo --budget 3.5bits --method gptq --symmetric \
	  --format compressed-tensors

test: env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not trained"

# Those on the trained models of the assets, where they are.
trained: env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m trained

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python scripts/make_docs.py --check

claims: env
	$(BIN)/python scripts/make_docs.py --claims --check --minutes $(MINUTES)

docs: env
	$(BIN)/python scripts/make_docs.py

bench: env
	$(BIN)/python benchmarks/rounding.py

# GPTQModel reads GPTQ files back in the tests; what it asks for of torch is newer than it needs.
GPTQ := gptqmodel pypcre logbar device-smi tokenicer defuser
gptq: env
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt optimum
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation \
	  --no-deps $(GPTQ)

# llama.cpp is built from the source package of llama-cpp-python: that takes cmake and a compiler.
interop: env $(LLAMA)/.ready
	$(BIN)/python scripts/interop.py --llama $(LLAMA)/bin/python

$(LLAMA)/.ready:
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/pip install -q --disable-pip-version-check \
	  --no-binary llama-cpp-python llama-cpp-python==0.3.36
	touch $@

clean:
	rm -rf $(VENV) $(LLAMA) demo
