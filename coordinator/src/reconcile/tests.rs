//! Tests of reconciliation.
