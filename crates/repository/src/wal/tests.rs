//! Tests of WAL objects.
