//! Whether what the stores hold can be restored: every object by its digest, every block of every file by the pack that is
//! said to hold it, and WAL without a gap for every backup. Only stores are asked, and nothing is changed.
//!
//! ```text
//! each store: roots ─▶ manifests ─▶ extents against pack tables ─▶ packs ─▶ WAL objects      (look.rs and below it)
//! together:   who else has what is broken ─▶ WAL from start to stop and on ─▶ findings       (judge.rs, pure)
//! ```
//!
//! At [`Depth::Digests`] nothing is decompressed: digests of everything, as anybody can compare them. At [`Depth::Full`] packs
//! and WAL are decoded as well, change maps read, and page checksums verified, of backups that exist; pages in packs that
//! outlived their own backup are proven by digests alone, because nobody knows any more which of them were being written.
//!
//! Whether the stores hold what the servers have is asked elsewhere: an agent compares its server's pages with a backup, by the
//! rules of [`source`].
//!
//! Decision: one walk serves the operator, the nightly scrub and the museum of damaged repositories; a scrub is a walk over
//! the objects of one [`Share`]. Rejected: a scrub of its own, which would know less of what damage costs.
//!
//! Memory: some 30 bytes of each pack that the manifests list, 16 more while one is read, tables of [`extents::FRAMES_KEPT`]
//! frames, and at [`Depth::Full`] two packs and a byte for each file of one backup.

mod content;
mod continuity;
mod extents;
mod facts;
mod finding;
mod judge;
mod listed;
mod look;
mod pages;
pub mod repair;
pub mod source;
mod text;
mod wal_objects;
mod watch;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

pub use finding::{
    BackupVerdict, Depth, Finding, Proof, Report, SCHEMA, Severity, Share, StoreBackup, StoreVerdict, What,
};
pub use text::render_text;
pub use watch::{Progress, Watch};

use crate::name::{BackupId, ClusterName, StoreName};
use crate::observe::{Holding, observe_all};
use crate::store::ObjectStore;
use continuity::StoreWal;
use facts::StoreFacts;

/// Broken objects of one store that are told one by one; more are counted.
pub const BROKEN_MAX: usize = 1000;

/// WAL that is missing is looked for again after so long: it may have been on its way.
const ON_ITS_WAY: Duration = Duration::from_secs(5);

/// What is to be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// How thoroughly.
    pub depth: Depth,
    /// Only this backup, with the packs it refers to and its WAL. All backups and all WAL if absent.
    pub backup: Option<BackupId>,
    /// Only objects of this share; what the stores list is judged all the same.
    pub share: Option<Share>,
    /// After how long WAL that is missing is looked for again.
    pub second_look: Duration,
}

impl Request {
    /// Everything, at this depth.
    pub fn all(depth: Depth) -> Self {
        Self { depth, backup: None, share: None, second_look: ON_ITS_WAY }
    }

    fn takes(&self, key: &crate::key::ObjectKey) -> bool {
        self.share.is_none_or(|share| share.takes(key.as_str()))
    }
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The directory for manifests cannot be written.
    #[error("a manifest could not be laid down to be read")]
    Scratch(#[source] io::Error),
}

/// Looks at what stores hold of a cluster. A store that fails on the way is told as such, and the rest is of the others.
///
/// `scratch` is a directory for one manifest at a time. Dropping the future ends it.
///
/// # Errors
/// [`VerifyError`]; whatever is wrong with a store is in the report.
pub async fn verify(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    request: &Request,
    watch: &Watch,
    scratch: &Path,
    now: Timestamp,
) -> Result<Report, VerifyError> {
    watch.step("listing WAL");
    let held = observe_all(stores, cluster).await;
    watch.expect(held.iter().flatten().map(facts::expected_bytes).sum());
    let mut facts = Vec::new();
    for store in stores {
        facts.push(look::look(stores, store, cluster, request, watch, scratch).await?);
    }
    watch.step("looking for sound copies");
    seek_copies(stores, &mut facts).await;
    let mut wal: Vec<StoreWal> = listed(held, &facts);
    watch.step("judging");
    let report = judge::judge(cluster, request, &facts, &wal, now);
    if !judge::misses_wal(&report) {
        return Ok(report);
    }
    tokio::time::sleep(request.second_look).await;
    let later = listed(observe_all(stores, cluster).await, &facts);
    wal.iter_mut().zip(later).for_each(|(wal, later)| wal.add(later));
    Ok(judge::judge(cluster, request, &facts, &wal, now))
}

fn listed(held: Vec<Result<Holding, String>>, facts: &[StoreFacts]) -> Vec<StoreWal> {
    held.into_iter().zip(facts).map(|(held, facts)| StoreWal::of(facts, held)).collect()
}

/// Finds out which other stores hold sound copies of what is broken, by reading them.
async fn seek_copies(stores: &[Arc<dyn ObjectStore>], facts: &mut [StoreFacts]) {
    let broken: Vec<BTreeSet<String>> = facts.iter().map(StoreFacts::broken_keys).collect();
    for of in 0..facts.len() {
        for index in 0..facts[of].broken.len() {
            let one = &facts[of].broken[index];
            let (key, proof) = (one.key.clone(), one.proof);
            let mut sound: Vec<StoreName> = Vec::new();
            for (other, store) in stores.iter().enumerate() {
                let may = other != of && facts[other].failed.is_none() && !broken[other].contains(key.as_str());
                if may && content::prove(&**store, &key, proof.as_ref()).await.is_ok() {
                    sound.push(store.name().clone());
                }
            }
            facts[of].broken[index].sound_in = sound;
        }
    }
}
