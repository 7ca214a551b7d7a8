#!/bin/sh
# Print the first Python that is new enough and can make a virtual environment.
for name in ${TRIVISOR_PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        "$name" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done
echo "Python 3.11 or later, with venv, is needed" >&2
exit 1
