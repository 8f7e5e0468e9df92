# Every target prepares .venv first (tools/bootstrap.sh); once it is there, that takes no time.
PYTHON_IN_VENV := .venv/bin/python
PYTEST := $(PYTHON_IN_VENV) -m pytest
# A test computes with one thread; whole files go to as many workers as there are cores.
WORKERS := -n logical --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup lint demo test test-distributed test-all test-transformers4 mutation-test docs errors-page families-page figure recipes memory-figure benchmark benchmark-full lock clean

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r target text; do printf '  %-18s %s\n' "$$target" "$$text"; done
	@echo "Settings: PYTHON=/path/to/python3.12 (which Python), TORCH_INDEX_URL=URL (another build of torch), UV=no (use pip),"
	@echo "          SOLOPO_DATA=FOLDER (real data for the tests)."

setup: ## make .venv with the versions of uv.lock (uv sync where uv is, else venv and pip)
	@bash tools/bootstrap.sh

lint: setup .venv/linters ## ruff and pyright (the first time: 60 MB more)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright --pythonpath $(PYTHON_IN_VENV)

.venv/linters: pyproject.toml constraints.txt | setup
	$(PYTHON_IN_VENV) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## the whole method on this machine in 10 minutes, no GPU needed (QUICK=1: 3 minutes)
	$(PYTHON_IN_VENV) -m megatron_solopo.cli run examples/quickstart/demo$(if $(filter-out 0,$(QUICK)),-quick).yaml

test: setup ## unit tests, the commands as a user runs them, and a minute of four processes
	SOLOPO_LAYOUTS=cheap $(PYTEST) $(WORKERS) tests/unit tests/functional tests/distributed/test_layouts.py

test-distributed: setup ## the same training over several processes, and a rehearsal of every recipe
	$(PYTEST) $(WORKERS) tests/distributed tests/functional/test_recipe_plans.py

test-all: setup ## every test
	$(PYTEST) $(WORKERS) tests

test-transformers4: setup .venv-transformers4/ready ## exported folders in transformers 4.57 too (150 MB more)
	SOLOPO_TRANSFORMERS4=$(CURDIR)/.venv-transformers4/bin/python $(PYTEST) tests/functional/test_two_transformers.py

# Only three packages are installed there; torch and all others are those of .venv.
SITE_PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-transformers4/ready: tests/transformers4.txt | setup
	rm -rf $(@D)
	$(PYTHON_IN_VENV) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	$(PYTHON_IN_VENV) $(SITE_PACKAGES) > "$$($(@D)/bin/python $(SITE_PACKAGES))/all_others.pth"
	touch $@

mutation-test: setup ## break the code in small ways; each must turn a named test red (over an hour)
	$(PYTHON_IN_VENV) tests/mutation/run.py

docs: setup .venv/docs ## the documentation as a site, build/site/index.html (the first time: 20 MB more)
	NO_MKDOCS_2_WARNING=1 $(PYTHON_IN_VENV) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

.venv/docs: pyproject.toml constraints.txt | setup
	$(PYTHON_IN_VENV) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[docs]'
	touch $@

errors-page: setup ## docs/errors.md, every error code with its messages, from the code
	$(PYTHON_IN_VENV) tools/errors_page.py

families-page: setup ## docs/families.md, every model family with measured distances from transformers
	$(PYTHON_IN_VENV) tools/families_page.py

figure: setup ## the README's figure from the recorded results in docs/method.md
	$(PYTHON_IN_VENV) tools/demo_figure.py

recipes: setup ## examples/recipes/plans and the tables of docs/planning.md, planned again (half an hour)
	$(PYTHON_IN_VENV) tools/plan_recipes.py

memory-figure: setup ## the figure of docs/planning.md, rehearsed again (minutes)
	$(PYTHON_IN_VENV) tools/memory_figure.py

BENCHMARK := $(PYTHON_IN_VENV) -m megatron_solopo.cli benchmark
benchmark: setup ## speed of training beside its FLOP floor and TRL, small (8 minutes); BASELINE=FILE compares
	$(BENCHMARK) --suite quick --overwrite --output runs/benchmark $(if $(BASELINE),--baseline $(BASELINE))

benchmark-full: setup ## the tables of docs/benchmarks.md, measured again (hours; finished tables are kept)
	$(BENCHMARK) --suite full --profile --output runs/benchmark-full --page docs/benchmarks.md

lock: ## write uv.lock anew after a change of pyproject.toml, and constraints.txt from it (needs uv)
	uv lock
	(echo '# Exported from uv.lock, for pip; written by `make lock`.'; uv export --frozen --quiet --extra test --extra dev --extra docs --no-hashes \
		--no-emit-project --no-annotate --no-header | sed 's/ ;.*//') > constraints.txt

clean: ## remove caches and build outputs (runs/ and .venv stay)
	rm -rf build dist .pytest_cache ./*.egg-info
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -print0 | xargs -0r rm -rf
