# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow faults bench bench-gpu lint docs base-model clean

demo: $(STAMP)
	@$(BIN)/deltune train preset=demo

# the tests that start processes of their own run on both cores with the rest
test: $(STAMP)
	$(BIN)/ruff check deltune tests benchmarks recipes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# kills, bit flips, full disks, at full size; rewrites the table in docs/reliability.md
faults: $(STAMP)
	$(BIN)/python -m tests.faults

# ours beside the peers, which get an environment of their own; 25 minutes on a quiet machine, on one thread
bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.suite

# the same on one CUDA card
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.suite --gpu

# the pages that are generated from the code
docs: $(STAMP)
	$(BIN)/python -m deltune.commands.list --write-docs
	$(BIN)/python -m deltune.commands.catalogue --write-docs

lint: $(STAMP)
	$(BIN)/ruff check deltune tests benchmarks recipes

# writes the corpus, builds the tokenizer, trains with deltune itself, measures and installs into the package
base-model: $(STAMP)
	$(BIN)/python -m recipes.base_model.build

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and by its pin: an unpinned torch pulls gigabytes of CUDA libraries
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
