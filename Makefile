# The two front doors are `make demo` and `make test`; each first looks for what it needs (tests/preflight.sh).
#
#   make demo        plays the story in one temporary directory on loopback, verified step by step
#   make test        everything that can fail a merge: formatting, clippy, all tests, packages
#   make bench       figures against pgbackrest and zstd
#   make servers     fetches the PostgreSQL servers, 14 to 18, that this machine does not have (tests/servers.sh says whence
#                    and where to); make test begins with it
#   make test-majors the scenarios of archiving, backup, increments and restore on each of 14 to 18; ARGS="17 18" on those
#   make test-ceph   what concerns S3 on a real Ceph RADOS gateway, started for it, or on the service that
#                    PGCONVOY_TEST_S3_ENDPOINT names (tests/ceph/test.sh says how)
#   make packages    .deb and .rpm into target/packages

CARGO ?= cargo
ARGS ?=

# Scenarios mostly wait, and how many are played at once is limited where they are (tests/src/scenario.rs), so a machine of
# two cores is not to play two at a time.
RUST_TEST_THREADS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores > 4 ? cores : 4)))
export RUST_TEST_THREADS

.PHONY: demo test bench servers test-majors test-ceph packages lint units package-test

demo:
	@tests/preflight.sh demo
	@$(CARGO) build --locked -p tests --bins
	@$(CARGO) run --locked -q -p tests --bin demo -- $(ARGS)

# One after the other, cheapest first: the first failure is the one to look at. Without the network, and outside of
# continuous integration, the scenarios on servers that are missing are left out and say so.
test:
	@tests/preflight.sh test
	@tests/servers.sh || [ -z "$$CI" ]
	@for part in lint units package-test; do \
		began=$$(date +%s); \
		$(MAKE) --no-print-directory $$part || exit 1; \
		echo "make $$part: $$(($$(date +%s) - began)) s"; \
	done
	@echo "make test: everything passed"

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

units:
	$(CARGO) test --locked --workspace --lib --tests

packages:
	@tests/preflight.sh packages
	packaging/build.sh

package-test:
	packaging/build.sh --upgrade
	packaging/test.sh

bench:
	@tests/preflight.sh bench
	$(CARGO) run --locked --release -p tests --bin bench -- $(ARGS)

servers:
	@tests/preflight.sh servers
	@tests/servers.sh

test-majors: servers
	@tests/preflight.sh majors
	tests/majors.sh $(ARGS)

test-ceph:
	@tests/preflight.sh ceph
	tests/ceph/test.sh $(ARGS)
