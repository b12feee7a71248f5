//! One line of the table, and how several rounds become one number.

use std::fmt;

/// How many decimals a number is shown with.
const DECIMALS: usize = 3;

/// What a measure promises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// Ours over the peer's is at most this.
    RatioAtMost(f64),
    /// Ours over the peer's is at least this.
    RatioAtLeast(f64),
    /// Ours is at most this, in the measure's unit.
    AtMost(f64),
    /// Nothing; for information.
    None,
}

/// One line.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// What was measured, with its unit last.
    pub measure: String,
    /// Ours.
    pub ours: f64,
    /// The peer's, when there is one.
    pub peer: Option<f64>,
    /// What is promised.
    pub bound: Bound,
}

impl Figure {
    /// A line comparing with a peer.
    pub fn against(measure: impl Into<String>, ours: f64, peer: f64, bound: Bound) -> Self {
        Self { measure: measure.into(), ours, peer: Some(peer), bound }
    }

    /// A line without a peer.
    pub fn alone(measure: impl Into<String>, ours: f64, bound: Bound) -> Self {
        Self { measure: measure.into(), ours, peer: None, bound }
    }

    fn ratio(&self) -> Option<f64> {
        self.peer.map(|peer| self.ours / peer)
    }

    /// Whether the promise was kept; `None` when nothing is promised.
    pub fn verdict(&self) -> Option<bool> {
        match (self.bound, self.ratio()) {
            (Bound::RatioAtMost(bound), Some(ratio)) => Some(ratio <= bound),
            (Bound::RatioAtLeast(bound), Some(ratio)) => Some(ratio >= bound),
            (Bound::RatioAtMost(_) | Bound::RatioAtLeast(_), None) => Some(false),
            (Bound::AtMost(bound), _) => Some(self.ours <= bound),
            (Bound::None, _) => None,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RatioAtMost(bound) => write!(out, "ratio<={bound}"),
            Self::RatioAtLeast(bound) => write!(out, "ratio>={bound}"),
            Self::AtMost(bound) => write!(out, "ours<={bound}"),
            Self::None => out.write_str("-"),
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.DECIMALS$}"));
        let verdict = match self.verdict() {
            Some(true) => "ok",
            Some(false) => "missed",
            None => "info",
        };
        let (ours, peer, ratio) = (number(Some(self.ours)), number(self.peer), number(self.ratio()));
        write!(out, "{}\t{ours}\t{peer}\t{ratio}\t{}\t{verdict}", self.measure, self.bound)
    }
}

/// The median; the lower middle of an even number, not-a-number of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// The largest; not-a-number of none.
pub fn largest(values: &[f64]) -> f64 {
    values.iter().copied().max_by(f64::total_cmp).unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_was_promised_and_kept() {
        let check = |figure: Figure, expected: &str| assert_eq!(figure.to_string(), expected);
        check(
            Figure::against("call ms", 1.5, 1.0, Bound::RatioAtMost(1.6)),
            "call ms\t1.500\t1.000\t1.500\tratio<=1.6\tok",
        );
        check(
            Figure::against("segments/s", 1.0, 1.0, Bound::RatioAtLeast(1.4)),
            "segments/s\t1.000\t1.000\t1.000\tratio>=1.4\tmissed",
        );
        check(Figure::alone("peak MiB", 65.0, Bound::AtMost(64.0)), "peak MiB\t65.000\t-\t-\tours<=64\tmissed");
        check(Figure::alone("peak MiB", 65.0, Bound::None), "peak MiB\t65.000\t-\t-\t-\tinfo");
    }

    #[test]
    fn a_missing_number_keeps_no_promise() {
        assert_eq!(Figure::against("x", f64::NAN, 1.0, Bound::RatioAtMost(2.0)).verdict(), Some(false));
        assert_eq!(Figure::alone("x", median(&[]), Bound::AtMost(2.0)).verdict(), Some(false));
    }

    #[test]
    fn medians_are_values_that_were_seen() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.0);
        assert_eq!(largest(&[1.0, 3.0, 2.0]), 3.0);
    }
}
