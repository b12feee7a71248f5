//! A comparison that the coordinator ordered: told of while it runs, and at its end.

use std::sync::Arc;
use std::time::Duration;

use proto::fleet::{ComparePages, OrderState, OrderUpdate};
use repository::store::ObjectStore;
use repository::verify::Share;
use repository::verify::source::SourceReport;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Asked, CompareError, Progress, compare};
use crate::archive::ship::chain;
use crate::backup::BackupNode;
use crate::orders::Told;

/// Time between two words about progress.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Compares and says how it goes; gives the last word.
pub async fn ordered(
    node: &BackupNode,
    stores: &[Arc<dyn ObjectStore>],
    operation: &str,
    wanted: &ComparePages,
    told: &mpsc::Sender<Told>,
    cancel: &CancellationToken,
) -> Told {
    let share = (wanted.of > 1).then_some(Share { part: wanted.part, of: wanted.of });
    let asked = Asked { share, bytes_per_second: wanted.bytes_per_second };
    let progress = watch::Sender::new(Progress::default());
    let work = compare(node, stores, asked, &progress);
    tokio::pin!(work);
    let mut ticks = tokio::time::interval(TELL_EVERY);
    let compared = loop {
        tokio::select! {
            () = cancel.cancelled() => return Told::failed(operation, "it was cancelled"),
            compared = &mut work => break compared,
            _ = ticks.tick() => {
                let Progress { bytes_done, bytes_total } = *progress.borrow();
                let step = "comparing pages with the newest backup".to_owned();
                let update = update(operation, OrderState::Running);
                // A word that finds the queue full is followed by a newer one.
                let _ = told.try_send(OrderUpdate { step, bytes_done, bytes_total, ..update }.into());
            }
        }
    };
    last_word(operation, asked.share, compared)
}

/// PURE: how an order ends. That there is no backup to compare a share with yet is nothing wrong: another night it is.
fn last_word(operation: &str, share: Option<Share>, compared: Result<SourceReport, CompareError>) -> Told {
    match compared {
        Ok(report) => {
            let report_json = serde_json::to_string(&report).expect("a report has only text keys and plain values");
            OrderUpdate { report_json, ..update(operation, OrderState::Done) }.into()
        }
        Err(error @ CompareError::Nothing { .. }) if share.is_some() => {
            OrderUpdate { step: error.to_string(), ..update(operation, OrderState::Done) }.into()
        }
        Err(error) => Told::failed(operation, chain(&error)),
    }
}

fn update(operation: &str, state: OrderState) -> OrderUpdate {
    OrderUpdate { operation: operation.to_owned(), state: state.into(), ..OrderUpdate::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_without_a_backup_to_compare_with_is_no_failure() {
        let ended = |share, error| match last_word("a", share, Err(error)) {
            Told::Update(update) => (update.state(), update.step, update.error),
            other => panic!("{other:?}"),
        };
        let nothing = || CompareError::Nothing { reason: "no backup".to_owned() };
        let why = "there is nothing to compare with: no backup".to_owned();
        let share = Some(Share { part: 1, of: 30 });
        assert_eq!(ended(share, nothing()), (OrderState::Done, why.clone(), String::new()));
        assert_eq!(ended(None, nothing()), (OrderState::Failed, String::new(), why));
        assert_eq!(ended(share, CompareError::PageSize(4096)).0, OrderState::Failed);
        let unreadable = CompareError::History { reason: "damaged".to_owned() };
        assert_eq!(ended(share, unreadable), (OrderState::Failed, String::new(), "damaged".to_owned()));
    }
}
