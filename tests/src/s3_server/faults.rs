//! What goes wrong in the S3 server, changed while it runs, and a count of what it was asked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// The operations that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// PutObject and the steps of a multipart upload
    Put,
    /// GetObject
    Get,
    /// HeadObject
    Head,
    /// ListObjectsV2 and everything else about the bucket
    List,
    /// DeleteObject, DeleteObjects and AbortMultipartUpload
    Delete,
}

/// What befalls a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// 503 SlowDown.
    SlowDown,
    /// 403, as a bucket with object lock refuses a removal; for deletes.
    Locked,
    /// No answer until the plan changes; then the connection breaks.
    Hang,
    /// Carried out after so many milliseconds.
    Latency(u64),
    /// The connection breaks before anything happened.
    ResetBeforeCommit,
    /// Carried out, and the connection breaks instead of an answer.
    LostReply,
    /// The body of the answer breaks off after so many bytes.
    TruncatedRead(u64),
}

/// A fault and whom it befalls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What goes wrong.
    pub fault: Fault,
    /// Only this operation; default all.
    #[serde(default)]
    pub operation: Option<Operation>,
    /// Only requests whose path contains this; default all.
    #[serde(default)]
    pub key_contains: String,
    /// Only so many times; default until the plan changes.
    #[serde(default)]
    pub times: Option<u64>,
}

/// Everything that goes wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FaultPlan {
    /// Nobody listens, and open connections break.
    pub refuse_connections: bool,
    /// Conditions of puts are not looked at: what exists is overwritten.
    pub ignore_conditions: bool,
    /// Puts with conditions are answered with 501.
    pub refuse_conditions: bool,
    /// Creation is looked up and then done, with a pause between: racing creators all win.
    pub racy_conditions: bool,
    /// Listings lag by so many milliseconds: they do not show younger objects yet, and removed ones still.
    pub stale_listing_ms: u64,
    /// Faults of single requests; the first that fits befalls it.
    pub rules: Vec<Rule>,
}

/// How often each operation was asked for, faults included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// PutObject and the steps of a multipart upload
    pub put: u64,
    /// GetObject
    pub get: u64,
    /// HeadObject
    pub head: u64,
    /// ListObjectsV2 and everything else about the bucket
    pub list: u64,
    /// DeleteObject, DeleteObjects and AbortMultipartUpload
    pub delete: u64,
}

/// A handle on what goes wrong; copies are the same handle.
#[derive(Debug, Clone)]
pub struct Faults {
    plan: Arc<watch::Sender<FaultPlan>>,
    counts: Arc<Mutex<Counts>>,
}

impl Default for Faults {
    fn default() -> Self {
        Self { plan: Arc::new(watch::Sender::new(FaultPlan::default())), counts: Arc::default() }
    }
}

impl Faults {
    /// Replaces the whole plan.
    pub fn set(&self, plan: FaultPlan) {
        self.plan.send_replace(plan);
    }

    /// Changes the plan.
    pub fn change(&self, change: impl FnOnce(&mut FaultPlan)) {
        self.plan.send_modify(change);
    }

    /// Adds a rule to the plan.
    pub fn add(&self, operation: Option<Operation>, fault: Fault, times: Option<u64>) {
        let rule = Rule { fault, operation, key_contains: String::new(), times };
        self.change(|plan| plan.rules.push(rule));
    }

    /// Nobody listens any more, or again.
    pub fn refuse_connections(&self, refuse: bool) {
        self.change(|plan| plan.refuse_connections = refuse);
    }

    /// Nothing goes wrong any more.
    pub fn heal(&self) {
        self.set(FaultPlan::default());
    }

    /// What goes wrong now.
    pub fn plan(&self) -> FaultPlan {
        self.plan.borrow().clone()
    }

    /// What was asked since the start or the last [`Faults::reset_counts`].
    pub fn counts(&self) -> Counts {
        *self.count()
    }

    /// Starts counting anew.
    pub fn reset_counts(&self) {
        *self.count() = Counts::default();
    }

    /// Resolves when the plan changes.
    pub(super) fn changes(&self) -> watch::Receiver<FaultPlan> {
        self.plan.subscribe()
    }

    /// Counts a request and says what befalls it.
    pub(super) fn befalling(&self, operation: Operation, path: &str) -> Option<Fault> {
        {
            let mut counts = self.count();
            let count = match operation {
                Operation::Put => &mut counts.put,
                Operation::Get => &mut counts.get,
                Operation::Head => &mut counts.head,
                Operation::List => &mut counts.list,
                Operation::Delete => &mut counts.delete,
            };
            *count += 1;
        }
        let mut fault = None;
        // Using up a rule is not a change that hanging requests should notice.
        self.plan.send_if_modified(|plan| {
            fault = take_fault(&mut plan.rules, operation, path);
            false
        });
        fault
    }

    fn count(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take_fault(rules: &mut Vec<Rule>, operation: Operation, path: &str) -> Option<Fault> {
    let fits = |rule: &Rule| {
        rule.operation.is_none_or(|wanted| wanted == operation)
            && path.contains(&rule.key_contains)
            && rule.times != Some(0)
    };
    let index = rules.iter().position(fits)?;
    let rule = &mut rules[index];
    let fault = rule.fault.clone();
    if let Some(times) = &mut rule.times {
        *times -= 1;
        if *times == 0 {
            rules.remove(index);
        }
    }
    Some(fault)
}

impl FaultPlan {
    /// By how much listings lag.
    pub(super) fn stale_listing(&self) -> Duration {
        Duration::from_millis(self.stale_listing_ms)
    }
}
