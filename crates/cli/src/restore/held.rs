//! A restore tells retention what it reads, so that it stays.
//!
//! The coordinator holds the backup in the roots of the stores until a day after the restore's last word: the restored server
//! reads WAL when the restore has ended. A restore goes on without it. What is lost must come back where the coordinator is
//! lost too, and without a coordinator nothing is removed.

use std::{convert::Infallible, fs, path::Path, time::Duration};

use proto::operator::HoldForRestoreRequest;
use repository::{name::ClusterName, root::RootBackup};

use crate::{config::Coordinator, coordinator::operator, error::CliError, output};

/// How long the coordinator is waited for.
const PATIENCE: Duration = Duration::from_secs(15);
/// Time between two words of a restore that is held.
const EVERY: Duration = Duration::from_secs(3600);
/// Time until the next attempt of one that is not.
const AGAIN: Duration = Duration::from_secs(60);
/// Longest name of a place, in bytes.
const PLACE_BYTES_MAX: usize = 500;

/// What one restore asks for.
pub(super) struct Hold<'a> {
    coordinator: &'a Coordinator,
    request: HoldForRestoreRequest,
}

/// How much of that is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Every store that may have the backup holds it.
    Everywhere,
    /// Not every one does.
    NotEverywhere,
}

impl<'a> Hold<'a> {
    /// Of a backup that is restored to this place.
    pub(super) fn new(coordinator: &'a Coordinator, cluster: &ClusterName, backup: &RootBackup, target: &Path) -> Self {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let request = HoldForRestoreRequest {
            cluster: cluster.to_string(),
            backup: backup.backup.to_string(),
            place: place(host.trim(), target),
        };
        Self { coordinator, request }
    }

    /// The first word, before anything is read. What is not held is told, where a coordinator is configured at all.
    pub(super) async fn begin(&self) -> Held {
        match self.word().await {
            Ok(others) if others.is_empty() => Held::Everywhere,
            Ok(others) => {
                others.iter().for_each(|other| output::complain(&format!("note: retention may not wait: {other}")));
                Held::NotEverywhere
            }
            Err(error) => {
                if self.coordinator.named {
                    output::complain(&format!("note: retention is not told of this restore yet: {error}"));
                }
                Held::NotEverywhere
            }
        }
    }

    /// Says it again every while.
    pub(super) async fn keep(&self, mut held: Held) -> Infallible {
        loop {
            tokio::time::sleep(if held == Held::Everywhere { EVERY } else { AGAIN }).await;
            held = match self.word().await {
                Ok(others) if others.is_empty() => Held::Everywhere,
                _ => Held::NotEverywhere,
            };
        }
    }

    /// Answers a line for each store that may have the backup and does not hold it.
    async fn word(&self) -> Result<Vec<String>, CliError> {
        let asking = async {
            let answer = operator(self.coordinator).await?.hold_for_restore(self.request.clone()).await?;
            Ok::<_, CliError>(answer.into_inner().others)
        };
        match tokio::time::timeout(PATIENCE, asking).await {
            Ok(answered) => answered,
            Err(_) => {
                let what = format!("the coordinator did not answer within {} s", PATIENCE.as_secs());
                Err(CliError::new(process::exit::Exit::Unreachable, what))
            }
        }
    }
}

/// Host and directory, the end of a long one.
fn place(host: &str, target: &Path) -> String {
    let place = format!("{host}:{}", target.display());
    let from = (place.len().saturating_sub(PLACE_BYTES_MAX)..).find(|at| place.is_char_boundary(*at)).unwrap_or(0);
    place[from..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_short_enough_to_be_written_down() {
        assert_eq!(place("db9", Path::new("/data")), "db9:/data");
        let long = place("db9", Path::new(&format!("/{}data", "ä".repeat(400))));
        assert!((PLACE_BYTES_MAX - 1..=PLACE_BYTES_MAX).contains(&long.len()) && long.ends_with("äädata"), "{long}");
    }
}
