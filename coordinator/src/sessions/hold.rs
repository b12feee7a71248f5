//! For how long a node's name is kept for the agent that had it last. Pure.
//!
//! An agent loses its session now and then, and all of them do when the coordinator is restarted. Were the name free at once,
//! chance would decide between it and the agent of a cloned host. So the name is kept for [`HOLD`] after the session ended,
//! and after the coordinator's start for whoever the catalog says had it before; whoever comes with another spool gets in by
//! itself when that is over. A catalog that was deleted remembers nobody, and then the first one that comes gets the name.

use std::time::Duration;

use process::clock::Monotonic;

/// How long a name is kept for an agent without a session. Agents try again every 5 s at the latest.
pub const HOLD: Duration = Duration::from_secs(60);

/// Whoever had a node's name last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Holder {
    /// Identity of its spool.
    pub instance: String,
    /// Where it says that its data directory is.
    pub data_directory: String,
    /// Since when it has no session; absent while it has one.
    pub away_since: Option<Monotonic>,
}

/// What the name's holder means to an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// The name is its own, or free.
    Free,
    /// Another agent is connected under it.
    Connected,
    /// It is kept for another agent for so long.
    Kept(Duration),
}

impl Holder {
    /// How an agent stands that comes under the name.
    pub(super) fn standing_of(&self, instance: &str, hold: Duration, now: Monotonic) -> Standing {
        match self.away_since {
            _ if self.instance == instance => Standing::Free,
            None => Standing::Connected,
            Some(since) => match hold.checked_sub(now.since(since)) {
                None | Some(Duration::ZERO) => Standing::Free,
                Some(left) => Standing::Kept(left),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_kept_for_a_while_and_free_afterwards() {
        let began = Monotonic::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let away = |away_since| Holder { instance: "i1".to_owned(), data_directory: String::new(), away_since };
        assert_eq!(away(None).standing_of("i1", HOLD, at(0)), Standing::Free);
        assert_eq!(away(None).standing_of("i2", HOLD, at(900)), Standing::Connected);
        let gone = away(Some(at(10)));
        assert_eq!(gone.standing_of("i1", HOLD, at(10)), Standing::Free);
        assert_eq!(gone.standing_of("i2", HOLD, at(10)), Standing::Kept(HOLD));
        assert_eq!(gone.standing_of("i2", HOLD, at(69)), Standing::Kept(Duration::from_secs(1)));
        assert_eq!(gone.standing_of("i2", HOLD, at(70)), Standing::Free);
    }
}
