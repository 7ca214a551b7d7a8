#!/bin/sh
# Lint and types, the guest's unit tests under sanitizers, its fuzzers, then the test suite, whose summary is the last line.
. "$(dirname -- "$0")/common.sh"
"$root/scripts/lint.sh"
say "guest: unit tests under ASan and UBSan"
make -C guest --no-print-directory test
say "guest: fuzzers, ${FUZZ_SECONDS:-20} s each"
make -C guest --no-print-directory fuzz FUZZ_SECONDS="${FUZZ_SECONDS:-20}"
say "test suite"
PATH=$venv/bin:$PATH
export PATH
exec python -m pytest -q "$@"
