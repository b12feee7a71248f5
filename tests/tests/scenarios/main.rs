//! Scenarios: real servers, real processes of ours, faults in the middle; asserted on what the stores hold and on what
//! restored servers hold.
//!
//! Each scenario has its own scratch directory, servers, coordinator and ports, and they are played a few at a time.
//! A warning in our logs that a scenario did not announce fails it. `KEEP=1` leaves the scratch directories.

#![allow(clippy::unwrap_used)]

mod plain;
