.PHONY: check test test-slow test-gpu

check:
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

test:
	bash scripts/test.sh

test-slow:
	bash scripts/test.sh -m slow

test-gpu:
	bash scripts/test.sh -m gpu
