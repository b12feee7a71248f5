//! Options of `verify` and `repair`.

use std::path::PathBuf;

use clap::Args;
use repository::name::{BackupId, ClusterName, NodeName, StoreName};

use super::Output;

pub(crate) const VERIFY_HELP: &str = "\
Every object is compared with its digests, every block of every file of every backup is looked up in the packs, and WAL
must go on without a gap from the start of each backup to its end and from there on. Nothing is changed.

With `--source` a node reads its server's pages instead, verifies their checksums, and compares those that were not changed
since with what the newest backup holds: that shows what went bad in silence, and on which side. It takes a backup that had
ended before the server's last checkpoint. Each night a thirtieth is compared like that by itself.

Exit status: 0 all is sound, 1 something is damaged, missing or cannot be restored, 10 a store was not looked at.";

pub(crate) const REPAIR_HELP: &str = "\
Puts right what `verify` and the nightly scrub found damaged or missing in one store and sound in another one. The sound
copy is read and proven first, and what lies in its place is proven damaged once more before it is removed. Run `verify`
first to know all there is.

Exit status: 0 nothing is left to do, 1 something is, 5 not while another repair runs.";

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Fleet name of the cluster.
    pub(crate) cluster: ClusterName,
    /// Look at this store alone, as if there were no other; repeatable.
    #[arg(long, value_name = "NAME")]
    pub(crate) store: Vec<StoreName>,
    /// Look at this backup alone, with all it needs.
    #[arg(long, value_name = "ID")]
    pub(crate) backup: Option<BackupId>,
    /// Also decode everything, read change maps and verify page checksums.
    #[arg(long)]
    pub(crate) full: bool,
    /// Compare the pages of the running server with the newest backup.
    #[arg(long, conflicts_with_all = ["store", "backup", "full", "repository"])]
    pub(crate) source: bool,
    /// With --source: the node whose pages are read; the primary if it is not said.
    #[arg(long, value_name = "NAME", requires = "source")]
    pub(crate) node: Option<NodeName>,
    /// Read the stores named in this file, without coordinator or agent.
    #[arg(long, value_name = "FILE")]
    pub(crate) repository: Option<PathBuf>,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct RepairArgs {
    /// Fleet name of the cluster.
    pub(crate) cluster: ClusterName,
    /// Do what is shown; without it nothing is changed.
    #[arg(long)]
    pub(crate) confirm: bool,
    /// How to print what would be done.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
}
