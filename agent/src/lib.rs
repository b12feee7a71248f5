//! The agent beside one PostgreSQL data directory. This file only connects rooms; it decides nothing.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod archive;
pub mod backup;
pub mod check_config;
pub mod cli;
pub mod config;
pub mod coordinator_link;
pub mod daemon;
pub mod desk;
pub mod direct_store;
pub mod durable;
pub mod errands;
pub mod fetch;
pub mod from_start;
pub mod lag;
pub mod ledger;
pub mod local;
pub mod metrics;
pub mod node;
pub mod orders;
pub mod postgres;
pub mod pressure;
pub mod regular_file;
pub mod remote_store;
pub mod repository_home;
pub mod restore;
pub mod road;
pub mod road_watch;
pub mod session;
pub mod socket;
pub mod spool;
pub mod vitals;

#[cfg(test)]
mod testing;

pub use cli::main;
