//! The command line: verbs, options and their help, which is also the manual page.
//!
//! Values are parsed into what they mean here, so that verbs never see unchecked text.

mod check;
mod verify;

use std::path::PathBuf;

use check::CHECK_RULES;
use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;
use postgres_format::Lsn;
use process::units::{Size, Span};
use repository::name::{BackupId, ClusterName, NodeName, StoreName};
use repository::restore_plan::{RestorePointName, TargetXid};
use uuid::Uuid;
use verify::{REPAIR_HELP, VERIFY_HELP};

pub(crate) use check::CheckArgs;
pub(crate) use verify::{RepairArgs, VerifyArgs};

/// Where the configuration lies unless `--config` says otherwise.
pub(crate) const DEFAULT_CONFIG: &str = "/etc/pgconvoy/pgconvoy.toml";

const AFTER_HELP: &str = "\
Exit status: 0 done, 1 a definite no, 2 usage, 3 configuration, 4 unreachable, 5 refused, 6 conflict, 7 store,
8 PostgreSQL, 9 timeout, 10 partly done, 255 unknown (fetch only).";

/// Backups and WAL archive of a fleet of PostgreSQL clusters.
#[derive(Debug, Parser)]
#[command(name = "pgconvoy", version, after_help = AFTER_HELP, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Options of every verb.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Configuration file [default: /etc/pgconvoy/pgconvoy.toml, if it exists].
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Address of the coordinator, such as http://127.0.0.1:8432 or https://repo1:8432.
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) coordinator: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Give a cluster its place in every store.
    Cluster(ClusterArgs),
    /// Force a WAL segment through and say what holds, one line a rule.
    #[command(after_help = CHECK_RULES)]
    Check(CheckArgs),
    /// Show clusters, backups, WAL coverage, nodes, stores and schedule.
    Info(InfoArgs),
    /// Take a base backup.
    Backup(BackupArgs),
    /// Show what retention would let go of and why, and do exactly that with --confirm.
    Expire(crate::expire::ExpireArgs),
    /// Keep backups from being removed, with a reason.
    Hold(crate::hold::HoldArgs),
    /// List running and finished operations, newest first.
    Operations(OperationsArgs),
    /// Have a backup that runs go on faster or slower.
    Pace(crate::pace::PaceArgs),
    /// Restore a cluster into an empty directory, planned first.
    Restore(Box<RestoreArgs>),
    /// Fetch one WAL file from the repository; for restore_command where no agent runs.
    Fetch(FetchArgs),
    /// Call any method of the coordinator by reflection; without a method, list them.
    Rpc(RpcArgs),
    /// Recreate the coordinator's catalog from the stores.
    Rebuild,
    /// Settle a WAL file of which two contents exist.
    Conflict(ConflictArgs),
    /// Look whether what the stores hold can be restored, and say what is damaged and what it costs.
    #[command(after_help = VERIFY_HELP)]
    Verify(VerifyArgs),
    /// Put right from another store what is damaged in one; shown first.
    #[command(after_help = REPAIR_HELP)]
    Repair(RepairArgs),
    /// Stores of the repository.
    Store(crate::store::StoreArgs),
    /// Nodes of the fleet.
    Node(NodeArgs),
    /// Print completions for a shell.
    Completions(CompletionsArgs),
    /// Write the manual pages into a directory.
    Man(ManArgs),
}

/// How an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Text,
    /// For scripts; versioned by its "schema" field.
    Json,
}

/// How the report about clusters is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum InfoOutput {
    /// For people.
    #[default]
    Text,
    /// For scripts; versioned by its "schema" field.
    Json,
    /// As pgBackRest prints it, for exporters and checks made for that.
    PgbackrestJson,
}

#[derive(Debug, Args)]
pub(crate) struct ClusterArgs {
    #[command(subcommand)]
    pub(crate) verb: ClusterVerb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterVerb {
    /// Make the cluster known; harmless to repeat, and needed after a store was replaced by an empty one.
    Create {
        /// Fleet name of the cluster.
        name: ClusterName,
        /// System identifier [default: the one that the cluster's connected nodes report].
        #[arg(long, value_name = "NUMBER")]
        system_identifier: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Fleet name of one cluster [default: all].
    pub(crate) cluster: Option<ClusterName>,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: InfoOutput,
    /// Read the stores named in this file, without coordinator or agent.
    #[arg(long, value_name = "FILE")]
    pub(crate) repository: Option<PathBuf>,
}

/// What a backup may build on. All three are restored alike, and each outlives what it was built on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum BackupType {
    /// Nothing: every file is read and stored anew.
    Full,
    /// The newest full backup; what changed since is stored.
    Diff,
    /// The newest backup; what changed since is stored.
    #[default]
    Incr,
}

/// How a standby's files are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// The standby starts and stops the backup itself.
    Standby,
    /// The primary starts and stops it, and a few of its files are in it.
    Hybrid,
}

/// Which kind of node a backup may come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    /// A standby only.
    Standby,
    /// The primary only.
    Primary,
}

#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// Fleet name of the cluster.
    pub(crate) cluster: ClusterName,
    /// Node to take it from [default: the coordinator chooses, a standby if one is fit].
    #[arg(long, conflicts_with = "from")]
    pub(crate) node: Option<NodeName>,
    /// Take it only from a standby, or only from the primary.
    #[arg(long, value_enum)]
    pub(crate) from: Option<Source>,
    /// How a standby's files are copied [default: by the standby alone where that is possible].
    #[arg(long, value_enum)]
    pub(crate) shape: Option<Shape>,
    /// What it may build on; where nothing is fit, everything is stored.
    #[arg(long = "type", value_enum, default_value_t, value_name = "TYPE")]
    pub(crate) backup_type: BackupType,
    /// Ask for an immediate checkpoint instead of a spread one.
    #[arg(long)]
    pub(crate) start_fast: bool,
    /// Label for people, at most 200 bytes.
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub(crate) label: String,
    /// Workers that read and compress [default: the cluster's policy, else the agent's setting].
    #[arg(long, value_name = "N")]
    pub(crate) parallel: Option<u32>,
    /// Bytes read a second at most, such as 50MiB; 0 for no limit [default: the cluster's policy, else the agent's setting].
    #[arg(long, value_name = "SIZE")]
    pub(crate) rate: Option<Size>,
    /// Return once it has started.
    #[arg(long, conflicts_with = "here")]
    pub(crate) no_wait: bool,
    /// Take it on this host, through the local agent, without asking the coordinator.
    #[arg(long, conflicts_with_all = ["node", "from", "shape"])]
    pub(crate) here: bool,
}

#[derive(Debug, Args)]
pub(crate) struct OperationsArgs {
    /// Fleet name of one cluster [default: all].
    pub(crate) cluster: Option<ClusterName>,
    /// At most this many.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub(crate) limit: u32,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

/// What PostgreSQL does once the target is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TargetAction {
    /// Stay in recovery, paused.
    Pause,
    /// Leave recovery and take writes.
    Promote,
    /// Shut down.
    Shutdown,
}

/// Whether the restored server archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ArchiveMode {
    /// `archive_mode = off`: right for clones and for looking.
    Off,
    /// As in the backup's configuration: right when this replaces the lost server.
    Keep,
}

/// A chosen timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TargetTimeline {
    /// The newest one that goes on, if only one does.
    Latest,
    /// The one the backup was taken on.
    Current,
    /// This one.
    Number(postgres_format::Timeline),
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// Fleet name of the cluster.
    pub(crate) cluster: ClusterName,
    /// Empty or absent directory that becomes the data directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Let it be a data directory of this cluster on which no server runs: what it holds as the backup does is kept, the
    /// rest is overwritten or removed. Goes on with an interrupted restore, too.
    #[arg(long)]
    pub(crate) delta: bool,
    /// Change that directory; without it the plan is all that --delta gives.
    #[arg(long, requires = "delta")]
    pub(crate) confirm: bool,
    /// Backup to start from [default: the newest one that reaches the target].
    #[arg(long, value_name = "ID")]
    pub(crate) backup: Option<BackupId>,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Timeline to follow: latest, current or a number [default: latest, unless servers wrote side by side].
    #[arg(long, value_name = "TIMELINE", value_parser = parse_timeline)]
    pub(crate) target_timeline: Option<TargetTimeline>,
    /// Stop just before the target instead of just after it.
    #[arg(long)]
    pub(crate) exclusive: bool,
    /// What the server does at the target [default: promote].
    #[arg(long, value_enum, value_name = "ACTION")]
    pub(crate) target_action: Option<TargetAction>,
    /// Restore a standby that goes on following, instead of a server of its own.
    #[arg(long, conflicts_with_all = ["target_action"])]
    pub(crate) standby: bool,
    /// Restore this database, by name or OID, and the cluster's own ones alone; the files of others hold zeros, and these
    /// databases are to be dropped after recovery; repeatable.
    #[arg(long, value_name = "NAME|OID", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) database: Vec<String>,
    /// Put the tablespace with this OID into this directory; repeatable.
    #[arg(long, value_name = "OID=DIR", value_parser = parse_tablespace)]
    pub(crate) tablespace_map: Vec<(u32, PathBuf)>,
    /// Make the link of this path below the data directory, and let it lead to PLACE; with pg_wal=DIR, WAL goes there.
    /// Directories must be empty or new; repeatable.
    #[arg(long, value_name = "NAME=PLACE", value_parser = parse_link)]
    pub(crate) link_map: Vec<(PathBuf, PathBuf)>,
    /// Make all other links as they were, also those to directories elsewhere, which must be empty or new.
    #[arg(long)]
    pub(crate) link_all: bool,
    /// Leave this store out, knowing that what only it holds is not restored; repeatable.
    #[arg(long, value_name = "NAME")]
    pub(crate) without_store: Vec<StoreName>,
    /// Read only this store; repeatable.
    #[arg(long, value_name = "NAME", conflicts_with = "without_store")]
    pub(crate) store: Vec<StoreName>,
    /// Workers that fetch and write [default: the number of processors, at most 8].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) parallel: Option<u32>,
    /// Bytes of packs read a second at most, such as 50MiB; what is written is more, as they are compressed. 0 for no limit.
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(crate) rate: Size,
    /// Whether the restored server archives [default: off; keep with --standby].
    #[arg(long, value_enum)]
    pub(crate) archive_mode: Option<ArchiveMode>,
    /// Where WAL has a gap, recover up to it instead of refusing; only without a target.
    #[arg(long)]
    pub(crate) stop_at_gap: bool,
    /// Extra setting for recovery or a standby, such as primary_conninfo='host=db1'; repeatable. Others are refused.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_setting)]
    pub(crate) recovery_option: Vec<(String, String)>,
    /// Print the plan, what would be read and how long that may take, and stop.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Read the stores named in this file, without coordinator or agent.
    #[arg(long, value_name = "FILE")]
    pub(crate) repository: Option<PathBuf>,
    /// How to print the plan.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

/// Where recovery ends; the end of the archive when none is given.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub(crate) struct TargetArgs {
    /// Recover up to this moment, such as "2026-11-23 03:41:38+00"; without an offset it is UTC.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) target_time: Option<Timestamp>,
    /// Recover up to this LSN.
    #[arg(long, value_name = "LSN")]
    pub(crate) target_lsn: Option<Lsn>,
    /// Recover up to the end of this transaction: its 64-bit id, as txid_current() tells it, or the 32-bit one of WAL,
    /// which means the transaction nearest to the newest backup.
    #[arg(long, value_name = "XID")]
    pub(crate) target_xid: Option<TargetXid>,
    /// Recover up to the restore point of this name; without --backup from the newest backup, which may be too new.
    #[arg(long, value_name = "NAME")]
    pub(crate) target_name: Option<RestorePointName>,
    /// Stop as soon as the backup is consistent.
    #[arg(long)]
    pub(crate) immediate: bool,
    /// Recover to the end of the archive (the default).
    #[arg(long)]
    pub(crate) latest: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    /// Stores to read [default: those of the configuration, else the coordinator's].
    #[arg(long, value_name = "FILE")]
    pub(crate) repository: Option<PathBuf>,
    /// Fleet name of the cluster [default: the only one in the repository].
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<ClusterName>,
    /// Leave this store out; repeatable.
    #[arg(long, value_name = "NAME")]
    pub(crate) without_store: Vec<StoreName>,
    /// Believe only stores of this repository, so that another one mounted in its place is not taken for the end of the
    /// archive [default: whichever the first store belongs to].
    #[arg(long, value_name = "UUID")]
    pub(crate) expect_repository: Option<Uuid>,
    #[command(flatten)]
    pub(crate) end: crate::fetch::line::EndArgs,
    /// Longest time to go on asking while a store is away; a standby never waits longer than 5 s.
    #[arg(long, default_value = "5min", value_name = "SPAN")]
    pub(crate) wait: Span,
    /// Name of the wanted file (%f).
    #[arg(value_name = "FILE_NAME")]
    pub(crate) name: String,
    /// Where PostgreSQL wants it (%p).
    pub(crate) target: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct RpcArgs {
    /// Service and method, such as pgconvoy.operator.v1.OperatorService/GetInfo or OperatorService/GetInfo.
    pub(crate) method: Option<String>,
    /// Request as JSON; several, or "-" for standard input, for a method that takes a stream.
    #[arg(default_value = "{}", value_name = "JSON")]
    pub(crate) request: Vec<String>,
    /// Longest time for the whole call.
    #[arg(long, default_value = "1h", value_name = "SPAN")]
    pub(crate) timeout: Span,
}

#[derive(Debug, Args)]
pub(crate) struct ConflictArgs {
    #[command(subcommand)]
    pub(crate) verb: ConflictVerb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConflictVerb {
    /// Choose which content of a WAL file is served; the other stays as evidence.
    Resolve {
        /// Fleet name of the cluster.
        cluster: ClusterName,
        /// The WAL file, such as 00000001000000000000002A.
        wal_file: String,
        /// Fingerprint of the content to serve, as `info` shows it.
        fingerprint: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    pub(crate) verb: NodeVerb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeVerb {
    /// Make a node the writer of timelines that another node wrote before.
    Adopt {
        /// Fleet name of the cluster.
        cluster: ClusterName,
        /// The node.
        node: NodeName,
        /// Timeline that it writes; to be named only when its server cannot be asked [default: what its server says].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        timeline: Option<u32>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Directory that must exist.
    pub(crate) directory: PathBuf,
    /// Write the protos' descriptor set into this file too.
    #[arg(long, value_name = "FILE")]
    pub(crate) descriptors: Option<PathBuf>,
}

fn parse_timeline(text: &str) -> Result<TargetTimeline, String> {
    match text {
        "latest" => Ok(TargetTimeline::Latest),
        "current" => Ok(TargetTimeline::Current),
        number => number
            .parse()
            .ok()
            .and_then(postgres_format::Timeline::new)
            .map(TargetTimeline::Number)
            .ok_or_else(|| "write latest, current or a timeline number".to_owned()),
    }
}

fn parse_tablespace(text: &str) -> Result<(u32, PathBuf), String> {
    let (oid, directory) = text.split_once('=').ok_or("write OID=DIR")?;
    let oid = oid.parse().map_err(|_| format!("\"{oid}\" is not an OID"))?;
    let directory = PathBuf::from(directory);
    if directory.is_absolute() {
        Ok((oid, directory))
    } else {
        Err("the directory must be an absolute path".to_owned())
    }
}

fn parse_link(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let (name, place) = text.split_once('=').ok_or("write NAME=PLACE")?;
    let place = PathBuf::from(place);
    if name.is_empty() || !place.is_absolute() {
        return Err("name a path below the data directory, and as its place an absolute path".to_owned());
    }
    Ok((PathBuf::from(name), place))
}

fn parse_setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    // PostgreSQL does not tell names apart by case (`guc_name_compare` in `src/backend/utils/misc/guc.c`).
    let name = name.to_ascii_lowercase();
    let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '.';
    if name.is_empty() || !name.chars().all(known) {
        return Err(format!("\"{name}\" is not the name of a setting"));
    }
    if value.contains(['\n', '\r', '\0']) {
        return Err("a value is one line".to_owned());
    }
    Ok((name, value.to_owned()))
}

/// Reads a time as PostgreSQL prints it (`2026-11-23 03:41:38.5+00`) or as RFC 3339; UTC when no offset is given.
pub(crate) fn parse_time(text: &str) -> Result<Timestamp, String> {
    let text = text.trim();
    let time = text.get(10..).unwrap_or("");
    let with_offset = if time.contains(['Z', '+', '-']) { text.to_owned() } else { format!("{text}Z") };
    with_offset.parse::<Timestamp>().map_err(|_| format!("\"{text}\" is not a time such as \"2026-11-23 03:41:38+00\""))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn times_are_read_as_postgresql_prints_them() {
        let expected: Timestamp = "2026-11-23T03:41:38.5Z".parse().unwrap();
        for text in [
            "2026-11-23 03:41:38.5+00",
            "2026-11-23 03:41:38.5",
            "2026-11-23T03:41:38.5Z",
            "2026-11-23 05:41:38.5+02:00",
            "2026-11-22 22:41:38.5-05",
        ] {
            assert_eq!(parse_time(text), Ok(expected), "{text}");
        }
        for text in ["", "yesterday", "2026-13-01 00:00:00", "é2026-11-23 03:41:38"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn maps_and_settings_are_checked() {
        assert_eq!(parse_tablespace("16384=/srv/a=b"), Ok((16384, PathBuf::from("/srv/a=b"))));
        assert!(parse_tablespace("16384=relative").is_err());
        assert!(parse_tablespace("x=/srv").is_err());
        assert_eq!(parse_setting("a_b=c=d"), Ok(("a_b".to_owned(), "c=d".to_owned())));
        assert!(parse_setting("A B=c").is_err());
        assert!(parse_setting("a=b\nc").is_err());
        assert_eq!(parse_timeline("current"), Ok(TargetTimeline::Current));
        assert!(parse_timeline("0").is_err());
    }

    #[test]
    fn targets_exclude_each_other() {
        let parse = |more: &[&str]| {
            let mut line = vec!["pgconvoy", "restore", "c1", "--to", "/x"];
            line.extend_from_slice(more);
            Arguments::try_parse_from(line)
        };
        assert!(parse(&["--target-lsn", "0/3000000"]).is_ok());
        assert!(parse(&["--target-lsn", "0/3000000", "--immediate"]).is_err());
        assert!(parse(&["--store", "a", "--without-store", "b"]).is_err());
    }

    #[test]
    fn targets_that_no_server_has_are_errors_of_usage() {
        let said = |option: &str, value: &str| {
            let line = ["pgconvoy", "restore", "c1", "--to", "/x", option, value];
            let refused = Arguments::try_parse_from(line).unwrap_err();
            assert_eq!(refused.exit_code(), 2, "{option} {value}");
            refused.to_string().lines().next().unwrap_or_default().to_owned()
        };
        assert_eq!(
            said("--target-xid", "2"),
            "error: invalid value '2' for '--target-xid <XID>': no transaction has this id: the short ids of an epoch begin with 3"
        );
        assert!(said("--target-xid", "x").ends_with("expected a decimal number of 32 or, with its epoch, of 64 bits"));
        assert!(said("--target-name", "").contains("empty"));
        assert!(
            said("--target-name", &"x".repeat(64)).ends_with("the name has 64 bytes, a restore point's has at most 63")
        );
        let line = ["pgconvoy", "restore", "c1", "--to", "/x", "--target-xid", "4294968000"];
        assert!(Arguments::try_parse_from(line).is_ok());
    }
}
