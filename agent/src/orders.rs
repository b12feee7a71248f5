//! What the coordinator asks of this node, and what is said back: the plug between the session and whoever executes.
//!
//! Invariants: the channel down holds at most [`ORDERS_MAX`] orders and a full one refuses the next, which the coordinator is
//! told. An operation is handed on at most once, even when the coordinator repeats it on a new session, and is in hand until
//! its end was told, so that a new session can say which operations this agent knows. What is said upwards waits for the next session when there is none, up to [`TOLD_MAX`] words.

use std::collections::{BTreeSet, VecDeque};

use proto::fleet::{
    ChangePace, ComparePages, HoldBackup, Order as WireOrder, OrderState, OrderUpdate, TakeBackup, order,
};

/// Orders waiting to be executed.
pub const ORDERS_MAX: usize = 8;
/// Words waiting to be sent upwards.
pub const TOLD_MAX: usize = 64;
/// Operations remembered, so that none runs twice.
const REMEMBERED: usize = 256;

/// One order.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// Identifier of the operation.
    pub operation: String,
    /// What to do.
    pub what: What,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// Take a base backup.
    TakeBackup(TakeBackup),
    /// Make the server finish its current segment.
    SwitchWal {
        /// Switch only when the current segment is the one of this LSN or earlier; 0 always switches.
        past_lsn: u64,
    },
    /// Compare pages with the newest backup.
    ComparePages(ComparePages),
    /// Say how a backup stands that this primary holds for a standby, and do what the standby wants.
    HoldBackup(HoldBackup),
    /// Go on at another pace with the operation named in [`Order::operation`].
    ChangePace(ChangePace),
    /// Stop the operation named in [`Order::operation`].
    Cancel,
}

/// Something said to the coordinator.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// How an order goes.
    Update(Box<OrderUpdate>),
    /// A standby's backup needs the primary to switch WAL past this LSN.
    SwitchWalAsked {
        /// WAL up to here must become archived.
        lsn: u64,
    },
}

impl Told {
    /// An order that ended badly.
    pub fn failed(operation: &str, error: impl Into<String>) -> Self {
        OrderUpdate {
            operation: operation.to_owned(),
            state: OrderState::Failed.into(),
            error: error.into(),
            ..OrderUpdate::default()
        }
        .into()
    }
}

impl From<OrderUpdate> for Told {
    fn from(update: OrderUpdate) -> Self {
        Self::Update(Box::new(update))
    }
}

/// Which operations were handed on already, and which of them have no end yet that was told.
#[derive(Debug, Default)]
pub struct Seen {
    operations: VecDeque<String>,
    in_hand: BTreeSet<String>,
}

impl Seen {
    /// The order for whoever executes; `None` when it was handed on before or says nothing. Orders to cancel or to
    /// change the pace, and questions about a held backup, pass always.
    pub fn admit(&mut self, order: WireOrder) -> Option<Order> {
        let what = match order.what? {
            order::What::Cancel(cancel) => return Some(Order { operation: cancel.operation, what: What::Cancel }),
            // Asking twice does nothing twice.
            order::What::HoldBackup(hold) => {
                return Some(Order { operation: order.operation, what: What::HoldBackup(hold) });
            }
            // The last word counts.
            order::What::ChangePace(pace) => {
                return Some(Order { operation: order.operation, what: What::ChangePace(pace) });
            }
            order::What::TakeBackup(backup) => What::TakeBackup(backup),
            order::What::ComparePages(wanted) => What::ComparePages(wanted),
            order::What::SwitchWal(switch) => What::SwitchWal { past_lsn: switch.past_lsn },
        };
        if self.operations.contains(&order.operation) {
            return None;
        }
        if self.operations.len() == REMEMBERED {
            self.operations.pop_front();
        }
        self.operations.push_back(order.operation.clone());
        self.in_hand.insert(order.operation.clone());
        Some(Order { operation: order.operation, what })
    }

    /// Takes note of what was told: an operation whose end the coordinator heard is out of our hands.
    pub fn told(&mut self, told: &Told) {
        if let Told::Update(update) = told
            && matches!(update.state(), OrderState::Done | OrderState::Failed)
        {
            self.in_hand.remove(&update.operation);
        }
    }

    /// Operations handed on and not told to have ended, whether a session was there all the time or not.
    pub fn in_hand(&self) -> impl Iterator<Item = &String> {
        self.in_hand.iter()
    }
}

#[cfg(test)]
mod tests {
    use proto::fleet::{Cancel, SwitchWal};

    use super::*;

    fn switch(operation: &str) -> WireOrder {
        let what = Some(order::What::SwitchWal(SwitchWal { past_lsn: 7 }));
        WireOrder { operation: operation.to_owned(), what }
    }

    #[test]
    fn an_operation_is_handed_on_once_and_cancelling_always() {
        let mut seen = Seen::default();
        assert_eq!(seen.admit(switch("a")).unwrap().what, What::SwitchWal { past_lsn: 7 });
        assert_eq!(seen.admit(switch("a")), None);
        assert!(seen.admit(switch("b")).is_some());
        let cancel = || WireOrder {
            operation: "x".to_owned(),
            what: Some(order::What::Cancel(Cancel { operation: "a".to_owned() })),
        };
        for _ in 0..2 {
            assert_eq!(seen.admit(cancel()).unwrap(), Order { operation: "a".to_owned(), what: What::Cancel });
        }
        assert_eq!(seen.admit(WireOrder { operation: "c".to_owned(), what: None }), None);
        for number in 0..1_000 {
            assert!(seen.admit(switch(&number.to_string())).is_some());
        }
        assert_eq!(seen.operations.len(), REMEMBERED);
    }

    #[test]
    fn an_operation_is_in_hand_until_its_end_was_told() {
        let mut seen = Seen::default();
        seen.admit(switch("a")).unwrap();
        seen.admit(switch("b")).unwrap();
        let running =
            OrderUpdate { operation: "a".to_owned(), state: OrderState::Running.into(), ..Default::default() };
        seen.told(&running.into());
        seen.told(&Told::SwitchWalAsked { lsn: 7 });
        assert_eq!(seen.in_hand().collect::<Vec<_>>(), ["a", "b"]);
        seen.told(&Told::failed("a", "for a test"));
        assert_eq!(seen.in_hand().collect::<Vec<_>>(), ["b"]);
    }
}
