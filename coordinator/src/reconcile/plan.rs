//! What to list. Pure.

use postgres_format::{SegmentName, SegmentSize, SystemIdentifier, Timeline, WalFileName};
use repository::key;
use repository::name::ClusterName;

/// How much of a cluster is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The newest part of the newest timelines, and whatever is beyond them.
    Newest,
    /// Everything.
    Everything,
}

/// Segments below the newest one that are listed again, because files are sent in parallel and arrive out of order.
pub const MARGIN_SEGMENTS: u64 = 256;
/// Timelines of which the newest part is listed.
pub const TIMELINES_MAX: usize = 8;

/// Sorts after every name that begins as what stands before it.
pub const END: &str = "~";

/// A part of the keys: those with the prefix, after a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// What keys start with.
    pub prefix: String,
    /// Only keys after this one.
    pub after: Option<String>,
    /// Whether history files lie there, or all others.
    pub histories: bool,
    /// What lies there has names from this one on, as text, and before the other.
    pub names: (String, String),
}

/// The windows to list for one system, given the newest known segment of each timeline, oldest timeline first.
pub fn windows(
    cluster: &ClusterName,
    system: SystemIdentifier,
    newest: &[(Timeline, WalFileName)],
    size: Option<SegmentSize>,
    scope: Scope,
) -> Vec<Window> {
    let everything = || (String::new(), END.to_owned());
    let histories =
        Window { prefix: key::history_prefix(cluster, system), after: None, histories: true, names: everything() };
    let all = key::wal_prefix(cluster, system);
    let (Scope::Newest, Some(size), Some((highest, _))) = (scope, size, newest.last()) else {
        return vec![histories, Window { prefix: all, after: None, histories: false, names: everything() }];
    };
    let mut windows = vec![histories];
    let recent = newest.len().saturating_sub(TIMELINES_MAX);
    for (timeline, name) in &newest[recent..] {
        let prefix = key::wal_timeline_prefix(cluster, system, *timeline);
        let margin = margin(*name, size);
        let after = margin.map(|name| key::wal_name_prefix(cluster, system, &name));
        let from = margin.map_or_else(|| timeline.to_hex(), |name| name.to_string());
        let names = (from, format!("{}{END}", timeline.to_hex()));
        windows.push(Window { prefix, after, histories: false, names });
    }
    let beyond = key::skip(&key::wal_timeline_prefix(cluster, system, *highest));
    let names = (format!("{}{END}", highest.to_hex()), END.to_owned());
    windows.push(Window { prefix: all, after: Some(beyond), histories: false, names });
    windows
}

/// The name a margin below another one; none when the timeline is younger than the margin.
fn margin(name: WalFileName, size: SegmentSize) -> Option<WalFileName> {
    let segment = name.segment()?;
    let number = segment.number(size).ok()?.as_u64().checked_sub(MARGIN_SEGMENTS)?;
    let number = postgres_format::SegmentNumber::new(number);
    Some(WalFileName::Segment(SegmentName::new(segment.timeline(), number, size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(newest: &[&str], scope: Scope) -> Vec<(String, Option<String>)> {
        let newest: Vec<(Timeline, WalFileName)> = newest
            .iter()
            .map(|text| {
                let name: WalFileName = text.parse().unwrap();
                (name.timeline(), name)
            })
            .collect();
        let (cluster, system) = ("main".parse().unwrap(), SystemIdentifier::new(7));
        let windows = windows(&cluster, system, &newest, Some(SegmentSize::DEFAULT), scope);
        windows.into_iter().map(|window| (window.prefix, window.after)).collect()
    }

    #[test]
    fn the_newest_part_of_each_timeline_and_what_is_beyond() {
        let some = |text: &str| Some(text.to_owned());
        let found = lines(&["000000010000000300000010", "000000020000000000000005"], Scope::Newest);
        assert_eq!(
            found,
            [
                ("c/main/7/history/".to_owned(), None),
                ("c/main/7/wal/00000001/".to_owned(), some("c/main/7/wal/00000001/00000002/000000010000000200000010.")),
                ("c/main/7/wal/00000002/".to_owned(), None),
                ("c/main/7/wal/".to_owned(), some("c/main/7/wal/00000002/~")),
            ]
        );
    }

    #[test]
    fn without_knowledge_everything_is_listed() {
        let everything = [("c/main/7/history/".to_owned(), None), ("c/main/7/wal/".to_owned(), None)];
        assert_eq!(lines(&[], Scope::Newest), everything);
        assert_eq!(lines(&["000000010000000300000010"], Scope::Everything), everything);
    }
}
