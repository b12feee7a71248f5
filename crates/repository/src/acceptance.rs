//! What is shown of a store that was set back to an older copy of itself before an operator accepts that, and what came of it:
//! for scripts (JSON, schema `pgconvoy.store-accept/v1`) and for people.
//!
//! Fields are added, never changed or removed, within `v1`. Pure: whoever looks at the stores is the coordinator.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::canonical::canonical_json;
use crate::name::{BackupId, ClusterName, Generation, StoreName};

/// Name and version of the JSON.
pub const SCHEMA: &str = "pgconvoy.store-accept/v1";
/// Digits of what a confirmation names.
const DIGEST_DIGITS: usize = 12;

/// What a store lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// The store.
    pub store: StoreName,
    /// What a confirmation names: it stands for exactly this loss.
    pub plan: String,
    /// Whether the loss was accepted.
    pub applied: bool,
    /// By cluster; none if the store lost no roots.
    pub clusters: Vec<ClusterLoss>,
}

/// What a store lost of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterLoss {
    /// The cluster.
    pub cluster: ClusterName,
    /// The newest root that was seen.
    pub seen: Generation,
    /// The newest that is there; absent if there is none.
    pub found: Option<Generation>,
    /// The root that is committed, or was.
    pub next: Option<Generation>,
    /// What becomes of each backup, oldest first.
    pub backups: Vec<BackupFate>,
    /// Why it was not accepted.
    pub problem: Option<String>,
}

/// What becomes of a backup in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupFate {
    /// Which backup.
    pub backup: BackupId,
    /// What becomes of it.
    pub fate: Fate,
    /// Why, for people.
    pub reason: String,
}

/// What becomes of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// The root that is there names it, and all its parts are there.
    Stays,
    /// The root that is there does not name it, but all its parts are there.
    Named,
    /// Another store has it, and it is copied.
    Copied,
    /// It was there, and no store has it whole.
    Lost,
}

impl Fate {
    fn text(self) -> &'static str {
        match self {
            Self::Stays => "stays",
            Self::Named => "is named again",
            Self::Copied => "is copied here",
            Self::Lost => "IS LOST",
        }
    }
}

impl Report {
    /// What a store lost, with what a confirmation is to name.
    pub fn new(store: StoreName, clusters: Vec<ClusterLoss>) -> Self {
        let text = canonical_json(&(&store, &clusters)).expect("a report has only text keys and plain values");
        let plan = crate::digest::to_hex(&crate::digest::sha256(&text))[..DIGEST_DIGITS].to_owned();
        Self { schema: SCHEMA.to_owned(), store, plan, applied: false, clusters }
    }

    /// Whether nothing failed.
    pub fn is_complete(&self) -> bool {
        self.clusters.iter().all(|cluster| cluster.problem.is_none())
    }
}

/// The report as text.
pub fn render(report: &Report) -> String {
    let mut text = String::new();
    for loss in &report.clusters {
        let found = loss.found.map_or("there is none".to_owned(), |found| format!("the newest is {}", found.get()));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "store {}, cluster {}", report.store, loss.cluster);
        let _ = writeln!(text, "  root {} was seen there, now {found}", loss.seen.get());
        if let Some(next) = loss.next {
            let tense = if report.applied { "was committed" } else { "is the next" };
            let _ = writeln!(text, "  root {} {tense}; no number has two contents", next.get());
        }
        for BackupFate { backup, fate, reason } in &loss.backups {
            let _ = writeln!(text, "  {backup} {}: {reason}", fate.text());
        }
        if let Some(problem) = &loss.problem {
            let _ = writeln!(text, "  NOT DONE: {problem}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_stands_out_and_a_plan_is_of_one_loss() {
        let generation = |number| Generation::new(number).unwrap();
        let fate = |fate, reason: &str| BackupFate {
            backup: "20261123T034138Z-7f3a9c21".parse().unwrap(),
            fate,
            reason: reason.to_owned(),
        };
        let loss = ClusterLoss {
            cluster: "main".parse().unwrap(),
            seen: generation(9),
            found: Some(generation(7)),
            next: Some(generation(10)),
            backups: vec![fate(Fate::Copied, "store s3 has it"), fate(Fate::Lost, "no store has it")],
            problem: None,
        };
        let report = Report::new("repo1".parse().unwrap(), vec![loss.clone()]);
        insta::assert_snapshot!(render(&report));
        let other = Report::new("repo1".parse().unwrap(), vec![ClusterLoss { found: None, ..loss }]);
        assert_ne!(report.plan, other.plan);
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }
}
