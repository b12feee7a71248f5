//! The primary of a backup of the hybrid shape, as the agent of the standby sees it: asked through the coordinator to start
//! the backup, to hold it, to send its part and stop it.
//!
//! Invariants: every question may be repeated, and is until [`PATIENCE`] is over, so that a restart of the coordinator or a lost
//! session passes; that is less than the primary's own patience ([`lease`]). Only to begin it is asked for longer
//! than that, because it may still hold the backup of an agent that died. What the primary says of a failure ends the backup
//! at once.

use std::time::Duration;

use jiff::Timestamp;
use postgres_format::{Lsn, Timeline};
use proto::fleet::fleet_service_client::FleetServiceClient;
use proto::fleet::{AskPrimaryRequest, HeldBackup, HoldBackup, HoldState, HoldWish};
use repository::name::{BackupId, ClusterName, NodeName};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::held::lease;
use super::part::{Expected, PrimaryPart};
use super::{BackupError, BackupRequest};
use crate::coordinator_link::CoordinatorChannel;
use crate::postgres::{BackupStart, Role, StartCheckpoint};

/// How long the primary is asked in vain.
const PATIENCE: Duration = Duration::from_secs(60);
/// How much longer than the lease it is asked in vain to begin: what it holds for nobody is given up by then.
const BEGIN_PATIENCE_BEYOND: Duration = Duration::from_secs(15);
/// Time for one answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// Wait before asking again.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// Longest wait for the start: the largest `checkpoint_timeout` is a day.
const START_DEADLINE: Duration = Duration::from_secs(25 * 3600);
/// Longest wait for the primary's part.
const FINISH_DEADLINE: Duration = Duration::from_secs(4 * 3600);
/// How long telling it that nothing more is wanted may take; without that it finds out by itself.
const RELEASE_DEADLINE: Duration = Duration::from_secs(5);

/// [`PATIENCE`], which tests shorten.
fn patience() -> Duration {
    process::patience("agent/primary-asked", PATIENCE)
}

/// Where the primary is and what it is asked about.
#[derive(Debug)]
pub(super) struct Primary {
    channel: CoordinatorChannel,
    request: AskPrimaryRequest,
    backup: BackupId,
}

impl Primary {
    pub(super) fn new(
        channel: CoordinatorChannel,
        cluster: &ClusterName,
        node: &NodeName,
        primary: &NodeName,
        request: &BackupRequest,
    ) -> Self {
        let hold = HoldBackup {
            backup: request.backup.to_string(),
            start_fast: request.checkpoint == StartCheckpoint::Fast,
            label: request.label.clone(),
            parallel: u32::try_from(request.parallel).unwrap_or(0),
            ..HoldBackup::default()
        };
        let (cluster, node, primary) = (cluster.to_string(), node.to_string(), primary.to_string());
        let asked = AskPrimaryRequest { cluster, node, primary, hold: Some(hold) };
        Self { channel, request: asked, backup: request.backup }
    }

    pub(super) fn backup(&self) -> BackupId {
        self.backup
    }

    /// Has it start the backup.
    pub(super) async fn begin(&self) -> Result<BackupStart, BackupError> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let held = self.ask(HoldWish::Begin, (0, 0), lease() + BEGIN_PATIENCE_BEYOND).await?;
            match held.state() {
                HoldState::Held => return self.started(&held),
                HoldState::Starting => {}
                _ => return Err(self.given_up(&held)),
            }
            self.pause_until(deadline).await?;
        }
    }

    /// Has it hold the backup on.
    pub(super) async fn keep(&self) -> Result<(), BackupError> {
        let held = self.ask(HoldWish::Keep, (0, 0), patience()).await?;
        match held.state() {
            HoldState::Held => Ok(()),
            _ => Err(self.given_up(&held)),
        }
    }

    /// Has it send its part and stop the backup.
    pub(super) async fn finish(&self, expected: &Expected) -> Result<PrimaryPart, BackupError> {
        let deadline = Instant::now() + FINISH_DEADLINE;
        let free = (expected.first_pack, expected.first_file);
        loop {
            let held = self.ask(HoldWish::Finish, free, patience()).await?;
            match held.state() {
                HoldState::Finished => {
                    let part = PrimaryPart::parse(&held.part, expected);
                    return part.map_err(|reason| self.failed(format!("its part makes no sense: {reason}")));
                }
                HoldState::Held | HoldState::Finishing => {}
                _ => return Err(self.given_up(&held)),
            }
            self.pause_until(deadline).await?;
        }
    }

    /// Tells it that nothing more is wanted.
    pub(super) async fn release(&self) {
        if tokio::time::timeout(RELEASE_DEADLINE, self.ask_once(HoldWish::Release, (0, 0))).await.is_err() {
            tracing::debug!(backup = %self.backup, "the primary was not told that a backup is over");
        }
    }

    async fn pause_until(&self, deadline: Instant) -> Result<(), BackupError> {
        if Instant::now() >= deadline {
            return Err(self.failed("it takes too long".to_owned()));
        }
        tokio::time::sleep(ASK_EVERY).await;
        Ok(())
    }

    async fn ask(&self, wish: HoldWish, free: (u32, u32), patience: Duration) -> Result<HeldBackup, BackupError> {
        let until = Instant::now() + patience;
        loop {
            let status = match self.ask_once(wish, free).await {
                Ok(held) => return Ok(held),
                Err(status) => status,
            };
            if status.code() == Code::Unimplemented || Instant::now() + ASK_EVERY > until {
                let primary = self.request.primary.clone();
                return Err(BackupError::PrimaryAway { primary, source: Box::new(status) });
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    async fn ask_once(&self, wish: HoldWish, (first_pack, first_file): (u32, u32)) -> Result<HeldBackup, Status> {
        let mut request = self.request.clone();
        if let Some(hold) = &mut request.hold {
            hold.set_wish(wish);
            (hold.first_pack, hold.first_file) = (first_pack, first_file);
        }
        let mut client = FleetServiceClient::new(self.channel.clone());
        let answer = tokio::time::timeout(ANSWER_DEADLINE, client.ask_primary(request)).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")))?;
        answer.into_inner().held.ok_or_else(|| Status::internal("an answer without content"))
    }

    fn started(&self, held: &HeldBackup) -> Result<BackupStart, BackupError> {
        let started = held.started.parse::<Timestamp>().ok();
        let Some((timeline, started)) = Timeline::new(held.timeline).zip(started) else {
            return Err(self.failed("its start makes no sense".to_owned()));
        };
        Ok(BackupStart { start_lsn: Lsn::new(held.start_lsn), role: Role::Primary, timeline, started })
    }

    fn given_up(&self, held: &HeldBackup) -> BackupError {
        self.failed(match held.state() {
            HoldState::Failed => held.error.clone(),
            HoldState::Unknown => "its agent was restarted, or holds another backup by now".to_owned(),
            other => format!("it says {} where that makes no sense", other.as_str_name()),
        })
    }

    fn failed(&self, reason: String) -> BackupError {
        BackupError::PrimaryGaveUp { primary: self.request.primary.clone(), reason }
    }
}
