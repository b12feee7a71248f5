#!/bin/sh
# Prints where promtool is: this machine's, else the one of Debian's package prometheus, fetched once into the directory of
# the test servers. The package is unpacked, not installed, so no service of it is ever started.
set -eu

if command -v promtool 2>/dev/null; then exit 0; fi
directory=$(dirname "$0")
kept=$("$directory/servers.sh" where)/promtool
if [ -x "$kept/promtool" ]; then
    echo "$kept/promtool"
    exit 0
fi
fail() {
    echo "tests/promtool.sh: $*" >&2
    exit 1
}
for program in apt-get dpkg-deb; do
    command -v "$program" >/dev/null 2>&1 || fail "missing: promtool, and $program that could fetch it"
done
mkdir -p "$kept"
work=$(mktemp -d "$kept/new.XXXXXX")
trap 'rm -rf "$work"' EXIT
fetch() {
    (cd "$work" && apt-get download -q -o APT::Sandbox::User= prometheus) >"$work/log" 2>&1
}
# The lists of a fresh machine may be missing or old; only root can get others.
fetch || { apt-get update -q >>"$work/log" 2>&1 && fetch; } ||
    { cat "$work/log" >&2; fail "Debian's package prometheus could not be fetched; is the network away?"; }
dpkg-deb --fsys-tarfile "$work"/prometheus_*.deb | tar -x -C "$work" ./usr/bin/promtool
chmod 755 "$work/usr/bin/promtool"
mv "$work/usr/bin/promtool" "$kept/promtool"
echo "$kept/promtool"
