# make demo   rank a few documents in eight languages with the released Nano, then open the page
# make test   lint, types and all tests
# make bench  speed and memory beside other ways to run the same models: about two hours on two cores
VENV ?= .venv
PYTHON ?= python3
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
QUERIT := $(VENV)/bin/querit

.PHONY: demo test bench clean

demo: $(VENV)/demo-installed
	@$(QUERIT) rank "How do migrating birds find their way?" examples/documents.jsonl --top-k 4 --table
	@$(QUERIT) rank "¿Cómo hago que la batería dure más?" examples/documents.jsonl --top-k 4 --table
	@$(QUERIT) rank "海为什么会涨潮？" examples/documents.jsonl --top-k 4 --table
	@echo 'Your own: $(QUERIT) rank "a question" FILE...   (text lines, JSONL or CSV)'
	@# On a terminal the page is served until Ctrl+C; elsewhere nobody could end it.
	@if [ -t 1 ]; then $(QUERIT) demo; else echo 'In a browser: $(QUERIT) demo   (prints the address to open)'; fi

test: $(VENV)/test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@# Files share the cores; two processes that each use all of them would be many times slower.
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

bench: $(VENV)/test-installed
	$(PIP) -e ".[bench]"
	$(VENV)/bin/python -m tests.bench.bench_scoring --output tests/bench/results/scoring.json
	$(VENV)/bin/python -m tests.bench.bench_growth --output tests/bench/results/growth.json
	$(VENV)/bin/python -m tests.bench.bench_loading --output tests/bench/results/loading.json
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.bench.bench_corpus --output tests/bench/results/corpus.json
	$(VENV)/bin/python -m tests.bench.bench_space --users 50 --seconds 120 --output tests/bench/results/space.json
	$(VENV)/bin/python -m tests.bench.report

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(PIP) -e ".[space]"
	@touch $@

$(VENV)/test-installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[recipes,onnx,ray,space,test]"
	@touch $@ $(VENV)/demo-installed

clean:
	rm -rf $(VENV) build *.egg-info
