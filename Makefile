# Everything needs Python 3.10 or newer and make, nothing else. Each target sets up .venv itself.
PYTHON ?= python3
SIZE ?= laptop
OUT ?= runs/$(SIZE)
BIN := .venv/bin
export GOMP_SPINCOUNT ?= 10000

.PHONY: run test lab chat serve docs readme clean help

help:
	@echo "make run     the whole chain, from raw documents to an aligned chat model (SIZE=$(SIZE), into OUT=$(OUT))"
	@echo "make chat    talk to the model that the run made"
	@echo "make serve   the same in the browser, and for programs that speak OpenAI's API (ARGS=--port 8001)"
	@echo "make lab     the course in JupyterLab"
	@echo "make test    everything that must hold"
	@echo "make docs    the site (needs Quarto)"
	@echo "make readme  README.md, the API page and llms.txt from the notebooks"
	@echo "make clean   remove .venv and what was generated, but not runs/"

.venv/bin/python:
	$(PYTHON) -m venv .venv || { echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"; rm -rf .venv; exit 1; }

.setup-run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.setup-serve: .setup-run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[serve]"
	@touch $@

.setup-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch .setup-run .setup-serve $@

run: .setup-run
	$(BIN)/llm_course run --size $(SIZE) --out $(OUT) $(ARGS)

chat: .setup-run
	$(BIN)/llm_course chat $(OUT) $(ARGS)

serve: .setup-serve
	$(BIN)/llm_course serve $(OUT) $(ARGS)

test: .setup-dev
	$(BIN)/python tests/suite.py

lab: .setup-dev
	$(BIN)/jupyter lab nbs/00_start.ipynb

readme: .setup-dev
	$(BIN)/python tests/pages.py
	$(BIN)/python tests/readme.py

docs: .setup-dev
	@command -v quarto >/dev/null || { echo "The site is rendered by Quarto, which is not installed: get it from quarto.org/docs/get-started, then run make docs again."; exit 1; }
	$(BIN)/nbdev_proc_nbs --skip_folder_re '^([_.]|data$$|tests$$|llm_course$$|build$$|runs$$)'
	cd _proc && PATH="$(CURDIR)/$(BIN):$$PATH" quarto render
	rm -rf _docs && mv _proc/_docs _docs
	@echo "The site is in _docs/index.html"

clean:
	rm -rf .venv .setup-* _proc _docs build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
