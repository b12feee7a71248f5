#!/bin/sh
# Looks for what a make target needs, names each lack, and installs it where it may: on Debian, as root.
#
#   tests/preflight.sh demo|test|bench|servers|majors|ceph|packages
#
# Rust and the C compiler are only looked for. PostgreSQL's packages are kept from making a cluster of their own: a
# server that nobody asked for would take the port of one that somebody does.
set -eu

target=${1:?usage: tests/preflight.sh demo|test|bench|servers|majors|ceph|packages}
rust_wanted=1.95
postgres_oldest=14
createcluster=/etc/postgresql-common/createcluster.conf

lacks=
packages=

lack() { # message [package]
    echo "preflight: missing: $1" >&2
    if [ -n "${2-}" ]; then packages="$packages $2"; else lacks="$lacks; $1"; fi
}

program() { # program package
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || lack "$1" "$2"
}

# The one that tests/python.sh chooses. No package mends a choice that the environment made.
python_runs() { # code what package
    tests/python.sh -c "$1" >/dev/null 2>&1 && return
    if [ -n "${PGCONVOY_TEST_PYTHON-}" ]; then
        lack "$2, for PGCONVOY_TEST_PYTHON=$PGCONVOY_TEST_PYTHON"
    else
        lack "$2" "$3"
    fi
}

python_module() { # module package
    python_runs "import $1" "python3 module $1" "$2"
}

rust() {
    found=$(rustc --version 2>/dev/null | cut -d ' ' -f 2) || found=
    if [ -z "$found" ] || ! command -v cargo >/dev/null 2>&1; then
        lack "rustc and cargo $rust_wanted or newer (see https://rustup.rs)"
    elif [ "$(printf '%s\n%s\n' "$rust_wanted" "${found%%-*}" | sort -V | head -n 1)" != "$rust_wanted" ]; then
        lack "rustc $rust_wanted or newer; this is $found (see https://rustup.rs)"
    fi
    if [ "$target" = test ]; then
        cargo fmt --version >/dev/null 2>&1 || lack "rustfmt (rustup component add rustfmt)"
        cargo clippy --version >/dev/null 2>&1 || lack "clippy (rustup component add clippy)"
    fi
    command -v cc >/dev/null 2>&1 || lack "a C compiler called cc (package gcc)"
}

# A server and pgbench of one major version, in Debian's or PGDG's place.
has_postgres() {
    for bin in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin; do
        [ -x "$bin/postgres" ] && [ -x "$bin/initdb" ] && [ -x "$bin/pgbench" ] || continue
        major=${bin%/bin}
        major=${major##*[!0-9]}
        [ "$major" -ge "$postgres_oldest" ] && return 0
    done
    return 1
}

postgres() {
    has_postgres || lack "a PostgreSQL server from version $postgres_oldest on, with pgbench" postgresql
}

# What tests/servers.sh needs for those that are missing.
servers() {
    for major in $(tests/servers.sh missing); do
        case $major in
        14 | 15 | 16) program npm npm; program node nodejs ;;
        *) program apt-get apt; program dpkg-deb dpkg ;;
        esac
    done
}

wanted() {
    case $target in
    servers) servers; return ;;
    esac
    rust
    case $target in
    packages) program strip binutils; program gzip gzip; return ;;
    esac
    postgres
    case $target in
    demo | majors) ;;
    test)
        servers
        python_runs pass python3 python3
        python_module zstandard python3-zstandard
        python_module grpc python3-grpcio
        python_module google.protobuf python3-protobuf
        program debootstrap debootstrap
        program rpm2cpio rpm
        program cpio cpio
        program lintian lintian
        program dpkg-shlibdeps dpkg-dev
        program systemd-analyze systemd
        program man man-db
        program strip binutils
        ;;
    bench) program pgbackrest pgbackrest; program zstd zstd ;;
    ceph)
        # A service that the environment names needs none of Ceph here.
        [ -z "${PGCONVOY_TEST_S3_ENDPOINT-}" ] || return 0
        python_runs pass python3 python3
        program ceph-mon ceph-mon
        program ceph-osd ceph-osd
        program radosgw radosgw
        program ceph ceph-common
        ;;
    *) echo "preflight: no target is called $target" >&2; exit 2 ;;
    esac
}

may_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1
}

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    case " $packages " in
    *" postgresql "*) install_postgres ;;
    esac
    rest=$(echo " $packages " | sed 's/ postgresql / /')
    # shellcheck disable=SC2086 # a list of words
    [ -z "${rest# }" ] || apt-get install -q -y --no-install-recommends $rest
}

# postgresql-common first, then its setting, then the server; the setting is put back as it was.
install_postgres() {
    apt-get install -q -y --no-install-recommends postgresql-common
    cp -p "$createcluster" "$createcluster.preflight"
    sed -i 's/^#\{0,1\}\(create_main_cluster\)[ =].*$/\1 = false/' "$createcluster"
    grep -q '^create_main_cluster = false' "$createcluster" || echo 'create_main_cluster = false' >>"$createcluster"
    status=0
    apt-get install -q -y --no-install-recommends postgresql || status=$?
    mv "$createcluster.preflight" "$createcluster"
    return "$status"
}

wanted
if [ -n "$packages" ]; then
    if may_install; then
        install_packages >&2
        packages=
        lacks=
        wanted
        [ -z "$packages" ] || lacks="$lacks; still missing after installation:$packages"
    else
        lacks="$lacks; as root: apt-get install$packages"
    fi
fi
if [ -n "$lacks" ]; then
    echo "preflight: make $target cannot run: ${lacks#; }" >&2
    exit 1
fi
