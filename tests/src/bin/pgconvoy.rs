//! `pgconvoy-pgconvoy` built with crash points.

fn main() {}
