//! Tests of restore plans.
