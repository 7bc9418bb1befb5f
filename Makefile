# make test: everything a change must pass, from nothing. make check: the same without the set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup check test format

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

setup: $(BIN)/.ready

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

test: setup
	$(MAKE) check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# CPU per request and per chunk against Envoy, vllm-router and smg; ARGS as in `python3 -m bench.overhead --help`
.PHONY: bench-overhead
bench-overhead: setup
	$(PYTHON) -m bench.overhead $(ARGS)

# Twenty simulated engines under four routers, in about 90 s; ARGS as in `pointsman demo --help`
$(BIN)/.demo-ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

.PHONY: demo
demo: $(BIN)/.demo-ready
	$(BIN)/pointsman demo --output out/demo $(ARGS)

# Two real vLLM servers (CPU, 3.5 GB of packages in out/vllm, some minutes the first time) behind Pointsman
.PHONY: test-vllm
test-vllm: setup
	$(BIN)/python tests_vllm/setup.py
	$(BIN)/python -m pytest tests_vllm $(ARGS)

# The shared index in a real Redis or Valkey, which must be installed (Debian: redis-server); `make test` skips it else
.PHONY: test-redis
test-redis: setup
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null || \
	  { echo "test-redis: needs redis-server or valkey-server on the path" >&2; exit 2; }
	$(BIN)/python -m pytest tests/prefix/test_shared.py tests/proxy/test_shared_index.py $(ARGS)

# Ten minutes of load on engines that are killed, hung and restarted; ARGS as in `python -m bench.soak --help`
.PHONY: soak
soak: setup
	$(BIN)/python -m bench.soak $(ARGS)

# The same fleet in the twin and over HTTP, about ten minutes; ARGS as in `python -m bench.twin_live --help`
.PHONY: bench-twin-live
bench-twin-live: setup
	$(BIN)/python -m bench.twin_live $(ARGS)

# The default policy against others in 34 simulated worlds, 15 minutes; ARGS as in `python -m bench.worlds --help`
.PHONY: bench-worlds
bench-worlds: setup
	$(BIN)/python -m bench.worlds $(ARGS)

# Requests go to the same places behind Envoy and the picker as behind `serve`, 8 minutes; ARGS as in `python -m bench.placement --help`
.PHONY: test-envoy-fleet
test-envoy-fleet: setup
	$(BIN)/python -m bench.placement $(ARGS)
