//! Tests of the set of stores.
