#!/bin/sh
# The Python that tests run, wherever one is run: PGCONVOY_TEST_PYTHON, else the distribution's, whose modules
# tests/preflight.sh can install, else the first in PATH (which may well be a version manager's, without them).
set -eu

python=${PGCONVOY_TEST_PYTHON-}
if [ -z "$python" ]; then
    python=/usr/bin/python3
    [ -x "$python" ] || python=python3
fi
exec "$python" "$@"
