#!/bin/bash
# Makes the samples in this directory from a real server. Run as a user who may run servers (not root):
#   make.sh MAJOR BINDIR OUTDIR          BINDIR: the server's initdb, pg_ctl; psql, zstd (and, for 15, pg_basebackup) on the PATH.
# Every file is from one fresh cluster with 1 MiB segments and data checksums; 15 also has a standby that is promoted.
set -euo pipefail
major=$1 bin=$2 out=$3
work=$(mktemp -d); mkdir -p "$out" "$work/archive" "$work/space"
export PGHOST=$work PGUSER=postgres PGDATABASE=postgres PGOPTIONS=
trap '"$bin/pg_ctl" -D "$work/a" -m immediate stop >/dev/null 2>&1 || true; "$bin/pg_ctl" -D "$work/b" -m immediate stop >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
keep() { zstd -q -19 -f "$1" -o "$out/$major-$2.zst"; }
sql() { psql -XqAt -p "$1" -c "$2"; }

"$bin/initdb" -D "$work/a" -U postgres -A trust -k --wal-segsize=1 --locale=C -E UTF8 >/dev/null
cat >> "$work/a/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
port = 1
wal_level = replica
archive_mode = on
archive_command = 'cp %p $work/archive/%f'
archive_timeout = 0
checkpoint_timeout = 1h
min_wal_size = 4MB
max_wal_size = 8MB
shared_buffers = 16MB
autovacuum = off
CONF
"$bin/pg_ctl" -D "$work/a" -l "$work/a.log" -w start >/dev/null

sql 1 "CREATE TABLESPACE space LOCATION '$work/space'" && sql 1 "CREATE TABLE t (id int PRIMARY KEY, v text)" && sql 1 "CREATE TABLE u (v int) TABLESPACE space"
sql 1 "INSERT INTO t SELECT i, repeat('v', i % 50) FROM generate_series(1, 20000) i"
sql 1 "BEGIN; INSERT INTO u VALUES (1); ROLLBACK"
sql 1 "UPDATE t SET v = v || 'x' WHERE id % 3 = 0"
for i in 1 2 3; do sql 1 "CHECKPOINT"; sql 1 "INSERT INTO u SELECT generate_series(1, 30000)"; done
sql 1 "CHECKPOINT"
# A switch with little before it.
sql 1 "SELECT pg_switch_wal()" >/dev/null
sql 1 "INSERT INTO u VALUES (7)"; name=$(sql 1 "SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
sql 1 "SELECT pg_switch_wal()" >/dev/null
sql 1 "INSERT INTO u VALUES (8)"
for i in $(seq 50); do [ -e "$work/archive/$name" ] && break; sleep 0.1; done
keep "$work/archive/$name" "switch-$name"
# The current segment: a few new pages over a recycled file.
sql 1 "INSERT INTO u SELECT generate_series(1, 500)"; current=$(sql 1 "SELECT pg_walfile_name(pg_current_wal_lsn())")
keep "$work/a/pg_wal/$current" "incomplete-$current"
# The last file of the directory waits for a future use.
recycled=$(ls "$work/a/pg_wal" | grep -E '^[0-9A-F]{24}$' | tail -1)
keep "$work/a/pg_wal/$recycled" "recycled-$recycled"

if [ "$major" = 15 ]; then
    full=$(ls "$work/archive" | sed -n 4p); keep "$work/archive/$full" "full-$full"
    # A backup history file, of a label that looks like a later line.
    psql -XqAt -p 1 -c "SELECT pg_backup_start(E'nightly\nof START TIMELINE: 7', true)" -c "SELECT pg_backup_stop(false)" >/dev/null
    cp "$work"/a/pg_wal/*.backup "$out/$major-backup_history"
    sql 1 "CHECKPOINT"
    relation=$(sql 1 "SELECT pg_relation_filepath('t')"); head -c 65536 "$work/a/$relation" > "$work/pages"; keep "$work/pages" "relation-pages"
    # A backup, its label, map and manifest; then a standby of it that is promoted within a segment.
    pg_basebackup -p 1 -D "$work/b" -T "$work/space=$work/space2" -X stream -c fast --manifest-checksums=CRC32C
    cp "$work/b/backup_label" "$out/$major-backup_label"; keep "$work/b/backup_manifest" "backup_manifest"
    sed -i "s#port = 1#port = 2#; s#$work/archive#$work/archive2#" "$work/b/postgresql.conf"; mkdir "$work/archive2"
    echo "primary_conninfo = 'host=$work port=1 user=postgres'" >> "$work/b/postgresql.conf"; touch "$work/b/standby.signal"
    "$bin/pg_ctl" -D "$work/b" -l "$work/b.log" -w start >/dev/null
    sql 1 "INSERT INTO u SELECT generate_series(1, 40000)"
    cp "$work/b/global/pg_control" "$work/control.standby"; keep "$work/control.standby" "standby-pg_control"
    sleep 1; "$bin/pg_ctl" -D "$work/a" -m immediate stop >/dev/null
    "$bin/pg_ctl" -D "$work/b" -w promote >/dev/null; sql 2 "INSERT INTO u SELECT generate_series(1, 20000)"; sql 2 "SELECT pg_switch_wal()" >/dev/null
    for i in $(seq 100); do ls "$work/archive2" | grep -q '^00000002................$' && break; sleep 0.1; done; sleep 1
    ls -l "$work/archive2"
    cp "$work/archive2/00000002.history" "$out/$major-00000002.history"
    partial=$(ls "$work/archive2" | grep partial); keep "$work/archive2/$partial" "$partial"
    first=$(ls "$work/archive2" | grep '^00000002................$' | head -1); keep "$work/archive2/$first" "first-$first"
    "$bin/pg_ctl" -D "$work/b" -m fast stop >/dev/null
    keep "$work/b/global/pg_control" "pg_control"
else
    "$bin/pg_ctl" -D "$work/a" -m fast stop >/dev/null
    keep "$work/a/global/pg_control" "pg_control"
fi
"$bin/postgres" --version >> "$out/VERSIONS"
ls -l "$out"
