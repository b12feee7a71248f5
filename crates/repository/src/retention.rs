//! What a store may let go of, and why. Pure: a root, what lies in the store, a policy and a time in; a plan out.
//!
//! A plan says of every backup, every leftover and every timeline's WAL what becomes of it and why; nothing is removed
//! by planning. [`Plan::retired`] is committed as one root commit, valid upon the very root that was looked at, and
//! `sweep.rs` removes what that commit condemned.
//!
//! Never taken away:
//! * the newest backup that can be restored, and anything at all while there is none;
//! * what a backup that is under way is, builds on or may refer to, and WAL that it needs;
//! * what an operator holds;
//! * what a restore holds that is under way, and the WAL from its backup on;
//! * what the promised window needs: the last backup before it, another one after each gap in the WAL, and the WAL;
//! * the WAL from start to consistency of every backup that stays, and the packs that any of them refers to.
//!
//! Nothing is removed either when a clock cannot be believed (see `clock.rs`) or the caller holds back, and no pack while it
//! is not known what every backup that stays refers to. Each store is planned for alone, from its own root, WAL and policy.

mod clock;
mod gather;
mod keep;
mod packs;
mod policy;
pub mod report;
mod text;
mod wal;

pub use gather::{GatherError, gather_references, gather_wal, prefixes};
pub use policy::Policy;
pub use text::render;

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use postgres_format::SystemIdentifier;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::canonical::canonical_json;
use crate::coverage::ArchivedWal;
use crate::name::{BackupId, ClusterName, Generation, StoreName};
use crate::root::{CondemnedBackup, PackRange, Retired, Root, WalKept};

/// Digits of a plan's digest: enough to tell two plans apart, short enough to be typed.
const DIGEST_DIGITS: usize = 16;

/// The packs of other backups that a backup refers to.
pub type References = BTreeMap<BackupId, Vec<PackRange>>;

/// What a store holds, as far as retention is concerned.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// Which store.
    pub store: &'a StoreName,
    /// Its newest root.
    pub root: &'a Root,
    /// The WAL of each system that could be looked at. What is missing here is kept whole.
    pub wal: BTreeMap<SystemIdentifier, ArchivedWal>,
    /// The newest commit that is known from the WAL, by a server's clock.
    pub last_commit: Option<Timestamp>,
    /// What each backup of the root refers to besides its own packs. Without an entry it is not known.
    pub references: BTreeMap<BackupId, References>,
    /// Identifiers under which objects lie that no backup of the root has.
    pub leftovers: BTreeSet<BackupId>,
    /// Backups under way of which the caller knows, pinned or not.
    pub running: BTreeSet<BackupId>,
    /// Why nothing may be removed, by what the caller knows of other stores.
    pub held_back: Option<String>,
}

/// What becomes of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It stays.
    Keep,
    /// It goes.
    Remove,
}

/// What becomes of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupLine {
    /// Which backup.
    pub backup: BackupId,
    /// When it was stopped, by the server's clock.
    pub stop_time: Timestamp,
    /// Bytes it added when it was taken.
    pub stored_bytes: u64,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Why; every reason to keep it, or the one to remove it.
    pub reasons: Vec<String>,
}

/// What becomes of objects that belong to no backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftoverLine {
    /// Under which identifier they lie.
    pub backup: BackupId,
    /// What becomes of them; what is still referred to stays in any case.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
}

/// From where the WAL of a timeline is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalLine {
    /// Of which system.
    pub system_identifier: SystemIdentifier,
    /// From where, and what before that.
    pub kept: WalKept,
    /// Whether less is kept than before.
    pub verdict: Verdict,
    /// Segments that are there and go.
    pub removed_segments: u64,
    /// Why it is kept from there.
    pub reason: String,
}

/// What is to become of what a store holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Which store.
    pub store: StoreName,
    /// Which cluster.
    pub cluster: ClusterName,
    /// The root that was looked at.
    pub generation: Generation,
    /// Its nonce.
    pub nonce: Uuid,
    /// When it was planned.
    pub planned: Timestamp,
    /// The time that ages are counted from: never later than a server was heard of.
    pub as_of: Timestamp,
    /// Why nothing at all is removed, if so.
    pub frozen: Option<String>,
    /// Every backup, newest first.
    pub backups: Vec<BackupLine>,
    /// Everything else that lies among backups.
    pub leftovers: Vec<LeftoverLine>,
    /// Every timeline whose WAL was looked at and is not kept whole.
    pub wal: Vec<WalLine>,
    /// Why no pack is removed although backups are, if so.
    pub packs_kept: Option<String>,
    /// What nobody refers to once this is committed.
    pub condemned: Vec<CondemnedBackup>,
}

/// Plans what a store may let go of.
pub fn plan(facts: &Facts<'_>, policy: &Policy, now: Timestamp) -> Plan {
    let clock = clock::look(facts, policy, now);
    let held_back = clock.frozen.or_else(|| facts.held_back.clone());
    let judged = keep::judge(facts, policy, clock.as_of, held_back.as_deref());
    let frozen = held_back.or_else(|| judged.nothing_restorable.clone());
    let mut plan = Plan {
        store: facts.store.clone(),
        cluster: facts.root.cluster.clone(),
        generation: facts.root.generation,
        nonce: facts.root.nonce,
        planned: now,
        as_of: clock.as_of,
        frozen,
        backups: judged.lines,
        leftovers: Vec::new(),
        wal: Vec::new(),
        packs_kept: None,
        condemned: Vec::new(),
    };
    if plan.frozen.is_none() {
        let removed: BTreeSet<BackupId> = plan.removed().collect();
        plan.wal = wal::lines(facts, policy, &removed, &judged.window, clock.as_of);
        let packs = packs::condemn(facts, &removed, clock.as_of);
        (plan.leftovers, plan.packs_kept, plan.condemned) = (packs.leftovers, packs.kept_because, packs.condemned);
    }
    plan
}

impl Plan {
    /// The backups that go.
    pub fn removed(&self) -> impl Iterator<Item = BackupId> + '_ {
        self.backups.iter().filter(|line| line.verdict == Verdict::Remove).map(|line| line.backup)
    }

    /// Whether there is nothing to commit: no backup goes, no WAL goes, and nothing else is to be condemned than was.
    pub fn changes_nothing(&self, root: &Root) -> bool {
        let standing = root.condemned.as_ref().map(|condemned| condemned.backups.as_slice()).unwrap_or_default();
        self.removed().next().is_none()
            && self.wal.iter().all(|line| line.verdict == Verdict::Keep)
            && self.condemned == standing
    }

    /// Whether it takes away anything that was not taken away before. What was condemned and swept need not be said again.
    pub fn takes_anything(&self, root: &Root) -> bool {
        let standing = root.condemned.as_ref().map(|condemned| condemned.backups.as_slice()).unwrap_or_default();
        self.removed().next().is_some()
            || self.wal.iter().any(|line| line.verdict == Verdict::Remove)
            || self.condemned.iter().any(|one| !standing.contains(one))
    }

    fn taken(&self) -> serde_json::Value {
        let retired = self.retired();
        serde_json::json!({
            "store": self.store, "cluster": self.cluster, "generation": self.generation.get(), "nonce": self.nonce,
            "backups": retired.backups, "condemned": retired.condemned, "wal": retired.wal_kept,
        })
    }

    /// What the commit takes away.
    pub fn retired(&self) -> Retired {
        let fewer = self.wal.iter().filter(|line| line.verdict == Verdict::Remove);
        Retired {
            generation: self.generation,
            nonce: self.nonce,
            backups: self.removed().collect(),
            condemned: self.condemned.clone(),
            wal_kept: fewer.map(|line| (line.system_identifier, line.kept.clone())).collect(),
        }
    }
}

/// What a confirmation names: the same for plans that take the same away from the same roots.
pub fn digest<'a>(plans: impl IntoIterator<Item = &'a Plan>) -> String {
    let taken: Vec<serde_json::Value> = plans.into_iter().map(Plan::taken).collect();
    let text = canonical_json(&taken).expect("a plan has only text keys and plain values");
    crate::digest::to_hex(&crate::digest::sha256(&text))[..DIGEST_DIGITS].to_owned()
}

#[cfg(test)]
mod tests;
