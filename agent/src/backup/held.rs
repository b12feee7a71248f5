//! A backup that this primary holds for a standby whose files are copied: started and stopped here, with the part that must
//! come from a primary, see [`super::part`].
//!
//! ```text
//! begin ─ start ─ hold ········ keep, keep, keep ········ finish ─ copy our part ─ stop ─ describe ─ told ─ release
//! ```
//!
//! Invariants: one at a time, and none beside a backup of our own; every question may be repeated; what is held is given up,
//! and the server told so, when nobody asked about it for [`lease`], when the standby begins another one, when the session
//! with the server breaks, when the role or the timeline changes, and when the agent stops. Nothing is published here: the
//! standby's agent does that, with our part among its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto::fleet::{HeldBackup, HoldBackup, HoldState, HoldWish};
use repository::backup::origin::{BackupType, ChangeSource};
use repository::name::BackupId;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::describe::Facts;
use super::holder::Holder;
use super::parent::find::Library;
use super::part::{PART_BYTES_MAX, Side};
use super::road::{BackupRoad, Roads};
use super::witness::OwnWal;
use super::{BackupError, BackupLines, BackupNode, BackupRequest, Backups, Progress, SessionGuard};
use super::{admit, attempt, copy, describe, facts, increment, label_of, look, warnings};
use crate::archive::ship::chain;
use crate::postgres::live::BACKUP_PING;
use crate::postgres::{BackupStart, Role, StartCheckpoint};

/// How long a backup is held that nobody asks about. More than the standby's patience with us, so that it is not given up
/// while somebody wants it.
const LEASE: Duration = Duration::from_secs(90);

/// [`LEASE`], which tests shorten.
pub(super) fn lease() -> Duration {
    process::patience("agent/held-lease", LEASE)
}

/// Where it stands.
#[derive(Clone, Debug)]
enum Standing {
    Starting,
    Held(BackupStart),
    Finishing(BackupStart),
    Finished(BackupStart, Bytes),
    Failed(String),
}

impl Standing {
    /// Whether the server runs nothing for it any more: another backup may take its place.
    fn is_over(&self) -> bool {
        matches!(self, Self::Finished(..) | Self::Failed(_))
    }
}

/// The first numbers of packs and files that are free for our part.
#[derive(Clone, Copy, Debug)]
struct Free {
    pack: u32,
    file: u32,
}

/// A backup that is held, or was.
#[derive(Debug)]
pub struct Held {
    request: BackupRequest,
    /// The standby that wants it; empty if the coordinator does not say.
    wanted_by: String,
    standing: Mutex<Standing>,
    asked: Mutex<Instant>,
    finish: watch::Sender<Option<Free>>,
    released: CancellationToken,
}

impl Held {
    fn new(request: BackupRequest, wanted_by: String) -> Self {
        Self {
            request,
            wanted_by,
            standing: Mutex::new(Standing::Starting),
            asked: Mutex::new(Instant::now()),
            finish: watch::Sender::new(None),
            released: CancellationToken::new(),
        }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, standing: Standing) {
        *self.standing() = standing;
    }

    /// Whether nobody wants it any more, since this node begins another one: a node takes one at a time.
    fn is_left_by(&self, node: &str) -> bool {
        !node.is_empty() && self.wanted_by == node
    }

    /// Somebody asked: it is wanted.
    fn renew(&self) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Returns once nobody asked for [`lease`].
    async fn unasked(&self) {
        loop {
            let asked = *self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let left = lease().saturating_sub(asked.elapsed());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }

    fn told(&self) -> HeldBackup {
        let (state, start) = match &*self.standing() {
            Standing::Starting => (HoldState::Starting, None),
            Standing::Held(start) => (HoldState::Held, Some(*start)),
            Standing::Finishing(start) => (HoldState::Finishing, Some(*start)),
            Standing::Finished(start, part) => {
                return HeldBackup { part: part.clone(), ..told_start(HoldState::Finished, start) };
            }
            Standing::Failed(error) => {
                return HeldBackup { state: HoldState::Failed.into(), error: error.clone(), ..HeldBackup::default() };
            }
        };
        start.map_or_else(
            || HeldBackup { state: state.into(), ..HeldBackup::default() },
            |start| told_start(state, &start),
        )
    }
}

fn told_start(state: HoldState, start: &BackupStart) -> HeldBackup {
    HeldBackup {
        state: state.into(),
        start_lsn: start.start_lsn.as_u64(),
        timeline: start.timeline.get(),
        started: start.started.to_string(),
        ..HeldBackup::default()
    }
}

fn unknown() -> HeldBackup {
    HeldBackup { state: HoldState::Unknown.into(), ..HeldBackup::default() }
}

impl Backups {
    /// How the backup stands that a standby asks about, and what is to be held from now on, if it wants that: whoever gets it
    /// calls [`Backups::hold`].
    ///
    /// # Errors
    /// What makes no sense about the question.
    pub fn asked_to_hold(&self, asked: &HoldBackup) -> Result<(HeldBackup, Option<Arc<Held>>), String> {
        let backup: BackupId = asked.backup.parse().map_err(|_| "the backup's identifier is not one".to_owned())?;
        let mut slot = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let known = slot.as_ref().filter(|held| held.request.backup == backup).cloned();
        let Some(held) = known else {
            if asked.wish() != HoldWish::Begin {
                return Ok((unknown(), None));
            }
            if let Some(other) = slot.as_ref().filter(|other| !other.standing().is_over()) {
                // This one has its place once that is over, and is asked for until then.
                if other.is_left_by(&asked.node) {
                    other.released.cancel();
                }
                return Err(format!("backup {} is held here", other.request.backup));
            }
            let checkpoint = if asked.start_fast { StartCheckpoint::Fast } else { StartCheckpoint::Spread };
            let request = BackupRequest {
                backup,
                backup_type: BackupType::Full,
                label: asked.label.clone(),
                checkpoint,
                parallel: asked.parallel as usize,
                bytes_per_second: None,
                wal_wait: Duration::ZERO,
                primary: None,
            };
            let held = Arc::new(Held::new(request, asked.node.clone()));
            *slot = Some(Arc::clone(&held));
            return Ok((held.told(), Some(held)));
        };
        held.renew();
        match asked.wish() {
            HoldWish::Release => held.released.cancel(),
            HoldWish::Finish => {
                let free = Free { pack: asked.first_pack, file: asked.first_file };
                held.finish.send_if_modified(|wanted| wanted.is_none() && wanted.replace(free).is_none());
            }
            HoldWish::Begin | HoldWish::Keep | HoldWish::Unspecified => {}
        }
        Ok((held.told(), None))
    }

    /// Holds a backup, and remembers what came of it until nobody wants to know.
    pub async fn hold(&self, held: Arc<Held>, roads: Roads, cancel: &CancellationToken) {
        let backup = held.request.backup;
        let ended = self.hold_on(&held, roads, cancel).await;
        match ended {
            Ok((start, part)) => {
                tracing::info!(%backup, bytes = part.len(), "our part of a standby's backup is sent and the backup stopped");
                held.set(Standing::Finished(start, part));
            }
            Err(error) => {
                let error = chain(&error);
                tracing::info!(%backup, error, "a backup that was held for a standby is given up");
                held.set(Standing::Failed(error));
            }
        }
        tokio::select! {
            () = cancel.cancelled() => {}
            () = held.released.cancelled() => {}
            () = held.unasked() => {}
        }
        let mut slot = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        slot.take_if(|known| Arc::ptr_eq(known, &held));
    }

    async fn hold_on(
        &self,
        held: &Held,
        roads: Roads,
        cancel: &CancellationToken,
    ) -> Result<(BackupStart, Bytes), BackupError> {
        let _permit = self.begin().await?;
        let road = BackupRoad::new(roads, self.node.cluster.clone(), self.node.node.clone())?;
        let _guard = SessionGuard(self.node.server.as_ref());
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(BackupError::Cancelled),
            () = held.released.cancelled() => Err(BackupError::Cancelled),
            () = held.unasked() => Err(BackupError::Unasked { seconds: lease().as_secs() }),
            part = conduct(&self.node, held, &road, cancel) => part,
        }
    }
}

async fn conduct(
    node: &BackupNode,
    held: &Held,
    road: &BackupRoad,
    cancel: &CancellationToken,
) -> Result<(BackupStart, Bytes), BackupError> {
    let request = &held.request;
    let (identity, settings) = admit(node, Side::Primary).await?;
    let holder = Holder::Here(node.server.as_ref());
    let start = holder.start(&label_of(request), request).await?;
    if start.role != Role::Primary {
        return Err(BackupError::Promoted);
    }
    let backup = request.backup;
    tracing::info!(%backup, start_lsn = %start.start_lsn, timeline = %start.timeline, "a backup is held for a standby");
    process::crash_point!("agent/after-held-start-before-part");
    let own_wal = OwnWal::of(node, &identity);
    let first_witness = own_wal.at_checkpoint(start.timeline).await?;
    held.set(Standing::Held(start));
    let free = hold_until_finish(held, &holder, &start).await?;
    held.set(Standing::Finishing(start));

    let looked = look(node, &identity, &settings, Side::Primary, free.file).await?;
    let library = Library { stores: &[], cluster: &node.cluster, scratch: &node.scratch };
    let increment = increment::prepare(node, BackupType::Full, library, &identity, &start, looked).await?;
    let attempt = attempt(node, request, &identity, &start, &increment);
    let (progress, built_on) = (watch::Sender::new(Progress::default()), watch::Sender::new(String::new()));
    let (switch_wal, stopping) = (None::<&mpsc::Sender<_>>, cancel);
    let lines = BackupLines { progress: &progress, built_on: &built_on, switch_wal, cancel, stopping };
    let copied = copy::copy(node, request, road, &lines, increment.work, (&holder, &start, free.pack), attempt).await?;
    process::crash_point!("agent/after-part-before-held-stop");
    let stop = node.server.stop_backup().await?;
    process::crash_point!("agent/after-held-stop-before-answer");
    let whole = (BackupType::Full, ChangeSource { reason: String::new(), ..increment.source });
    let facts = facts(node, request, &identity, &start, &stop, &copied, whole)?;
    let wal_witnesses = own_wal.of_backup(first_witness, &facts)?;
    let facts = Facts { wal_witnesses, warnings: warnings(&copied), ..facts };
    let scratch = node.scratch.clone();
    let describing = tokio::task::spawn_blocking(move || {
        let described = describe::describe(&facts, &copied, None, None, &scratch).map_err(BackupError::Manifest)?;
        let bytes = described.entry.manifest_size;
        if bytes > PART_BYTES_MAX as u64 {
            return Err(BackupError::PartTooLarge { bytes, max: PART_BYTES_MAX });
        }
        described.read().map_err(BackupError::Manifest)
    });
    let part = describing.await.map_err(|_| BackupError::Reader)??;
    Ok((start, Bytes::from(part)))
}

/// Keeps the backup until its end is wanted.
async fn hold_until_finish(held: &Held, holder: &Holder<'_>, start: &BackupStart) -> Result<Free, BackupError> {
    let mut wanted = held.finish.subscribe();
    let mut ping = tokio::time::interval(BACKUP_PING);
    loop {
        tokio::select! {
            // The sender lives as long as `held`.
            Ok(()) = wanted.changed() => {}
            _ = ping.tick() => holder.check(start).await?,
        }
        if let Some(free) = *wanted.borrow() {
            return Ok(free);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_leaves_what_was_held_for_itself_only() {
        let request = BackupRequest {
            backup: "20261123T034138Z-00000001".parse().unwrap(),
            backup_type: BackupType::Full,
            label: String::new(),
            checkpoint: StartCheckpoint::Fast,
            parallel: 0,
            bytes_per_second: None,
            wal_wait: Duration::ZERO,
            primary: None,
        };
        let held = |wanted_by: &str| Held::new(request.clone(), wanted_by.to_owned());
        assert!(held("db2").is_left_by("db2") && !held("db2").is_left_by("db3"));
        // Coordinators of before this version do not say.
        assert!(!held("db2").is_left_by("") && !held("").is_left_by("") && !held("").is_left_by("db2"));
    }

    #[test]
    fn another_backup_takes_the_place_of_one_that_is_over_only() {
        let started = "2026-11-23T03:41:38Z".parse().unwrap();
        let timeline = postgres_format::Timeline::new(1).unwrap();
        let start = BackupStart { start_lsn: postgres_format::Lsn::new(0x200), role: Role::Primary, timeline, started };
        assert!(Standing::Finished(start, Bytes::new()).is_over() && Standing::Failed("gone".to_owned()).is_over());
        let standing = [Standing::Starting, Standing::Held(start), Standing::Finishing(start)];
        assert!(!standing.iter().any(Standing::is_over));
    }
}
