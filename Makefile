# `make` lists the targets. Everything stays inside the repository: the environment in .venv, state in .ddpm.
VENV ?= .venv
PYTHON ?= python3
# Arguments for `prefect deployment run`, such as ARGS="-p preset=fashion-mnist". PREFECT_PORT=4201 and MLFLOW_PORT=5001
# choose other ports on 127.0.0.1 than 4200 and 5000; later commands use those of the last `make up`.
ARGS ?=

# PORTABLE=1 limits torch's libraries to instructions that give the same results on every x86-64 processor with AVX2.
ifdef PORTABLE
export ATEN_CPU_CAPABILITY := avx2
export ONEDNN_MAX_CPU_ISA := AVX2
export MKL_CBWR := COMPATIBLE
endif

# If set, as in many container images, every process would recompile its imports.
unexport PYTHONDONTWRITEBYTECODE

# It would override prefect.toml, to which `make up` writes the server's address.
unexport PREFECT_API_URL

export PATH := $(abspath $(VENV))/bin:$(PATH)
export PREFECT_HOME := $(CURDIR)/.ddpm/prefect
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.PHONY: help setup train emoji test mutants deploy-team up down status repro scrub lint audit docs lock

help: ## List these commands.
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	@# Python compiles what is imported; if pip compiled everything, this would take nearly twice as long.
	$(PIP) --no-compile -r requirements.lock
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.lock
	$(PIP) --no-compile -r requirements.lock -r requirements-dev.lock
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) --no-compile -c requirements.lock --editable '.[docs]'
	@touch $@

setup: $(VENV)/installed ## Make the environment: .venv with the locked packages.
	@mkdir -p $(PREFECT_HOME)

train: up ## Start the services and run the pipeline; ARGS="-p preset=fashion-mnist" and the like.
	prefect deployment run train-ddpm --watch $(ARGS)
	@echo
	@ddpm summary

EMOJI = emoji-datasource-google

emoji: setup ## Download 3,786 emoji (by npm), set params.yaml for them, and train.
	@command -v npm > /dev/null || { echo "make emoji: npm is not installed; it downloads the pictures"; exit 1; }
	@test -e data/raw/emoji.zip || { \
	  npm pack --silent --pack-destination .ddpm $(EMOJI)@16.0.0 > /dev/null && \
	  python data/emoji.py .ddpm/$(EMOJI)-16.0.0.tgz .ddpm/emoji.zip && \
	  ddpm import .ddpm/emoji.zip --name emoji --size 32 \
    --license Apache-2.0 --source-url https://github.com/googlefonts/noto-emoji; }
	@$(MAKE) --no-print-directory train ARGS="-p preset=emoji $(ARGS)"

test: setup $(VENV)/installed-dev ## Run the tests, each file in one of several processes.
	OMP_NUM_THREADS=1 pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

mutants: setup $(VENV)/installed-dev ## Insert random faults and check that the tests notice them; ARGS="--count 60 --seed 1".
	$(PIP) mutmut==3.8.1
	OMP_NUM_THREADS=1 python tests/mutants.py $(ARGS)

deploy-team: export PREFECT_API_URL := $(PREFECT_API_URL)
deploy-team: setup ## Deploy the current commit for a team's workers (docs/team.md).
	@test -n "$(PREFECT_API_URL)" || { echo 'deploy-team: set PREFECT_API_URL to the address of your team'"'"'s server'; exit 1; }
	@python -m flows.published commit > /dev/null && python -m flows.published repository > /dev/null
	prefect --no-prompt deploy --prefect-file deploy/team/prefect.yaml --all
	@prefect --no-prompt automation delete ddpm-lost-runs > /dev/null 2>&1 || true
	prefect automation create --from-file deploy/team/automations.yaml

up: setup ## Start Prefect, MLflow and a worker in the background.
	@python -m flows.services up

down: setup ## Stop them; a running training writes a checkpoint.
	@python -m flows.services down

status: setup ## Show their status.
	@python -m flows.services status

repro: setup ## Run the pipeline by DVC alone, in the working tree, and bring the results into MLflow.
	python -m flows.repro
	@ddpm track

scrub: setup ## Delete damaged files from DVC's cache, which DVC trusts unread; `dvc repro` makes them again.
	@python -m flows.scrub

lint: setup $(VENV)/installed-dev ## Check style, types and imports.
	ruff check
	ruff format --check
	mypy
	lint-imports --no-cache --no-logo

audit: setup ## Look up known vulnerabilities of the locked packages; needs the internet.
	$(PYTHON) -m venv .ddpm/audit
	.ddpm/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	@# --strict: a package that cannot be looked up is an error.
	.ddpm/audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements.lock -r requirements-dev.lock

docs: setup $(VENV)/installed-docs ## Build the documentation in site/ and check its links.
	@# mkdocs.yml says why it is built from a copy.
	rm -rf .ddpm/docs && mkdir -p .ddpm/docs
	git ls-files -z -- . ':!tests' | tar --create --null --files-from - | tar --extract --directory .ddpm/docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "The documentation is in site/index.html"

lock: ## Regenerate requirements.lock and requirements-dev.lock from pyproject.toml.
	$(PYTHON) -m venv --clear .ddpm/lock
	.ddpm/lock/bin/pip install --quiet --disable-pip-version-check setuptools --editable '.[dev]'
	$(FREEZE) > .ddpm/lock-all
	$(PYTHON) -m venv --clear .ddpm/lock # the same versions for both: the tests' packages set some limits
	.ddpm/lock/bin/pip install --quiet --disable-pip-version-check -c .ddpm/lock-all setuptools --editable .
	$(FREEZE) > .ddpm/lock-run
	{ head -n 1 requirements.lock; cat .ddpm/lock-run; } > .ddpm/requirements.lock
	{ head -n 1 requirements-dev.lock; grep -Fvxf .ddpm/lock-run .ddpm/lock-all; } > .ddpm/requirements-dev.lock
	mv .ddpm/requirements.lock .ddpm/requirements-dev.lock .
# Each platform needs one of the two ONNX Runtimes; torch itself selects its GPU packages.
FREEZE = .ddpm/lock/bin/pip freeze --all --exclude-editable | sed -E \
	  -e '/^(pip|wheel|triton|nvidia-.*|cuda-.*)==/d' -e 's/^(torch==[0-9.]+)\+.*/\1/' \
	  -e 's/^onnxruntime(-gpu)?==(.*)/onnxruntime-gpu==\2 ; $(LINUX)\nonnxruntime==\2 ; $(OTHERS)/'
LINUX = sys_platform == "linux" and platform_machine == "x86_64"
OTHERS = sys_platform != "linux" or platform_machine != "x86_64"
