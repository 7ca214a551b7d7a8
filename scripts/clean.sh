#!/bin/sh
# Remove what set-up and builds made. Machines of the demo's home are deleted first, so none is left running.
. "$(dirname -- "$0")/common.sh"
if [ -x "$venv/bin/trivisor" ] && [ -d "$TRIVISOR_HOME" ]; then
    for id in $("$venv/bin/trivisor" ps -aq); do
        "$venv/bin/trivisor" delete --force "$id" >/dev/null
    done
fi
make -C guest --no-print-directory clean
rm -rf "$venv" "$root/.trivisor-demo" "$root/src/trivisor/_guest" "$root/dist" "$root/build"
