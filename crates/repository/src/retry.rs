//! How long to wait between attempts. The only file that knows the `backoff` crate.
//!
//! Pure arithmetic and chance: the loop, the question whether an error deserves another attempt, deadlines and stop
//! signals belong to whoever waits. An iterator never ends; take as many delays as there are further attempts.
//!
//! Decision: `backoff` computes the delays and nothing else, because it is given to the project but no longer
//! maintained. Replacing it means replacing the body of [`delays`]; its tests state the contract.

use std::time::Duration;

use backoff::backoff::Backoff;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};

/// Growing delays with chance in them, so that many waiters do not come back at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The middle of the first delay; at least a millisecond counts.
    pub first: Duration,
    /// The middle of the longest delay; at least `first` counts.
    pub longest: Duration,
}

impl RetryPolicy {
    /// How much the middle grows from delay to delay.
    pub const GROWTH: f64 = 2.0;
    /// Each delay lies within this share of its middle.
    pub const SPREAD: f64 = 0.3;

    /// Quick attempts of one operation, for faults that pass in a moment: 100 ms, 200 ms, … 1 s.
    pub const QUICK: Self = Self { first: Duration::from_millis(100), longest: Duration::from_secs(1) };

    /// Waiting for something that is away to come back: 500 ms, 1 s, … 30 s.
    pub const PATIENT: Self = Self { first: Duration::from_millis(500), longest: Duration::from_secs(30) };
}

/// The delays of a policy, one after the other, without end.
pub fn delays(policy: RetryPolicy) -> impl Iterator<Item = Duration> + Send {
    let first = policy.first.max(Duration::from_millis(1));
    let mut backoff: ExponentialBackoff = ExponentialBackoffBuilder::new()
        .with_initial_interval(first)
        .with_max_interval(policy.longest.max(first))
        .with_multiplier(RetryPolicy::GROWTH)
        .with_randomization_factor(RetryPolicy::SPREAD)
        .with_max_elapsed_time(None)
        .build();
    std::iter::from_fn(move || backoff.next_backoff())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn delays_grow_to_the_longest_within_their_spread(first_ms in 0u64..2_000, longest_ms in 0u64..60_000) {
            let policy =
                RetryPolicy { first: Duration::from_millis(first_ms), longest: Duration::from_millis(longest_ms) };
            let longest = longest_ms.max(first_ms).max(1) as f64 / 1000.0;
            let mut middle = first_ms.max(1) as f64 / 1000.0;
            for delay in delays(policy).take(30) {
                let delay = delay.as_secs_f64();
                let slack = 1e-6;
                prop_assert!(delay >= middle * (1.0 - RetryPolicy::SPREAD) - slack, "{delay} under {middle}");
                prop_assert!(delay <= middle * (1.0 + RetryPolicy::SPREAD) + slack, "{delay} over {middle}");
                middle = (middle * RetryPolicy::GROWTH).min(longest);
            }
        }
    }

    #[test]
    fn two_waiters_do_not_wait_alike() {
        let some: Vec<_> = delays(RetryPolicy::PATIENT).take(8).collect();
        let others: Vec<_> = delays(RetryPolicy::PATIENT).take(8).collect();
        assert_ne!(some, others);
    }
}
