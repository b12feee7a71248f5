#!/bin/sh
# The long form of the scenarios on every major version: archiving, backup, the hybrid shape, increments and restore, each on a server of
# its own.
#
#   tests/majors.sh [MAJOR...]     without one: 14 15 16 17 18
#
# PGCONVOY_TEST_POSTGRES chooses the version of one run; any test target of this crate knows it. What special records say
# is looked at on each; change maps are compared with pg_waldump only where the version has its own: what tests/servers.sh
# takes from npm has none.
set -eu
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || set -- 14 15 16 17 18
for major; do
    echo "tests/majors.sh: PostgreSQL $major"
    PGCONVOY_TEST_POSTGRES=$major
    export PGCONVOY_TEST_POSTGRES
    ${CARGO:-cargo} test --locked -p tests --test scenarios -- archive:: backup:: hybrid:: increment:: pages:: restore::
    named=special
    for dump in "/usr/lib/postgresql/$major/bin/pg_waldump" "/usr/pgsql-$major/bin/pg_waldump" \
        "$(tests/servers.sh where)/$major/usr/lib/postgresql/$major/bin/pg_waldump"; do
        [ ! -x "$dump" ] || named=
    done
    ${CARGO:-cargo} test --locked -p tests --test changes -- $named
done
