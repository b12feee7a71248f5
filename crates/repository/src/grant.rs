//! What lets a node write to an S3 store without holding a key of it: requests that were signed beforehand.
//!
//! A *slot* is one object under an opaque key that only its node may create, once, with a body of one of a few lengths.
//! [`presign`] signs slots. Nothing here opens a socket or reads a clock, and nothing here trusts a store to honour
//! what was signed: that is for a probe to find out.

pub mod presign;
