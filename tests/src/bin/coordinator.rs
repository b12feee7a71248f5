//! `pgconvoy-coordinator` built with crash points.

fn main() {}
