//! `pgconvoy pace`: a backup that runs goes on faster or slower.

use process::exit::Exit;
use process::units::Size;
use proto::operator::ChangePaceRequest;

use crate::{config::Config, coordinator::operator, error::CliError, output};

/// Arguments of `pgconvoy pace`.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true, args = ["rate", "parallel"])]
pub(crate) struct PaceArgs {
    /// The operation, as `pgconvoy operations` shows it.
    pub(crate) operation: String,
    /// Bytes read a second at most, such as 50MiB; 0 for no limit.
    #[arg(long, value_name = "SIZE")]
    pub(crate) rate: Option<Size>,
    /// Workers that read and compress at most; 0 for all there are.
    #[arg(long, value_name = "N")]
    pub(crate) parallel: Option<u32>,
}

/// `pgconvoy pace`
pub(crate) async fn pace(config: &Config, arguments: &PaceArgs) -> Result<Exit, CliError> {
    let request = ChangePaceRequest {
        operation: arguments.operation.clone(),
        bytes_per_second: arguments.rate.map(Size::bytes),
        parallel: arguments.parallel,
    };
    operator(&config.coordinator).await?.change_pace(request).await?;
    output::text(&format!("operation {} goes on at that pace\n", arguments.operation))?;
    Ok(Exit::Ok)
}
