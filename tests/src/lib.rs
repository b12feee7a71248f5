//! What scenarios, demo and bench are played with: real PostgreSQL servers, real processes of ours, links that can be
//! cut, and a judge that reads nothing but the stores.
//!
//! Invariants: nothing outlives its owner (every process is ended by its id when its value is dropped, every scratch
//! directory removed unless `KEEP=1`); as root every server and program runs as an unprivileged account; the judge in
//! [`repository_check`] shares no decoding code with the product.

pub mod account;
pub mod bench;
pub mod certificates;
pub mod fleet;
pub mod ledger;
pub mod mask;
pub mod pages;
pub mod postgres;
pub mod program;
pub mod proxy;
pub mod repository_check;
pub mod runtime;
pub mod s3_server;
pub mod s3_service;
pub mod scenario;
pub mod special;
pub mod synthetic;
pub mod tls_front;
pub mod wait;
pub mod work;
pub mod world;
