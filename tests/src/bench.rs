//! Figures against the peers: same files, same run, medians of several rounds, our programs as they are installed.
//!
//! ```text
//! material ─▶ a real cluster and real WAL, made once
//! archiving, changes, fetching, backups, increments, relations, restores ─▶ measures ─▶ Figure ─▶ one line of TSV each
//! calls ─▶ the process that plays PostgreSQL's part: calls a command a file, one after the other
//! ```
//!
//! Invariants: nothing is taken into a figure that did not succeed; ours and the peer's rounds alternate, so that a busy
//! machine hits both; no bound is spelt anywhere but in the measure that it belongs to.

pub mod application;
pub mod archiving;
pub mod backups;
pub mod bucket;
pub mod calls;
pub mod changed;
pub mod changes;
pub mod fetching;
pub mod figure;
pub mod increments;
pub mod material;
pub mod model;
pub mod ours;
pub mod pgbackrest;
pub mod phases;
pub mod plain;
pub mod relations;
pub mod restores;
pub mod stopwatch;
