//! A cluster too large to measure here, reckoned from what was measured on a small one: bytes sent a day and bytes kept, by
//! layers that are re-based file by file, and by weekly full backups with daily increments.
//!
//! Every relation file stands for all: pages change at random, and the ages of files' bases are spread evenly. Bytes stored
//! for a byte of pages come from the measures, so that each tool is reckoned with the amplification it really has.

/// Bytes of the cluster.
const CLUSTER_BYTES: f64 = 10e12;
/// Share of its pages that change in a day.
pub const CHANGED_A_DAY: f64 = 0.01;
/// Days that backups are kept, one a day.
const KEPT_DAYS: f64 = 30.0;
/// A file is sent whole when it has more layers than this; at this rate of change that comes before the rule of bytes.
const LAYERS_MAX: f64 = 32.0;
/// Days between the peer's full backups.
const FULL_EVERY_DAYS: f64 = 7.0;

/// Bytes stored for a byte of pages.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Of a full backup.
    pub full: f64,
    /// Of pages that changed, when [`CHANGED_A_DAY`] of them did.
    pub changed: f64,
}

/// What comes of it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reckoned {
    /// Sent on an average day.
    pub sent_a_day: f64,
    /// Held in the repository.
    pub held: f64,
}

impl Measured {
    fn base_bytes(self) -> f64 {
        CLUSTER_BYTES * self.full
    }

    fn increment_bytes(self) -> f64 {
        CLUSTER_BYTES * CHANGED_A_DAY * self.changed
    }

    /// No backup is full: each day a few files are sent whole, of the others what changed.
    pub fn layered(self) -> Reckoned {
        let (base, layer) = (self.base_bytes(), self.increment_bytes());
        let cycle = LAYERS_MAX + 1.0;
        // Files whose oldest kept backup still refers to the base before: that base and all its layers are held too.
        let on_two_bases = ((KEPT_DAYS - 1.0) / cycle).min(1.0);
        Reckoned {
            sent_a_day: (base + layer * LAYERS_MAX) / cycle,
            held: base * (1.0 + on_two_bases) + layer * LAYERS_MAX * (0.5 + on_two_bases),
        }
    }

    /// A full backup every week; a week's increments are held until the last of them is too old.
    pub fn weekly_full(self) -> Reckoned {
        let sent_a_day = (self.base_bytes() + self.increment_bytes() * (FULL_EVERY_DAYS - 1.0)) / FULL_EVERY_DAYS;
        let oldest_held_days = KEPT_DAYS + FULL_EVERY_DAYS / 2.0;
        Reckoned { sent_a_day, held: sent_a_day * oldest_held_days }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_compression_and_amplification_the_cluster_is_held_about_twice() {
        let raw = Measured { full: 1.0, changed: 1.0 };
        let reckoned = raw.layered();
        assert!((0.39e12..0.41e12).contains(&reckoned.sent_a_day), "{reckoned:?}");
        assert!((22e12..25e12).contains(&reckoned.held), "{reckoned:?}");
        let weekly = Measured { full: 1.0, changed: 10.5 }.weekly_full();
        assert!((2.3e12..2.4e12).contains(&weekly.sent_a_day), "{weekly:?}");
        assert!(weekly.held > 3.0 * reckoned.held);
    }
}
