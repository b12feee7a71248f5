//! The agent beside one PostgreSQL data directory. This file only connects rooms; it decides nothing.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod local;
pub mod road;
