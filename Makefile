# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow faults bench lint docs base-model clean

# torch first and by its pin: an unpinned torch pulls gigabytes of CUDA libraries
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

test: $(STAMP)
	$(BIN)/ruff check deltune tests benchmarks
	$(BIN)/python -m pytest -q -n 2

slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow
