//! The implementations of the object store, one file each.

pub mod directory;
#[cfg(feature = "testing")]
pub mod faulty;
pub mod memory;
pub mod s3;
