PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo serve test check audit faults failover bench constraints clean

# Everything below installs what it needs first, from hashed versions.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r constraints.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/.installed  ## The main job, end to end: a charge through a real server, then the story
	env -u DATABASE_URL PATH="$(abspath $(BIN)):$$PATH" sample_requests/through_server.sh charge_payment.sh
	env -u DATABASE_URL $(BIN)/eci-pay demo

serve: $(VENV)/.installed  ## The HTTP API on 127.0.0.1:8086
	$(BIN)/eci-pay serve

test: $(VENV)/.installed  ## All tests; ARGS="--database-url=..." for a server of your own
	$(BIN)/pytest $(ARGS)

# What looks like a secret. Passwords by their name are ruff's to find (S105); in tests and manifests, which make some up or
# have examples, only what is told by its form counts.
DETECT = xargs -0 $(BIN)/detect-secrets-hook --no-verify --plugin .ci/key_detector.py --disable-plugin KeywordDetector
BY_FORM = $(foreach guess,BasicAuthDetector Base64HighEntropyString HexHighEntropyString,--disable-plugin $(guess))
EXAMPLES = tests k8s deploy docker-compose.yml

check: $(VENV)/.installed  ## Lint, format, types, import rules, secrets in the source
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files -z -- . $(EXAMPLES:%=':!%') ':!constraints.txt' ':!requirements.txt' | $(DETECT)
	git ls-files -z -- $(EXAMPLES) | $(DETECT) $(BY_FORM)

audit:  ## Known vulnerabilities of the versions in constraints.txt (needs pip-audit and PyPI's data about them)
	pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

faults: $(VENV)/.installed  ## Storms (tests/faults); ARGS="--seeds=20 --seconds=30"
	$(BIN)/python -m tests.faults $(ARGS)

failover: $(VENV)/.installed  ## Failovers under load; ARGS="--times=10 --pooler=old" (none, or new: from PgBouncer 1.21 on)
	$(BIN)/python -m tests.faults.failover $(ARGS)

BENCH ?= __main__
bench: $(VENV)/.installed  ## Measurements (wants wrk); BENCH=relay, scale, footprint, reconcile, startup or memory; ARGS="--rounds=1" for less
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

RESOLVE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-header --no-emit-index-url

constraints:  ## Resolve constraints.txt anew, and of it what the container image needs (needs uv)
	$(RESOLVE) --all-extras --output-file constraints.txt pyproject.toml
	echo setuptools | $(RESOLVE) --extra stripe --constraints constraints.txt --output-file requirements.txt pyproject.toml -

clean:
	rm -rf $(VENV) build *.egg-info
