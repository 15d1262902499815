# The habits: `make check` before each commit (minutes); `./launch.sh test` adds the slow tests and is what CI runs.
PYTHON ?= $(if $(VIRTUAL_ENV),python,.venv/bin/python)
.PHONY: check format lint types fast test docs

check: format lint types fast

format:
	$(PYTHON) -m ruff format .

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m codespell_lib

types:
	$(PYTHON) -m mypy

fast:
	$(PYTHON) -m pytest -n 2 -m "not slow"

test:
	./launch.sh test

docs: # the site, into site/: open site/index.html
	@$(PYTHON) -c "import mkdocs" 2>/dev/null || { echo "needs the extra docs: $(PYTHON) -m pip install -e '.[docs]'"; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
