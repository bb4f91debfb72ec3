# make quickstart   install, and run the smallest whole recipe: data → base → SFT → GRPO → evaluation → report
# make test         install, and run the tests
# make check        the mini profiles with the statistical claims they make (minutes)
# make bench        Temper beside TRL and transformers, in turns (hours; ONLY=dpo: the contests whose names begin so)
# make lint         ruff and pyright
# make install      install only

PYTHON ?= python3
BIN := .venv/bin
# Two torch processes that spin against each other run many times slower: wait passively, one thread a test process.
QUIET := OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

.PHONY: quickstart install test check bench lint clean

quickstart: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/temper run detox-summarization --profile mini
	@echo "The report: runs/detox-summarization-mini/report/index.html"

install: .venv/installed

test: .venv/installed-dev
	$(BIN)/ruff check
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations=10

check: .venv/installed-dev
	$(QUIET) $(BIN)/pytest -m claims -s

bench: .venv/installed-bench
	$(BIN)/python benchmarks/bench.py $(if $(ONLY),--only $(ONLY)) $(BENCH)

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/pyright

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@touch $@

clean:
	rm -rf .venv build dist
