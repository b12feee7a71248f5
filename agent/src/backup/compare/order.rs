//! A comparison that the coordinator ordered: told of while it runs, and at its end.

use std::sync::Arc;
use std::time::Duration;

use proto::fleet::{ComparePages, OrderState, OrderUpdate};
use repository::store::ObjectStore;
use repository::verify::Share;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Asked, Progress, compare};
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
    match compared {
        Ok(report) => {
            let report_json = serde_json::to_string(&report).expect("a report has only text keys and plain values");
            OrderUpdate { report_json, ..update(operation, OrderState::Done) }.into()
        }
        Err(error) => Told::failed(operation, chain(&error)),
    }
}

fn update(operation: &str, state: OrderState) -> OrderUpdate {
    OrderUpdate { operation: operation.to_owned(), state: state.into(), ..OrderUpdate::default() }
}
