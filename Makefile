# make demo        set up what is missing, start the engine on a small model and ask it about two pictures
# make test        set up what is missing and run the tests, but for the long ones
# make test-slow   those
.PHONY: demo test test-slow lint lint-docker lock setup clean
.DEFAULT_GOAL := test

demo: setup
	.venv/bin/mmv1 demo

test: setup
	@bash scripts/redis_server.sh
	@bash scripts/chromium.sh
	.venv/bin/python -m pytest -m "not slow"

test-slow: setup
	@bash scripts/redis_server.sh
	.venv/bin/python -m pytest -m slow

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy

lint-docker: setup
	@bash scripts/lint_docker.sh

setup:
	@bash scripts/setup.sh

# Versions stay as they are unless pyproject.toml asks for others; `rm requirements.lock` first to take the newest.
lock: setup
	PATH="$$PATH:$(CURDIR)/.tools/uv/bin" uv pip compile pyproject.toml --group dev --universal --python-version 3.11 \
	    --generate-hashes --no-emit-index-url --no-header --quiet -o requirements.lock

clean:
	rm -rf .venv .tools build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
