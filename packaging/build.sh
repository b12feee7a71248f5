#!/bin/sh
# Builds the packages of both formats into target/packages.
#
#   packaging/build.sh             binaries, manual pages, completions, .deb and .rpm
#   packaging/build.sh --upgrade   also a .deb of the next version, for packaging/test.sh
#
# The programs are built once, by their own crates only: a build of the whole workspace would switch the crash points on
# that tests need. cargo-deb and cargo-generate-rpm are installed into target/tools when they are not there.
set -eu
cd "$(dirname "$0")/.."

cargo_deb=3.8.0
cargo_generate_rpm=0.21.1
target=$PWD/target
files=$target/package-files
packages=$target/packages

tool() {
    if ! "$target/tools/bin/$1" --version 2>/dev/null | grep -qwF "$2"; then
        # They are run a few times and built on every fresh machine, so little is spent on making them fast.
        CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_TARGET_DIR=$target/tools/build cargo install "$1" --version "$2" --locked --root "$target/tools"
    fi
}

tool cargo-deb "$cargo_deb"
tool cargo-generate-rpm "$cargo_generate_rpm"

CARGO_TARGET_DIR=$target cargo build --release --locked -p agent -p coordinator -p cli

rm -rf "$files" "$packages"
mkdir -p "$files/bin" "$files/man" "$files/completions" "$packages"
for program in pgconvoy pgconvoy-agent pgconvoy-wal pgconvoy-coordinator; do
    strip --strip-unneeded -o "$files/bin/$program" "$target/release/$program"
    chmod 755 "$files/bin/$program"
done
if grep -qF -e PGCONVOY_CRASH_AT -e PGCONVOY_PATIENCE -e PGCONVOY_CLOCK_SHIFT "$files"/bin/*; then
    echo "packaging/build.sh: the release build holds crash points, shortened patiences or a shifted clock" >&2
    exit 1
fi

"$files/bin/pgconvoy" man "$files/man" --descriptors "$files/pgconvoy.protoset"
cp packaging/man/* "$files/man/"
gzip -9nf "$files"/man/*
for shell in bash zsh fish; do
    "$files/bin/pgconvoy" completions "$shell" >"$files/completions/$shell"
done
gzip -9nc packaging/deb/changelog >"$files/changelog.gz"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
for crate in cli coordinator; do
    "$target/tools/bin/cargo-deb" deb --quiet -p "$crate" --no-build --no-strip --output "$packages/"
    if [ "${1-}" = --upgrade ]; then
        mkdir -p "$packages/next"
        "$target/tools/bin/cargo-deb" deb --quiet --fast -p "$crate" --no-build --no-strip --deb-version "$version-2" --output "$packages/next/"
    fi
done
"$target/tools/bin/cargo-generate-rpm" generate-rpm -p crates/cli --output "$packages/"
"$target/tools/bin/cargo-generate-rpm" generate-rpm -p coordinator --output "$packages/"

ls -l "$packages"
