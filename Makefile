# The same commands for a person and for CI. PYTHON chooses the interpreter that .venv is made of.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Tests run on as many processes as there are cores, with one thread each; WORKERS=0 runs them in one.
WORKERS ?= auto
PARALLEL = -n $(WORKERS) --dist loadgroup

.PHONY: demo test test-torch test-interpreter test-codegen test-jit test-integrations test-engines test-deepspeed test-gpu gpu bench report recipes docs lint types wheel release-check clean
.NOTPARALLEL:

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)  ## train the digits MLP with no penalty, L1, L2, elastic net, and L1 by proximal steps: exact zeros
	for penalty in none l1 l2 elastic; do $(RUN) examples/digits.py --penalty $$penalty || exit 1; done
	$(RUN) examples/digits.py --penalty l1 --method prox

test: test-torch test-interpreter test-codegen test-jit

test-torch: $(STAMP)  ## the PyTorch path against NumPy float64; with a GPU also the gpu lane
	$(RUN) -m pytest $(PARALLEL) -m "not interpreter and not codegen and not jit and not integrations and not engines and not deepspeed"

test-interpreter: $(STAMP)  ## the Triton kernels on CPU tensors, in Triton's interpreter
	TRITON_INTERPRET=1 $(RUN) -m pytest $(PARALLEL) -m interpreter

test-codegen: $(STAMP)  ## the kernels' machine code
	$(RUN) -m pytest $(PARALLEL) -m codegen

test-jit: $(STAMP)  ## launches through Triton's JIT, down to a cubin, with a driver that only records them
	$(RUN) -m pytest -m jit

INTEGRATIONS := $(VENV)/.integrations

$(INTEGRATIONS): $(STAMP)
	$(RUN) -m pip install -q -c constraints.txt -e ".[integrations]"
	touch $(INTEGRATIONS)

test-integrations: $(INTEGRATIONS)  ## training with transformers, Lightning and Accelerate, which this installs
	$(RUN) -m pytest $(PARALLEL) -m integrations

test-engines: $(INTEGRATIONS)  ## the same on several processes, under engines that share a model or its optimizer among ranks
	$(RUN) -m pytest -m engines

DEEPSPEED := $(VENV)/.deepspeed

# DeepSpeed's build looks for PyTorch, so it is not isolated.
$(DEEPSPEED): $(INTEGRATIONS)
	DS_BUILD_OPS=0 $(RUN) -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	touch $(DEEPSPEED)

test-deepspeed: $(DEEPSPEED)  ## DeepSpeed on CPU processes; needs a C++ compiler
	DS_ACCELERATOR=cpu $(RUN) -m pytest -m deepspeed

test-gpu: $(STAMP)  ## the same cases on a CUDA or ROCm device
	$(RUN) -m pytest -m gpu

gpu: $(STAMP)  ## on a GPU, everything in 20 minutes: tests, sanitizer, benchmarks, replays, tuning; GPU="--minutes 10"
	$(RUN) -m bench.run_on_gpu $(GPU)

bench: $(STAMP)  ## every benchmark, results to bench/results/; BENCH="--models gpt2" to choose
	$(RUN) -m pytest bench --benchmark-only --benchmark-quiet --results bench/results/ $(BENCH)
	$(RUN) -m bench.measure.host --results bench/results/

report: $(STAMP)  ## docs/benchmarks.md and its figures from bench/results/
	$(RUN) -m bench.report.pages

recipes: $(STAMP)  ## copy the code that CONTRIBUTING.md shows from the files that it names
	$(RUN) tests/docs/test_contributing.py

DOCS := $(VENV)/.docs

$(DOCS): $(STAMP)
	$(RUN) -m pip install -q -c constraints.txt -e ".[docs]"
	touch $(DOCS)

docs: $(DOCS)  ## the documentation site, to site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy tests/api/test_types.py

wheel: $(STAMP)  ## build the wheel and use it in a clean environment
	rm -rf dist build
	$(RUN) -m build --no-isolation --wheel
	bash .ci/check_install dist/*.whl

RELEASES := $(VENV)/.release

$(RELEASES): $(STAMP)
	$(RUN) -m pip install -q -c constraints.txt -e ".[release]"
	touch $(RELEASES)

release-check: $(RELEASES)  ## what a release needs: both distributions, each in a clean environment; RELEASE=1 for the last check
	$(RUN) .ci/check_release.py $(if $(RELEASE),--final)
	rm -rf dist build
	$(RUN) -m build --no-isolation
	$(RUN) -m twine check --strict dist/*
	bash .ci/check_install dist/*.whl
	bash .ci/check_install dist/*.tar.gz

clean:
	rm -rf $(VENV) build dist site *.egg-info
