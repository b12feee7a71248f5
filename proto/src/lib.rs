//! The wire: what agents, coordinator and scripts say to each other, and the way between wire words and domain values.
//!
//! Invariants: the protos are append-only; a value that the domain cannot hold is refused in [`convert`], never guessed.
//! This room does no I/O and knows neither stores nor fleet.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod convert;

/// Calls about WAL and backup objects.
pub mod archive {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    tonic::include_proto!("pgconvoy.archive.v1");
}

/// The session between agent and coordinator.
pub mod fleet {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    tonic::include_proto!("pgconvoy.fleet.v1");
}

/// What people and scripts ask.
pub mod operator {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    tonic::include_proto!("pgconvoy.operator.v1");
}

/// Read access to stores.
pub mod store {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    tonic::include_proto!("pgconvoy.store.v1");
}

/// Every message and service as an encoded `FileDescriptorSet`, for reflection and for `pgconvoy rpc`.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pgconvoy.protoset"));

/// Largest body chunk in one message, in bytes.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

/// Domain of our `google.rpc.ErrorInfo` details.
pub const ERROR_DOMAIN: &str = "pgconvoy";
