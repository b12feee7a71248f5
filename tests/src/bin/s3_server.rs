//! The project's own S3 server as a process: see `tests::s3_server`.
//!
//! Prints where it listens, one `name value` a line, and serves until it is ended by a signal.

use std::io::Write;

use anyhow::{Context, Result, bail};
use tests::s3_server::{Options, S3Server};

const USAGE: &str = "usage: tests-s3-server [--listen ADDRESS:PORT] [--control ADDRESS:PORT] [--access-key KEY] \
                     [--secret-key KEY] [--bucket NAME] [--directory DIRECTORY]";

fn main() -> Result<()> {
    let server = S3Server::start_with(options()?)?;
    let mut output = std::io::stdout().lock();
    writeln!(output, "endpoint {}", server.endpoint)?;
    if let Some(control) = &server.control {
        writeln!(output, "control {control}")?;
    }
    output.flush()?;
    drop(output);
    loop {
        std::thread::park();
    }
}

fn options() -> Result<Options> {
    let mut options = Options::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} needs a value\n{USAGE}"))?;
        match name.as_str() {
            "--listen" => options.listen = value.parse().with_context(|| format!("{value} is no ADDRESS:PORT"))?,
            "--control" => {
                options.control = Some(value.parse().with_context(|| format!("{value} is no ADDRESS:PORT"))?);
            }
            "--access-key" => options.access_key = value,
            "--secret-key" => options.secret_key = value,
            "--bucket" => options.bucket = value,
            "--directory" => options.directory = Some(value.into()),
            _ => bail!("{name} is unknown\n{USAGE}"),
        }
    }
    Ok(options)
}
