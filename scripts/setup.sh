#!/bin/sh
# All set-up, each part only where it is still to do: a second run takes a second.
#   setup.sh python   the virtual environment and the guest program
#   setup.sh demo     and what machines need: system packages, the Debian image
#   setup.sh test     and what only the tests need
#   setup.sh bench    or the peers that only the benches need
. "$(dirname -- "$0")/common.sh"
what=${1:-demo}

"$root/scripts/packages.sh" "$what"

# The stamp is of all that decides what pip would install.
stamp=$(cat pyproject.toml constraints.txt scripts/hatch_build.py | cksum)
if [ "$(cat "$venv/trivisor.stamp" 2>/dev/null)" != "$stamp" ]; then
    python=$("$root/scripts/python.sh")
    say "making a virtual environment with $("$python" --version)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    PIP_CONSTRAINT=$root/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$venv/bin/python" -m pip install -qq --editable '.[dev]'
    printf '%s\n' "$stamp" >"$venv/trivisor.stamp"
fi

# A peer of bench/vos.py, which goes without where there is none for this Python.
if [ "$what" = bench ] && ! "$venv/bin/python" -c 'import sandlock' 2>/dev/null; then
    PIP_CONSTRAINT=$root/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$venv/bin/python" -m pip install -qq --editable '.[bench]' || say "no sandlock here: the benches go without"
fi

# Quick when nothing changed. pip compiled it too, but only once.
make -C guest --no-print-directory --silent

[ "$what" = python ] || "$root/scripts/in-venv.sh" python -m scripts.prepare
