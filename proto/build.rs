//! Compiles the protos without protoc and keeps the descriptor set for reflection.
use std::{env, fs, path::PathBuf};

use prost::Message;

const PROTOS: [&str; 4] = [
    "pgconvoy/archive/v1/archive.proto",
    "pgconvoy/fleet/v1/fleet.proto",
    "pgconvoy/operator/v1/operator.proto",
    "pgconvoy/store/v1/store.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=pgconvoy");
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("pgconvoy.protoset"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
