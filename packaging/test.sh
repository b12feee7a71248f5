#!/bin/bash
# Proves the packages that `packaging/build.sh --upgrade` left in target/packages.
#
# The .deb are installed, upgraded over an edited configuration, removed and purged in a clean chroot of this machine's
# Debian release; the .rpm are unpacked and inspected (a real installation on an RPM system is not proven here). Needs
# root for the chroot. PGCONVOY_MIRROR names another mirror than the first of this machine's sources.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=$PWD/target/packages
base=$PWD/target/package-test-base.tar
work=$(mktemp -d /tmp/pgconvoy-packages.XXXXXX)
chroot=$work/chroot
# shellcheck disable=SC1091
. /etc/os-release

cleanup() {
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT

fail() {
    echo "packaging/test.sh: FAILED: $*" >&2
    exit 1
}

step() {
    echo "packaging/test.sh: $*"
}

[ "$(id -u)" = 0 ] || fail "needs root, to make a clean chroot; run make test as root, or the other parts by themselves"

agent_deb=$(echo "$packages"/pgconvoy_*.deb)
coordinator_deb=$(echo "$packages"/pgconvoy-coordinator_*.deb)
next_debs=("$packages"/next/*.deb)
agent_rpm=$(echo "$packages"/pgconvoy-[0-9]*.rpm)
coordinator_rpm=$(echo "$packages"/pgconvoy-coordinator-*.rpm)
for file in "$agent_deb" "$coordinator_deb" "${next_debs[@]}" "$agent_rpm" "$coordinator_rpm"; do
    [ -f "$file" ] || fail "$file is missing; run packaging/build.sh --upgrade"
done

mirror() {
    if [ -n "${PGCONVOY_MIRROR-}" ]; then
        echo "$PGCONVOY_MIRROR"
        return
    fi
    # Both forms of sources: `deb [options] URI SUITE …` lines and deb822 stanzas.
    {
        cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
            sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) \([^ ]*\) .*/\2 \3/p' || true
        cat /etc/apt/sources.list.d/*.sources 2>/dev/null |
            awk '/^URIs:/ {uri=$2} /^Suites:/ {for (i = 2; i <= NF; i++) print uri, $i}' || true
    } | awk -v suite="$VERSION_CODENAME" '$2 == suite {print $1; exit}'
}

inside() {
    DEBIAN_FRONTEND=noninteractive LC_ALL=C chroot "$chroot" "$@"
}

mode() { # path expected ("0640 root:postgres")
    local found
    found=$(inside stat -c '%a %U:%G' "$1") || fail "$1 is missing"
    [ "$found" = "$2" ] || fail "$1 is $found, expected $2"
}

absent() {
    [ ! -e "$chroot$1" ] || fail "$1 is still there"
}

prepare_chroot() {
    local url
    url=$(mirror)
    [ -n "$url" ] || fail "no mirror of $VERSION_CODENAME in this machine's apt sources; set PGCONVOY_MIRROR"
    if [ ! -f "$base" ] || [ "$(cat "$base.of" 2>/dev/null)" != "$VERSION_CODENAME $url" ]; then
        step "a clean $VERSION_CODENAME from $url"
        debootstrap --variant=minbase "$VERSION_CODENAME" "$work/base" "$url" >"$work/debootstrap.log" 2>&1 ||
            { tail -n 20 "$work/debootstrap.log" >&2; fail "debootstrap"; }
        printf '#!/bin/sh\nexit 101\n' >"$work/base/usr/sbin/policy-rc.d"
        chmod 755 "$work/base/usr/sbin/policy-rc.d"
        # What our packages depend on, so that repeated runs need no network; none of it is ours.
        DEBIAN_FRONTEND=noninteractive LC_ALL=C chroot "$work/base" sh -c \
            'apt-get update -q && apt-get install -q -y --no-install-recommends postgresql-common adduser && apt-get clean' \
            >"$work/depends.log" 2>&1 || { tail -n 20 "$work/depends.log" >&2; fail "installing dependencies"; }
        tar -C "$work/base" --one-file-system -cf "$base.new" .
        mv "$base.new" "$base"
        echo "$VERSION_CODENAME $url" >"$base.of"
        rm -rf "$work/base"
    fi
    mkdir "$chroot"
    tar -C "$chroot" -xf "$base"
    mkdir "$chroot/debs" "$chroot/debs/next"
    cp "$agent_deb" "$coordinator_deb" "$chroot/debs/"
    cp "${next_debs[@]}" "$chroot/debs/next/"
}

install_debs() { # directory in the chroot
    inside sh -c "dpkg -i $1/*.deb" >"$work/dpkg.log" 2>&1 || { cat "$work/dpkg.log" >&2; fail "dpkg -i $1"; }
}

test_installation() {
    step "installation"
    install_debs /debs
    inside getent passwd postgres >/dev/null || fail "there is no user postgres"
    inside getent passwd pgconvoy >/dev/null || fail "there is no user pgconvoy"
    mode /etc/pgconvoy/agent-main.toml "640 root:postgres"
    mode /etc/pgconvoy/coordinator.toml "640 root:pgconvoy"
    mode /etc/pgconvoy/pgconvoy.toml "644 root:root"
    mode /etc/pgconvoy/tls "755 root:root"
    mode /var/lib/pgconvoy/repository "750 pgconvoy:pgconvoy"
    mode /var/lib/pgconvoy "755 root:root"
    mode /var/lib/pgconvoy/agent "700 postgres:postgres"
    mode /var/lib/pgconvoy/coordinator "750 pgconvoy:pgconvoy"
    mode /run/pgconvoy "755 postgres:postgres"
    for program in bin/pgconvoy bin/pgconvoy-wal sbin/pgconvoy-agent sbin/pgconvoy-coordinator; do
        mode "/usr/$program" "755 root:root"
        inside "/usr/$program" --version >/dev/null || fail "$program does not start"
    done
    local enabled
    enabled=$(find "$chroot/etc/systemd/system" -name '*pgconvoy*' 2>/dev/null)
    [ -z "$enabled" ] || fail "a unit is enabled on installation: $enabled"
    local conffiles
    conffiles=$(inside dpkg-query -W -f '${Conffiles}\n' pgconvoy pgconvoy-coordinator | awk 'NF {print $1}' | sort | tr '\n' ' ')
    [ "$conffiles" = "/etc/pgconvoy/agent-main.toml /etc/pgconvoy/coordinator.toml /etc/pgconvoy/pgconvoy.toml " ] ||
        fail "conffiles are $conffiles"
    for sample in "pgconvoy-agent --check-config --config /etc/pgconvoy/agent-main.toml"; do
        # The sample names a data directory that does not exist here; it must be understood all the same.
        inside sh -c "$sample" >"$work/check.log" 2>&1 || true
        ! grep -qiE 'unknown field|TOML parse' "$work/check.log" || { cat "$work/check.log" >&2; fail "$sample"; }
    done
}

test_upgrade() {
    step "upgrade over an edited configuration"
    echo '# edited here' >>"$chroot/etc/pgconvoy/agent-main.toml"
    chmod 600 "$chroot/etc/pgconvoy/agent-main.toml"
    install_debs /debs/next
    grep -q '^# edited here' "$chroot/etc/pgconvoy/agent-main.toml" || fail "the upgrade lost an edited configuration"
    mode /etc/pgconvoy/agent-main.toml "600 root:postgres"
    local version
    version=$(inside dpkg-query -W -f '${Version}' pgconvoy)
    case $version in *-2) ;; *) fail "the upgrade left version $version" ;; esac
}

test_removal() {
    step "removal and purge with WAL in the spool"
    echo wal >"$chroot/var/lib/pgconvoy/agent/000000010000000000000001"
    mkdir -p "$chroot/var/lib/pgconvoy/agent-second/empty"
    echo '{}' >"$chroot/var/lib/pgconvoy/repository/repo.json"
    touch "$chroot/var/lib/pgconvoy/coordinator/catalog.sqlite"
    inside dpkg -r pgconvoy pgconvoy-coordinator >"$work/dpkg.log" 2>&1 || { cat "$work/dpkg.log" >&2; fail "dpkg -r"; }
    absent /usr/bin/pgconvoy-wal
    [ -f "$chroot/etc/pgconvoy/agent-main.toml" ] || fail "removal took the configuration"
    [ -f "$chroot/var/lib/pgconvoy/agent/000000010000000000000001" ] || fail "removal emptied the spool"
    inside dpkg -P pgconvoy pgconvoy-coordinator >"$work/dpkg.log" 2>&1 || { cat "$work/dpkg.log" >&2; fail "dpkg -P"; }
    absent /etc/pgconvoy
    absent /var/lib/pgconvoy/agent-second
    absent /var/lib/pgconvoy/coordinator
    [ -f "$chroot/var/lib/pgconvoy/repository/repo.json" ] || fail "purge deleted a repository"
    [ -f "$chroot/var/lib/pgconvoy/agent/000000010000000000000001" ] || fail "purge deleted WAL from the spool"
    grep -q 'is not empty and stays' "$work/dpkg.log" || fail "purge did not tell about the spool"
}

test_empty_purge() {
    step "purge with an empty spool leaves nothing"
    rm "$chroot/var/lib/pgconvoy/agent/000000010000000000000001" "$chroot/var/lib/pgconvoy/repository/repo.json"
    install_debs /debs
    inside dpkg -P pgconvoy pgconvoy-coordinator >"$work/dpkg.log" 2>&1 || { cat "$work/dpkg.log" >&2; fail "dpkg -P"; }
    absent /etc/pgconvoy
    absent /var/lib/pgconvoy
    local left
    left=$(inside find / -xdev -path /debs -prune -o -path /var/log -prune -o -name '*pgconvoy*' -print)
    [ -z "$left" ] || fail "purge left: $left"
}

test_lintian() {
    step "lintian"
    lintian --allow-root --fail-on error,warning --tag-display-limit 0 "$agent_deb" "$coordinator_deb"
}

test_rpm() { # package user file...
    local file=$1 user=$2 tree
    shift 2
    step "$(basename "$file")"
    tree=$work/rpm-$(basename "$file")
    mkdir "$tree"
    # rpm2cpio of rpm 4.18 ends with 1 also when all went well, so what it wrote is compared with the package's list.
    rpm2cpio "$file" >"$work/payload" || true
    (cd "$tree" && cpio -idm --quiet <"$work/payload")
    diff <(rpm -qpl "$file" 2>/dev/null | sort) <(cd "$tree" && find . -type f -printf '/%P\n' | sort) ||
        fail "the payload of $file is not its list"
    for wanted in "$@"; do
        [ -e "$tree$wanted" ] || fail "$(basename "$file") lacks $wanted"
    done
    rpm -K --nosignature "$file" >/dev/null || fail "digests of $file"
    rpm -qpl --dump "$file" >"$work/dump" 2>/dev/null
    awk '$1 ~ "^/etc/" && $8 != 1 {print; bad = 1} END {exit bad}' "$work/dump" || fail "a file in /etc is no configuration file"
    awk '$1 ~ "^/usr/s?bin/" && ($5 != "0100755" || $6 != "root") {print; bad = 1} END {exit bad}' "$work/dump" ||
        fail "modes of programs"
    awk -v user="$user" '$1 ~ "/(agent-main|coordinator).toml$" && ($5 != "0100640" || $7 != user) {print; bad = 1} END {exit bad}' \
        "$work/dump" || fail "mode of the daemon's configuration"
    rpm -qp --requires "$file" >"$work/requires" 2>/dev/null
    grep -q '^systemd' "$work/requires" || fail "requires of $file"
    grep -q 'libc.so.6' "$work/requires" || fail "$file does not require the C library"
    rpm -qp --scripts "$file" >"$work/scripts" 2>/dev/null
    for script in preinstall postinstall preuninstall postuninstall; do
        grep -q "^$script scriptlet" "$work/scripts" || fail "$file has no $script script"
    done
    ! grep -qE 'rm -rf|systemctl (enable|start)' "$work/scripts" || fail "a script of $file deletes or starts too much"
}

test_units() {
    step "units"
    mkdir "$work/units"
    local unit
    for unit in packaging/systemd/*.service; do
        # Verified with programs that exist here; everything else stays as shipped.
        sed "s#ExecStart=/usr/sbin/#ExecStart=$PWD/target/package-files/bin/#" "$unit" >"$work/units/$(basename "$unit")"
    done
    cp "$work/units/pgconvoy-agent@.service" "$work/units/pgconvoy-agent@main.service"
    for unit in pgconvoy-agent@main.service pgconvoy-coordinator.service; do
        systemd-analyze verify --man=no "$work/units/$unit" >"$work/verify.log" 2>&1 || { cat "$work/verify.log" >&2; fail "$unit"; }
        ! grep -F "$work/units" "$work/verify.log" || fail "$unit"
        # Exposure 2.5 of 10.
        systemd-analyze security --offline=true --no-pager --threshold=25 "$work/units/$unit" >"$work/security.log" 2>&1 ||
            { cat "$work/security.log" >&2; fail "$unit is more exposed than it was"; }
    done
    # PostgreSQL's own default is a socket in /tmp.
    grep -qx 'PrivateTmp=no' packaging/systemd/pgconvoy-agent@.service || fail "the agent cannot reach a socket in /tmp"
}

test_pages() {
    step "manual pages and completions"
    local page
    for page in target/package-files/man/*.gz; do
        [ -z "$(LC_ALL=C.UTF-8 MANROFFSEQ='' MANWIDTH=100 man --warnings -l "$page" 2>&1 >/dev/null)" ] || fail "$page has warnings"
    done
    bash -n target/package-files/completions/bash
    grep -q 'compdef' target/package-files/completions/zsh
    grep -q 'complete -c pgconvoy' target/package-files/completions/fish
}

# The oldest C library the programs run with: Debian 12, Ubuntu 22.04 and EL 9 when built on Debian 12.
test_glibc() {
    local floor limit
    floor=$(objdump -T target/package-files/bin/* | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)
    case $VERSION_CODENAME in bookworm) limit=GLIBC_2.34 ;; *) limit=GLIBC_$(ldd --version | awk 'NR == 1 {print $NF}') ;; esac
    step "C library: $floor, at most $limit"
    [ "$(printf '%s\n%s\n' "$floor" "$limit" | sort -V | tail -n 1)" = "$limit" ] || fail "needs $floor, promised $limit"
}

test_glibc
test_units
test_pages
test_rpm "$agent_rpm" postgres /usr/bin/pgconvoy /usr/bin/pgconvoy-wal /usr/sbin/pgconvoy-agent \
    /etc/pgconvoy/agent-main.toml /etc/pgconvoy/pgconvoy.toml /usr/lib/systemd/system/pgconvoy-agent@.service \
    /usr/lib/tmpfiles.d/pgconvoy.conf /usr/share/man/man1/pgconvoy.1.gz /usr/share/man/man8/pgconvoy-agent.8.gz \
    /usr/share/man/man5/pgconvoy.toml.5.gz /usr/share/bash-completion/completions/pgconvoy \
    /usr/share/zsh/site-functions/_pgconvoy /usr/share/fish/vendor_completions.d/pgconvoy.fish \
    /usr/share/pgconvoy/pgconvoy.protoset /usr/share/pgconvoy/proto/pgconvoy/operator/v1/operator.proto \
    /usr/share/pgconvoy/prometheus/pgconvoy.rules.yml /usr/share/pgconvoy/prometheus/METRICS.md
test_rpm "$coordinator_rpm" pgconvoy /usr/sbin/pgconvoy-coordinator /etc/pgconvoy/coordinator.toml \
    /usr/lib/systemd/system/pgconvoy-coordinator.service /usr/lib/sysusers.d/pgconvoy-coordinator.conf \
    /usr/share/man/man8/pgconvoy-coordinator.8.gz
test_lintian
prepare_chroot
test_installation
test_upgrade
test_removal
test_empty_purge
step "everything passed"
