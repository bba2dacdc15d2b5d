# make demo   rank a few documents in eight languages with the released Nano, then open the page
# make test   lint, types and all tests (Debian: installs Chromium where it is missing)
# make test-avx2   the tests that compute, as on a processor with AVX2 alone
# make bench  speed and memory beside other ways to run the same models: about two hours on two cores
# make integrations  other people's clients of `querit serve`, and engines, each in an environment of its own
VENV ?= .venv
PYTHON ?= python3
TEST_EXTRAS := recipes,onnx,ray,serve,space,test
QUERIT := $(VENV)/bin/querit
PYTEST := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
# $(call install,VENV,ARGUMENTS OF pip install): one line; what pip says lies in a log, which is shown where it fails.
define install
@echo "Installing into $(1) (a few minutes the first time) ..."
@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) >$(1)/pip.log 2>&1 || \
	{ echo "pip failed: is the package index within reach? The end of $(1)/pip.log:" >&2; \
	grep -v "is ignored: it is" $(1)/pip.log | tail -n 20 >&2; exit 1; }
endef
# The tests whose results depend on the processor's instructions.
COMPUTING := tests/modeling_querit tests/querit/test_devices.py tests/hub_card/test_engines.py \
	tests/hub_card/test_export.py tests/hub_card/test_export_onnx.py tests/hub_card/test_nano.py \
	tests/recipes/test_train.py

.PHONY: demo test test-avx2 bench integrations clean

demo: $(VENV)/demo-installed
	@$(QUERIT) rank "Why are there two high tides a day?" examples/documents.jsonl --top-k 4 --table
	@$(QUERIT) rank "Wie finden Zugvögel ihren Weg?" examples/documents.jsonl --top-k 4 --table
	@$(QUERIT) rank "怎样延长锂电池的寿命？" examples/documents.jsonl --top-k 4 --table
	@echo 'Your own: $(QUERIT) rank "a question" FILE...   (text, Markdown, JSONL, CSV, a folder)'
	@# On a terminal the page is served until Ctrl+C; elsewhere nobody could end it.
	@if [ -t 1 ]; then $(QUERIT) demo; else echo 'In a browser: $(QUERIT) demo   (prints the address to open)'; fi

test: $(VENV)/test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@# Files share the cores; two processes that each use all of them would be many times slower.
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile

test-avx2: $(VENV)/test-installed
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -n auto --maxprocesses 4 --dist loadfile $(COMPUTING)

bench: $(VENV)/test-installed
	$(call install,$(VENV),-c constraints.txt -e ".[bench]")
	$(VENV)/bin/python -m tests.bench.bench_scoring --output tests/bench/results/scoring.json
	$(VENV)/bin/python -m tests.bench.bench_growth --output tests/bench/results/growth.json
	$(VENV)/bin/python -m tests.bench.bench_loading --output tests/bench/results/loading.json
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.bench.bench_corpus --output tests/bench/results/corpus.json
	$(VENV)/bin/python -m tests.bench.bench_space --users 50 --seconds 120 --output tests/bench/results/space.json
	$(VENV)/bin/python -m tests.bench.bench_serve --output tests/bench/results/serve.json
	$(VENV)/bin/python -m tests.bench.report

integrations: $(VENV)/test-installed
	@[ -x .venv-integrations/bin/python ] || $(PYTHON) -m venv .venv-integrations
	$(call install,.venv-integrations,-e ".[serve]" -r tests/integrations/requirements.txt)
	.venv-integrations/bin/python -m pytest -o addopts= -q tests/integrations/test_clients.py
	@[ -x .venv-vllm/bin/python ] || $(PYTHON) -m venv .venv-vllm
	$(call install,.venv-vllm,-r tests/integrations/requirements-vllm.txt)
	@# They come with it and do not fit its torch.
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@[ -x .venv-infinity/bin/python ] || $(PYTHON) -m venv .venv-infinity
	$(call install,.venv-infinity,-r tests/integrations/requirements-infinity.txt)
	PYTHON_OF_VLLM=.venv-vllm/bin/python PYTHON_OF_INFINITY=.venv-infinity/bin/python $(PYTEST) -o addopts= -q \
		tests/integrations/test_vllm.py tests/integrations/test_infinity.py tests/integrations/test_oldest_engines.py

$(VENV)/demo-installed: pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) .ci/setup demo
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),-c constraints.txt -e ".[space]")
	@touch $@

$(VENV)/test-installed: pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) .ci/setup test
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),-c constraints.txt -e ".[$(TEST_EXTRAS)]")
	@touch $@ $(VENV)/demo-installed

clean:
	rm -rf $(VENV) build *.egg-info
