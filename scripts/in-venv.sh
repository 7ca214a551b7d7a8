#!/bin/sh
# Run a command with the project's virtual environment and home.
. "$(dirname -- "$0")/common.sh"
PATH=$venv/bin:$PATH
export PATH
exec "$@"
