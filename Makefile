# moe_lab: everything a newcomer types. `make` alone explains.
PYTHON   ?= python3
PIP_ARGS ?=
VENV     := .venv
PY       := $(VENV)/bin/python
NOTEBOOKS := $(wildcard notebooks)

.DEFAULT_GOAL := help
.PHONY: help run test lab lint clean

help:
	@echo "make run    run the headline notebooks on embedded data, with a report in HTML"
	@echo "make test   run all tests"
	@echo "make lab    open JupyterLab with the notebooks"
	@echo "make lint   check style"
	@echo "make clean  delete the virtual environment (runs/ and data/ stay)"
	@echo
	@echo "The first of them makes a virtual environment in $(VENV)/ and needs Python 3.11 or newer."
	@echo "Another Python: make run PYTHON=python3.12      Arguments for pip: make run PIP_ARGS='--proxy ...'"

# The report is written also when a notebook failed: it shows what finished, and where the other stopped.
run: $(VENV)/.installed
	@$(PY) -m moe_lab run --headline --profile quick; status=$$?; $(PY) -m moe_lab report && exit $$status

# One thread per process, since there are two processes. A notebook's cells stay together, in one kernel (loadfile). In the
# order of collection the longest files come in the middle and short ones last, so that neither process waits long.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env tests $(NOTEBOOKS) $(PYTEST_ARGS)

lab: $(VENV)/.installed
	$(PY) -m jupyter lab --notebook-dir=notebooks

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV)

# With the extra "bert": notebook 07 needs it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install $(PIP_ARGS) -c constraints.txt -e ".[bert]"
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install $(PIP_ARGS) -c constraints.txt -e ".[test]"
	@touch $@ $(VENV)/.installed

$(PY):
	@command -v $(PYTHON) > /dev/null || \
	  { echo "There is no $(PYTHON). Install Python 3.11 or newer, or name yours: make run PYTHON=..."; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "moe_lab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make run PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" 2> /dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
