//! Tests of root commits.
