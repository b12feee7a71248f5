//! The implementations of the object store, one file each.

pub mod memory;
