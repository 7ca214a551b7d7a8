# Sourced by the other scripts: where things are, and how they speak.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"
venv=${TRIVISOR_VENV:-$root/.venv}
# The demo, the benches and the tests share one home, so that kit, image and ice are made once.
TRIVISOR_HOME=${TRIVISOR_DEMO_HOME:-$root/.trivisor-demo}
export TRIVISOR_HOME
# A session of a CI may have no home of its own.
HOME=${HOME:-$root/.trivisor-demo}
export HOME

say() {
    printf '== %s\n' "$*" >&2
}

fail() {
    printf '%s\n' "$*" >&2
    exit 1
}
