#!/bin/sh
# Formatting, lint, types, import layers. Each says what it found; all are run.
. "$(dirname -- "$0")/common.sh"
PATH=$venv/bin:$PATH
export PATH
status=0
say "ruff"
ruff check . || status=1
ruff format --check --quiet . || { status=1 && ruff format --diff . 2>&1 | head -40 >&2; }
say "mypy"
mypy || status=1
say "import layers"
lint-imports --no-cache >/dev/null || { status=1 && lint-imports --no-cache; }
exit $status
