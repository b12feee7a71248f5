#!/bin/sh
# Runs what concerns S3 on a real service: the suite of stores with the probe, then the scenarios of archiving, outages,
# backups and restores. Starts a RADOS gateway of its own in a temporary directory, or uses the service that
# PGCONVOY_TEST_S3_ENDPOINT names.
#
#   tests/ceph/test.sh [FILTER...]      only scenarios whose names contain one of these
set -eu
cd "$(dirname "$0")/../.."

if [ -z "${PGCONVOY_TEST_S3_ENDPOINT-}" ]; then
    directory=$(mktemp -d /tmp/pgconvoy-ceph.XXXXXX)
    trap 'tests/ceph/rgw.sh stop "$directory" && rmdir "$directory"' EXIT
    trap 'exit 130' INT TERM
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    variables=$(tests/ceph/rgw.sh start "$directory" "$port")
    set -a
    eval "$variables"
    set +a
fi
[ $# -gt 0 ] || set -- archive:: outage:: backup:: restore::

cargo test --locked -p tests --features s3-endpoint --test s3_endpoint -- --nocapture
cargo test --locked -p tests --test scenarios -- "$@"
