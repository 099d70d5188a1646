# `make demo` and `make test` need Python 3.10+, make and a C++ compiler (for the torch.compile tests), nothing else.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# Versions: those that everything is tested with, or .github/oldest.txt, .github/newest.txt.
CONSTRAINTS ?= constraints.txt

# Beside the pinned Triton, that of the oldest torch that is supported, and the newest, with which the kernels that work
# asynchronously are checked for what they leave unguarded: the tiles are chosen to spill nothing with the other two.
OLD_TRITON := $(VENV)/triton-3.6.0
NEW_TRITON := $(VENV)/triton-3.9.0

# Of what `make aot` compiles with these two, one of how many.
EVERY ?= 1

# Where the emulator of compiled kernels lies, a package named ptx, if it is there at all.
EMULATOR ?= ../shared
EMULATION ?=

.PHONY: demo test lint types aot emulate bench targets gpu report docs dist clean

$(READY): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c $(CONSTRAINTS) -e ".[demo,bench,test,types]"
	touch $@

demo: $(READY)
	$(RUN) examples/long_tailed.py --out out

test: $(READY)
	$(RUN) -m pytest tests --numprocesses auto --maxprocesses 8 --dist loadgroup

$(VENV)/triton-%: $(READY)
	$(RUN) -m pip install --quiet --no-deps --target $@ triton==$*

aot: $(READY) $(OLD_TRITON) $(NEW_TRITON)
	$(RUN) -m tests.aot
	PYTHONPATH=$(OLD_TRITON) $(RUN) -m tests.aot --every $(EVERY) --sm 80 86 90
	PYTHONPATH=$(NEW_TRITON) $(RUN) -W ignore -m tests.aot --every $(EVERY) --may-spill --sm 80 90 100 \
		--kernel forward_streaming forward_packed backward_query backward_key_value backward_packed

emulate: $(READY)
	$(RUN) -m tests.emulate --emulator $(EMULATOR) $(EMULATION)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(MAKE) --no-print-directory types

types: $(READY)
	$(RUN) -m mypy
	$(RUN) -m tests.type_check

bench: $(READY)
	$(RUN) -m pytest bench -rs

targets: $(READY)
	$(RUN) -m pytest bench/targets.py -s

gpu: $(READY)
	PYTHON=$(RUN) bench/gpu.sh out/gpu

report: $(READY)
	$(RUN) -m bench report

# Needs Python 3.11. The notice that is switched off is about MkDocs 2, which the constraints rule out.
$(VENV)/.docs: $(READY)
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

dist: $(READY)
	$(RUN) -m build

clean:
	rm -rf $(VENV) build dist out *.egg-info
