#!/bin/sh
# Lint and types, the guest's unit tests under sanitizers, its fuzzers, then the test suite by two workers, whose summary is the last line.
. "$(dirname -- "$0")/common.sh"
mkdir -p build
# The machine that all others are cloned from boots meanwhile. What is wrong with it, the tests say.
PYTHONPATH=tests "$root/scripts/in-venv.sh" python -m iced "${TRIVISOR_TEST_HOME:-$root/.trivisor-demo}" >build/ice.log 2>&1 &
trap wait EXIT
"$root/scripts/lint.sh"
say "guest: unit tests under ASan and UBSan"
make -C guest --no-print-directory --silent -j2 test
say "guest: fuzzers, ${FUZZ_SECONDS:-5} s each"
# libFuzzer talks a lot; only what it says of a finding is of interest.
make -C guest --no-print-directory -j2 fuzz FUZZ_SECONDS="${FUZZ_SECONDS:-5}" >build/fuzz.log 2>&1 || { tail -60 build/fuzz.log >&2 && exit 1; }
wait
say "test suite"
PATH=$venv/bin:$PATH
export PATH
exec python -m pytest -q -n 2 "$@"
