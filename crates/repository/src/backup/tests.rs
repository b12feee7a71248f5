//! Tests of packs and manifests.
