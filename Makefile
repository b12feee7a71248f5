# The two front doors are `make demo` and `make test`; each first looks for what it needs (tests/preflight.sh).
#
#   make demo        plays the story in one temporary directory on loopback, verified step by step
#   make test        everything that can fail a merge: formatting, clippy, all tests, packages
#   make bench       figures against pgbackrest and zstd
#   make test-ceph   what concerns S3 on a real Ceph RADOS gateway, started for it, or on the service that
#                    PGCONVOY_TEST_S3_ENDPOINT names (tests/ceph/test.sh says how)
#   make packages    .deb and .rpm into target/packages

CARGO ?= cargo
ARGS ?=

.PHONY: demo test bench test-ceph packages lint units package-test

demo:
	@tests/preflight.sh demo
	@$(CARGO) build --locked -p tests --bins
	@$(CARGO) run --locked -q -p tests --bin demo -- $(ARGS)

# One after the other, cheapest first: the first failure is the one to look at.
test:
	@tests/preflight.sh test
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory units
	@$(MAKE) --no-print-directory package-test
	@echo "make test: everything passed"

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

units:
	$(CARGO) test --locked --workspace --lib --bins --tests

packages:
	@tests/preflight.sh packages
	packaging/build.sh

package-test:
	packaging/build.sh --upgrade
	packaging/test.sh

bench:
	@tests/preflight.sh bench
	$(CARGO) run --locked --release -p tests --bin bench -- $(ARGS)

test-ceph:
	@tests/preflight.sh ceph
	tests/ceph/test.sh $(ARGS)
