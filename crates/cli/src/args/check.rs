//! The options of `check`, and the rules as its help tells them.

use clap::Args;
use process::units::Span;
use repository::name::ClusterName;

use super::Output;
use crate::check::Limits;

pub(super) const CHECK_RULES: &str = "\
Rules:
  identity                 every connected node has the cluster's system identifier
  node NODE                its agent is connected and asks its server; its road, and how much WAL waits;
                           a standby has not gone past the place where the primary's timeline left its own
  one primary              said only where several connected servers accept writes
  store STORE              the store is healthy
  archived WAL             none that was archived is known to be in no store any more
  contents                 nothing is known to be damaged; verify and the nightly scrub look
  retention in STORE       what is kept there, and whether that was applied
  segment                  a WAL segment that the primary is made to finish reaches a store in time
  segment in STORE         it reaches this store
  archive_command of NODE  PostgreSQL itself asked for that segment and was told that it is durable
With limits also:
  retention                --retention-full: so many full backups are there
  backup age               --retention-age: the newest backup is not older
  full backup age          --retention-age-to-full: the newest full backup is not older
  archives                 --archives: WAL is there without a gap, as far as it is kept
  restorable               --archives: a backup and its WAL lead to the latest
  archive age              --archive-age: no WAL file waits longer to be archived

Exit status: 0 every rule holds, 1 one is broken; a warning alone breaks none. With --nagios: 0 all hold, 1 a warning,
2 one is broken, 3 it could not be checked.";

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Fleet name of the cluster.
    pub(crate) cluster: ClusterName,
    /// Longest wait for the segment.
    #[arg(long, default_value = "60s", value_name = "SPAN")]
    pub(crate) timeout: Span,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    /// One line and an exit code as monitoring plugins give them: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
    #[arg(long, conflicts_with = "output")]
    pub(crate) nagios: bool,
    #[command(flatten)]
    pub(crate) limits: Limits,
}
