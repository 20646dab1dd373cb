# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first, with pinned versions.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
TRITON36 := $(VENV)/triton36
SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inc')

.PHONY: setup demo test test-triton36 lint format bench figures plots clean

setup: $(VENV)/extension.stamp

$(VENV)/packages.stamp: requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements/dev.txt
	touch $@

$(VENV)/extension.stamp: $(VENV)/packages.stamp setup.py pyproject.toml csrc/core/sources.py $(filter csrc/%,$(SOURCES))
	PANDA_KERNELS_BUILD=require $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(PY) examples/fetch_clips.py
	$(PY) examples/demo.py

test: setup lint
	$(PY) -m pytest

# All but Triton comes from $(VENV).
$(TRITON36)/packages.stamp: $(VENV)/packages.stamp requirements/triton36.txt
	$(PYTHON) -m venv $(TRITON36)
	$(TRITON36)/bin/python -m pip install -q --no-deps -r requirements/triton36.txt
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(TRITON36)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	touch $@

test-triton36: setup $(TRITON36)/packages.stamp
	$(TRITON36)/bin/python -m pytest $(wildcard tests/test_triton_*.py) tests/test_kernel_resources.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

format: setup
	$(VENV)/bin/clang-format -i $(SOURCES)
	$(VENV)/bin/ruff check --fix .

bench: setup
	$(PY) -m pytest bench

# What README shows: every size, saved, and once more the tower where large tensors cost no page faults.
figures: setup
	$(PY) -m pytest bench --full --save
	MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000 \
		$(PY) -m pytest bench/bench_tower.py -k "test_tower and 8_frames" --save
	$(MAKE) plots

plots: setup
	$(PY) -m bench.report

clean:
	rm -rf $(VENV) build demo panda_kernels/_cpu.so panda_kernels/_build.json
