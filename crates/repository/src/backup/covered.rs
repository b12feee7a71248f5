//! PURE: ranges of a file that newer layers hold. A manifest that drops what cannot show asks here, and a restore that
//! writes only what shows.

/// How a range lies to those that are covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cover {
    /// None of it is covered.
    None,
    /// Some of it is.
    Part,
    /// All of it is.
    Whole,
}

/// Ranges of bytes, in order and apart from each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Covered(Vec<(u64, u64)>);

impl Covered {
    /// How much of a range that is not empty is covered.
    pub fn cover(&self, from: u64, to: u64) -> Cover {
        let behind = self.0.partition_point(|range| range.1 <= from);
        match self.0.get(behind) {
            Some(range) if range.0 <= from && to <= range.1 => Cover::Whole,
            Some(range) if range.0 < to => Cover::Part,
            _ => Cover::None,
        }
    }

    /// Covers more ranges, which may be in any order and overlap.
    pub fn add(&mut self, ranges: &[(u64, u64)]) {
        if ranges.is_empty() {
            return;
        }
        let mut all = std::mem::take(&mut self.0);
        all.extend_from_slice(ranges);
        all.sort_unstable();
        for (from, to) in all {
            match self.0.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(to),
                _ => self.0.push((from, to)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_and_found() {
        let mut covered = Covered::default();
        assert_eq!(covered.cover(0, 1), Cover::None);
        covered.add(&[(20, 30), (0, 10)]);
        covered.add(&[(30, 40), (5, 12), (50, 60)]);
        assert_eq!(covered.0, [(0, 12), (20, 40), (50, 60)]);
        let check = |from, to, expected| assert_eq!(covered.cover(from, to), expected, "{from} to {to}");
        check(0, 12, Cover::Whole);
        check(25, 35, Cover::Whole);
        check(12, 20, Cover::None);
        check(11, 13, Cover::Part);
        check(13, 21, Cover::Part);
        check(20, 60, Cover::Part);
        check(60, 70, Cover::None);
    }
}
