#!/bin/sh
# A RADOS gateway on loopback, with one monitor and one object store in memory: a real S3 service for tests.
#
#   rgw.sh start DIRECTORY [PORT]   starts all three (on a free port without one), makes a user and a bucket, and prints
#                                   the variables that tests read, as shell assignments
#   rgw.sh stop DIRECTORY           ends them by their ids and removes what they wrote
#
# Needs the Debian packages ceph-mon, ceph-osd, radosgw and ceph-common. Everything is in DIRECTORY; objects are lost
# at the end. Nothing here is a way to run Ceph for anything but a test: one copy, no disks, no manager.
set -eu

access_key=pgconvoy-test
secret_key=pgconvoy-test-secret
bucket=pgconvoy-test
python=$(cd "$(dirname "$0")/.." && pwd)/python.sh
memory_bytes=${CEPH_MEMORY_BYTES:-4294967296}

fail() {
    echo "rgw.sh: $*" >&2
    exit 1
}

# Tries a command once a second until it succeeds.
await() {
    seconds=$1
    shift
    while ! "$@" >/dev/null 2>&1; do
        seconds=$((seconds - 1))
        [ "$seconds" -gt 0 ] || fail "gave up waiting for: $* (logs are in $directory/log)"
        sleep 1
    done
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Starts a daemon in the foreground of its own session and keeps its id.
launch() {
    name=$1
    shift
    setsid "$@" >"$directory/log/$name.out" 2>&1 </dev/null &
    echo $! >"$directory/run/$name.pid"
}

conf() {
    cat <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = [v2:127.0.0.1:$monitor_port]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = $directory/keyring
run dir = $directory/run
admin socket = $directory/run/\$name.asok
log file = $directory/log/\$name.log

mon data = $directory/mon
mon allow pool size one = true
mon warn on pool no redundancy = false

osd data = $directory/osd
osd objectstore = memstore
memstore device bytes = $memory_bytes
osd crush update on start = false
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8

rgw frontends = beast endpoint=127.0.0.1:$port
rgw dns name = 127.0.0.1
CONF
}

keys() {
    ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    ceph-authtool keyring --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd'
    ceph-authtool keyring --gen-key -n client.gateway --cap mon 'allow rwx' --cap osd 'allow rwx'
}

ceph_quick() {
    timeout 20 ceph -c "$directory/ceph.conf" "$@"
}

osd_is_up() {
    ceph_quick osd stat | grep -q '1 up'
}

make_bucket() {
    PGCONVOY_ENDPOINT=http://127.0.0.1:$port ACCESS=$access_key SECRET=$secret_key BUCKET=$bucket "$python" - <<'PYTHON'
# One signed PUT of a bucket, so that no S3 tool need be installed.
import datetime, hashlib, hmac, os, urllib.request

host = os.environ["PGCONVOY_ENDPOINT"].split("//")[1]
bucket, region = os.environ["BUCKET"], "us-east-1"
now = datetime.datetime.now(datetime.timezone.utc)
stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
empty = hashlib.sha256(b"").hexdigest()
names = "host;x-amz-content-sha256;x-amz-date"
request = f"PUT\n/{bucket}\n\nhost:{host}\nx-amz-content-sha256:{empty}\nx-amz-date:{stamp}\n\n{names}\n{empty}"
scope = f"{day}/{region}/s3/aws4_request"
text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
key = ("AWS4" + os.environ["SECRET"]).encode()
for part in (day, region, "s3", "aws4_request"):
    key = hmac.new(key, part.encode(), hashlib.sha256).digest()
signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
headers = {
    "x-amz-date": stamp,
    "x-amz-content-sha256": empty,
    "Authorization": f"AWS4-HMAC-SHA256 Credential={os.environ['ACCESS']}/{scope}, SignedHeaders={names}, Signature={signature}",
}
urllib.request.urlopen(urllib.request.Request(f"http://{host}/{bucket}", method="PUT", headers=headers), timeout=20)
PYTHON
}

start() {
    for program in ceph-mon ceph-osd radosgw ceph; do
        command -v "$program" >/dev/null || fail "$program is missing: apt-get install ceph-mon ceph-osd radosgw ceph-common"
    done
    [ ! -e "$directory/run" ] || fail "$directory is in use; end it with: rgw.sh stop $directory"
    mkdir -p "$directory/run" "$directory/log" "$directory/mon" "$directory/osd"
    monitor_port=$(free_port)
    port=${port:-$(free_port)}
    conf >"$directory/ceph.conf"
    cd "$directory"
    trap 'status=$?; [ $status -eq 0 ] || end_all' EXIT
    keys >log/keys.out 2>&1
    monmaptool --create --fsid "$(sed -n 's/^fsid = //p' ceph.conf)" --addv a "[v2:127.0.0.1:$monitor_port]" monmap >log/monmap.out
    ceph-mon -c ceph.conf -i a --mkfs --monmap monmap --keyring keyring >log/mon.mkfs.out 2>&1
    launch mon ceph-mon -c ceph.conf -i a -f
    await 30 ceph_quick osd create
    ceph-osd -c ceph.conf -i 0 --mkfs >log/osd.mkfs.out 2>&1
    {
        ceph_quick osd crush add-bucket here host
        ceph_quick osd crush move here root=default
        ceph_quick osd crush add osd.0 1.0 host=here
    } >log/crush.out 2>&1
    launch osd ceph-osd -c ceph.conf -i 0 -f
    await 30 osd_is_up
    launch gateway radosgw -c ceph.conf -n client.gateway -f
    await 60 "$python" -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/', timeout=5)"
    timeout 60 radosgw-admin -c ceph.conf -n client.gateway user create --uid=pgconvoy --display-name=pgconvoy \
        --access-key="$access_key" --secret="$secret_key" >log/user.out 2>&1
    make_bucket
    cat <<ENVIRONMENT
PGCONVOY_TEST_S3_ENDPOINT=http://127.0.0.1:$port
PGCONVOY_TEST_S3_REGION=us-east-1
PGCONVOY_TEST_S3_BUCKET=$bucket
PGCONVOY_TEST_S3_ACCESS_KEY=$access_key
PGCONVOY_TEST_S3_SECRET_KEY=$secret_key
ENVIRONMENT
}

end_all() {
    for name in gateway osd mon; do
        [ -f "$directory/run/$name.pid" ] || continue
        pid=$(cat "$directory/run/$name.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            kill -0 "$pid" 2>/dev/null || break
            sleep 1
        done
        kill -9 "$pid" 2>/dev/null || true
    done
}

stop() {
    [ -d "$directory/run" ] || fail "nothing was started in $directory"
    end_all
    rm -rf "$directory/run" "$directory/log" "$directory/mon" "$directory/osd" \
        "$directory/ceph.conf" "$directory/keyring" "$directory/monmap"
}

[ $# -ge 2 ] || fail "usage: rgw.sh start DIRECTORY [PORT] | rgw.sh stop DIRECTORY"
action=$1
mkdir -p "$2"
directory=$(cd "$2" && pwd)
port=${3-}
case $action in
    start) start ;;
    stop) stop ;;
    *) fail "unknown: $action" ;;
esac
