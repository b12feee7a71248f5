//! Who starts a backup, watches over it and stops it: the server whose files are copied, or, for the hybrid shape, its primary.

use std::future::Future;

use postgres_format::{SystemIdentifier, Timeline};

use super::part::{Expected, PrimaryPart, Side};
use super::primary::Primary;
use super::{BackupError, BackupRequest};
use crate::postgres::live::BACKUP_PING;
use crate::postgres::{BackupStart, BackupStop, Role, Server};

/// Who starts and stops a backup.
#[derive(Debug)]
pub(super) enum Holder<'a> {
    /// The server whose files are copied.
    Here(&'a dyn Server),
    /// The primary of the server whose files are copied.
    Primary(&'a dyn Server, Box<Primary>),
}

/// How a backup was stopped.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) stop: BackupStop,
    /// What the primary has sent.
    pub(super) part: Option<PrimaryPart>,
}

impl Holder<'_> {
    /// Whose files are copied here.
    pub(super) fn side(&self) -> Side {
        match self {
            Self::Here(_) => Side::Whole,
            Self::Primary(..) => Side::Standby,
        }
    }

    /// Starts the backup. With a spread checkpoint that takes as long as one.
    pub(super) async fn start(&self, label: &str, request: &BackupRequest) -> Result<BackupStart, BackupError> {
        match self {
            Self::Here(server) => Ok(server.start_backup(label, request.checkpoint).await?),
            Self::Primary(_, primary) => primary.begin().await,
        }
    }

    /// Proves that the backup still runs, and that nobody was promoted; to be called every [`BACKUP_PING`].
    ///
    /// # Errors
    /// [`BackupError::Promoted`], or why it does not run any more.
    pub(super) async fn check(&self, start: &BackupStart) -> Result<(), BackupError> {
        let (now, same_line) = match self {
            Self::Here(server) => {
                let now = server.check_backup().await?;
                (now.role == start.role, start.role == Role::Standby || now.timeline == start.timeline)
            }
            // The standby must follow the primary that holds the backup, on its timeline.
            Self::Primary(server, primary) => {
                primary.keep().await?;
                let now = server.position().await?;
                (now.role == Role::Standby, now.timeline == start.timeline)
            }
        };
        if now && same_line { Ok(()) } else { Err(BackupError::Promoted) }
    }

    /// Does work that may take long, and proves meanwhile that the backup still runs: a primary that nobody asks gives it up.
    ///
    /// # Errors
    /// Those of the work, and as [`Holder::check`].
    pub(super) async fn while_it_runs<T>(
        &self,
        start: &BackupStart,
        work: impl Future<Output = Result<T, BackupError>>,
    ) -> Result<T, BackupError> {
        tokio::pin!(work);
        let mut pings = tokio::time::interval(BACKUP_PING);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = pings.tick() => self.check(start).await?,
            }
        }
    }

    /// Stops the backup. `free` are the first numbers of a pack and of a file that are free for the primary's part.
    pub(super) async fn stop(
        &self,
        start: &BackupStart,
        system_identifier: SystemIdentifier,
        (first_pack, first_file): (u32, u32),
    ) -> Result<Stopped, BackupError> {
        match self {
            Self::Here(server) => Ok(Stopped { stop: server.stop_backup().await?, part: None }),
            Self::Primary(_, primary) => {
                // A promotion after this shows in nothing that was copied.
                self.check(start).await?;
                let (start_lsn, start_timeline): (_, Timeline) = (start.start_lsn, start.timeline);
                let backup = primary.backup();
                let expected =
                    Expected { backup, system_identifier, start_lsn, start_timeline, first_pack, first_file };
                let part = primary.finish(&expected).await?;
                Ok(Stopped { stop: part.stop(), part: Some(part) })
            }
        }
    }

    /// Tells the primary that nothing more is wanted of it.
    pub(super) async fn release(&self) {
        if let Self::Primary(_, primary) = self {
            primary.release().await;
        }
    }
}
