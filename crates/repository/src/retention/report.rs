//! What is shown of retention before it acts, and what it did: for scripts (JSON, schema `pgconvoy.expire/v1`) and for people.
//!
//! Fields are added, never changed or removed, within `v1`.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::{Plan, render};
use crate::name::{ClusterName, StoreName};
use crate::restore_plan::size;
use crate::sweep::Swept;

/// Name and version of the JSON.
pub const SCHEMA: &str = "pgconvoy.expire/v1";

/// What each store of a cluster would let go of, or has let go of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// The cluster.
    pub cluster: ClusterName,
    /// What a confirmation names: it stands for exactly these plans.
    pub plan: String,
    /// Whether the plans were carried out.
    pub applied: bool,
    /// By store, in the configured order.
    pub stores: Vec<StoreReport>,
}

/// What one store would let go of, or has let go of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoreReport {
    /// Its name.
    pub store: StoreName,
    /// The rules, in a few words.
    pub rules: String,
    /// What is to become of what it holds; absent if it could not be planned for.
    pub plan: Option<Plan>,
    /// Why not, or why it was not carried out.
    pub problem: Option<String>,
    /// Objects and bytes that go, or that went.
    pub frees: Option<Swept>,
}

impl Report {
    /// Whether every store could be planned for, or its plan carried out.
    pub fn is_complete(&self) -> bool {
        self.stores.iter().all(|store| store.problem.is_none())
    }

    /// Whether any store lets go of anything.
    pub fn removes_anything(&self) -> bool {
        let removes = |plan: &Plan| plan.frozen.is_none() && (!plan.retired().is_empty());
        self.stores.iter().filter_map(|store| store.plan.as_ref()).any(removes)
    }
}

/// The report as text: every line with its reason.
pub fn render_report(report: &Report) -> String {
    let mut text = String::new();
    for store in &report.stores {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "store {} keeps {}", store.store, store.rules);
        if let Some(plan) = &store.plan {
            let lines = render(plan);
            // Its first line says the store again.
            let _ = writeln!(text, "  ages count from {}, the last that was heard of a server", plan.as_of);
            for line in lines.lines().skip(1) {
                let _ = writeln!(text, "{line}");
            }
        }
        if let Some(problem) = &store.problem {
            let _ = writeln!(text, "  NOT DONE: {problem}");
        }
        if let Some(frees) = &store.frees {
            let _ = writeln!(text, "  {}", frees_text(frees, report.applied));
        }
    }
    text
}

fn frees_text(frees: &Swept, applied: bool) -> String {
    let done = if applied { "freed" } else { "frees" };
    let mut text = format!("{done} {} in {} objects", size(frees.bytes), frees.objects);
    if frees.more {
        text.push_str(if applied { "; the rest follows" } else { ", and more" });
    }
    if frees.retained > 0 {
        let until = frees.retained_until.map(|until| format!(" until {until}")).unwrap_or_default();
        let _ = write!(text, "; the store keeps {} objects by a lock of its own{until}, they go later", frees.retained);
    }
    text
}
