//! `pgconvoy restore`: planned first, then done.

use process::exit::Exit;

use crate::{args::RestoreArgs, config::Config, error::CliError};

/// `pgconvoy restore`
pub(crate) async fn restore(_config: &Config, _arguments: &RestoreArgs) -> Result<Exit, CliError> {
    Err(CliError::new(Exit::Refused, "not built yet"))
}
