#!/bin/sh
# Runs what concerns S3 on a real service: the suite of stores with the probe, then the scenarios of archiving, outages,
# backups, restores and promotion. Starts a RADOS gateway of its own in a temporary directory, or uses the service that
# the environment names:
#
#   PGCONVOY_TEST_S3_ENDPOINT     http://HOST:PORT, path style
#   PGCONVOY_TEST_S3_BUCKET       a bucket that exists; what is written there stays, under prefixes of its own
#   PGCONVOY_TEST_S3_ACCESS_KEY, PGCONVOY_TEST_S3_SECRET_KEY
#   PGCONVOY_TEST_S3_REGION       us-east-1 unless set
#   PGCONVOY_TEST_S3_CA_FILE      whom an https endpoint is signed by, if not by a public authority
#
# An https endpoint gets the suite of stores only: scenarios cut the links to the service, and a certificate fits no link.
# So runs the project's own server, for instance:
#
#   target/debug/tests-s3-server --listen 127.0.0.1:9000 --bucket b --access-key k --secret-key s &
#   PGCONVOY_TEST_S3_ENDPOINT=http://127.0.0.1:9000 PGCONVOY_TEST_S3_BUCKET=b PGCONVOY_TEST_S3_ACCESS_KEY=k \
#       PGCONVOY_TEST_S3_SECRET_KEY=s make test-ceph
#
#   tests/ceph/test.sh [FILTER...]      only scenarios whose names contain one of these
set -eu
cd "$(dirname "$0")/../.."

if [ -z "${PGCONVOY_TEST_S3_ENDPOINT-}" ]; then
    directory=$(mktemp -d /tmp/pgconvoy-ceph.XXXXXX)
    trap 'tests/ceph/rgw.sh stop "$directory" && rmdir "$directory"' EXIT
    trap 'exit 130' INT TERM
    variables=$(tests/ceph/rgw.sh start "$directory")
    set -a
    eval "$variables"
    set +a
fi
# Scenarios with nothing but a directory are left to make test: most by their rooms, these by their names; the crash steps
# of backups as well, which are the same whatever the store.
[ $# -gt 0 ] || set -- archive::load archive::a_flipped outage:: backup:: restore:: failover:: \
    --skip to_a_directory --skip backup::a_promotion --skip on_schedule --skip without_a_direct_road \
    --skip restore::an_outage_during --skip strained --skip step_of_a_backup

# The whole workspace is named, so that these are the programs that `make units` built and nothing is built twice.
run() {
    target=$1
    shift
    "${CARGO:-cargo}" test --locked --workspace --test "$target" -- "$@"
}

run s3_endpoint --nocapture
case $PGCONVOY_TEST_S3_ENDPOINT in
    https:*) echo "LEFT OUT: all scenarios: $PGCONVOY_TEST_S3_ENDPOINT is not plain http, and links to it cannot be cut" ;;
    *) run scenarios "$@" ;;
esac
