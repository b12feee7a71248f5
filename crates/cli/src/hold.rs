//! `pgconvoy hold`: what retention must not remove, with the reason.

use clap::{Args, Subcommand};
use jiff::Timestamp;
use process::exit::Exit;
use proto::operator::{AddHoldRequest, Hold, ListHoldsRequest, RemoveHoldRequest};
use repository::name::{BackupId, ClusterName};
use serde::Serialize;

use crate::{
    args::{Output, parse_time},
    config::Config,
    coordinator::operator,
    error::CliError,
    output,
};

#[derive(Debug, Args)]
pub(crate) struct HoldArgs {
    #[command(subcommand)]
    pub(crate) verb: HoldVerb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HoldVerb {
    /// Keep a backup, and the WAL that makes it consistent, whatever the rules say.
    Add {
        /// Fleet name of the cluster.
        cluster: ClusterName,
        /// The backup, as `info` names it.
        backup: BackupId,
        /// Why, for whoever comes after you.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Until this moment [default: until it is removed].
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        until: Option<Timestamp>,
        /// Who says so, where no client certificate tells.
        #[arg(long, default_value = "", value_name = "NAME")]
        by: String,
    },
    /// Let the rules decide about a backup again.
    Remove {
        /// Fleet name of the cluster.
        cluster: ClusterName,
        /// The backup.
        backup: BackupId,
    },
    /// List what is held.
    List {
        /// Fleet name of the cluster.
        cluster: ClusterName,
        /// How to print.
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    cluster: &'a str,
    holds: Vec<Row<'a>>,
}

#[derive(Debug, Serialize)]
struct Row<'a> {
    backup: &'a str,
    reason: &'a str,
    by: &'a str,
    since: &'a str,
    until: Option<&'a str>,
    stores: &'a [String],
}

/// `pgconvoy hold …`
pub(crate) async fn hold(config: &Config, arguments: &HoldArgs) -> Result<Exit, CliError> {
    match &arguments.verb {
        HoldVerb::Add { cluster, backup, reason, until, by } => {
            let request = AddHoldRequest {
                cluster: cluster.to_string(),
                backup: backup.to_string(),
                reason: reason.clone(),
                by: by.clone(),
                until: until.map(|until| until.to_string()).unwrap_or_default(),
            };
            let held = operator(&config.coordinator).await?.add_hold(request).await?.into_inner();
            changed(&format!("{backup} is held in {}", held.stores.join(" and ")), &held.others)
        }
        HoldVerb::Remove { cluster, backup } => {
            let request = RemoveHoldRequest { cluster: cluster.to_string(), backup: backup.to_string() };
            let released = operator(&config.coordinator).await?.remove_hold(request).await?.into_inner();
            changed(&format!("{backup} is not held any more in {}", released.stores.join(" and ")), &released.others)
        }
        HoldVerb::List { cluster, output: form } => {
            let request = ListHoldsRequest { cluster: cluster.to_string() };
            let found = operator(&config.coordinator).await?.list_holds(request).await?.into_inner();
            match form {
                Output::Text => output::text(&render(&found.holds))?,
                Output::Json => output::json(&Report {
                    schema: "pgconvoy.holds/v1",
                    cluster: cluster.as_ref(),
                    holds: found.holds.iter().map(row).collect(),
                })?,
            }
            Ok(Exit::Ok)
        }
    }
}

/// Some stores may not have taken it: that is told, and is not all that was asked for.
fn changed(done: &str, others: &[String]) -> Result<Exit, CliError> {
    output::line(done)?;
    others.iter().for_each(|other| output::complain(&format!("pgconvoy: {other}")));
    Ok(if others.is_empty() { Exit::Ok } else { Exit::Partial })
}

fn row(hold: &Hold) -> Row<'_> {
    Row {
        backup: &hold.backup,
        reason: &hold.reason,
        by: &hold.by,
        since: &hold.since,
        until: Some(hold.until.as_str()).filter(|until| !until.is_empty()),
        stores: &hold.stores,
    }
}

fn render(holds: &[Hold]) -> String {
    if holds.is_empty() {
        return "nothing is held\n".to_owned();
    }
    let heading = ["BACKUP", "STORES", "SINCE", "UNTIL", "BY", "REASON"].map(str::to_owned).to_vec();
    let rows = holds.iter().map(|hold| {
        let until = if hold.until.is_empty() { "released" } else { hold.until.as_str() };
        let (by, reason) = (hold.by.clone(), hold.reason.clone());
        vec![hold.backup.clone(), hold.stores.join(","), hold.since.clone(), until.to_owned(), by, reason]
    });
    output::table(&[heading].into_iter().chain(rows).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_why_and_where() {
        let hold = Hold {
            backup: "20261123T034138Z-7f3a9c21".to_owned(),
            reason: "audit".to_owned(),
            by: "ann".to_owned(),
            since: "2026-11-23T03:41:38Z".to_owned(),
            until: String::new(),
            stores: vec!["repo1".to_owned(), "s3".to_owned()],
        };
        let text = render(std::slice::from_ref(&hold));
        assert!(text.ends_with("repo1,s3  2026-11-23T03:41:38Z  released  ann  audit\n"), "{text}");
        assert_eq!(render(&[]), "nothing is held\n");
        assert_eq!(row(&hold).until, None);
    }
}
