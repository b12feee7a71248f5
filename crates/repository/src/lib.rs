//! The repository: what is stored, under which keys, and in which stores.
//!
//! This crate can be read, and a repository can be read with it, without knowing the wire, the fleet or a running
//! server. Everything that touches a store goes through [`store::ObjectStore`]; everything that spells an object key
//! is in [`key`].
//!
//! Invariants kept here:
//! * no object is ever overwritten: the only way to write is [`store::ObjectStore::put_new`];
//! * nothing is removed but by [`sweep`], and only what a committed root condemned, except for bytes that are proven not
//!   to be the object under whose key they lie, and only to put that object there: [`verify::repair`];
//! * a store that is away, foreign or unmounted is an error, never an empty store.
//!
//! What it does not do: it opens no sockets of ours, reads no configuration file and no clock (`now` is an argument).

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod acceptance;
pub mod adoption;
pub mod backup;
pub mod byte_text;
pub mod canonical;
pub mod config;
#[cfg(feature = "testing")]
pub mod conformance;
pub mod coverage;
pub mod departure;
pub mod digest;
pub mod fingerprint;
pub mod grant;
pub mod identity;
pub mod info;
pub mod key;
pub mod name;
pub mod observe;
pub mod probe;
pub mod restore_plan;
pub mod retention;
pub mod retry;
pub mod root;
pub mod store;
pub mod stores;
pub mod sweep;
pub mod verify;
pub mod waiting;
pub mod wal;
pub mod wal_index;
pub mod witness;
