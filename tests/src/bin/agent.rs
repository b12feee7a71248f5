//! `pgconvoy-agent` built with crash points.

fn main() {}
