//! PURE: what a running server has of a page against what a backup holds of it, and whose fault a difference is.
//!
//! The server's checkpoint lies behind the end of the backup, so whatever was changed before the backup's start is on its
//! disk. Pages carry the LSN of their last change:
//!
//! ```text
//! server's page                    stored page
//! LSN not below the start          ─                      changed since; WAL tells, nothing to compare
//! never written, LSN 0             ─                      tells nothing: such pages change without WAL
//! wrong checksum                   ─                      the server's page is damaged
//! sound, LSN below the start       the same bytes         fine
//!                                  wrong checksum         what is stored was damaged when it was read
//!                                  a higher LSN           the server lost a write
//!                                  a lower LSN            the backup missed a change
//!                                  the same LSN           hint bits, as a rule: they may differ where they are not logged, and
//!                                                         from node to node
//! ```
//!
//! Two sound pages of one LSN are told of only where nothing else would show a flipped bit and hint bits cannot be the reason:
//! without checksums, with `wal_log_hints`, on the node that the page was read from.

use std::fmt::Write;

use jiff::Timestamp;
use postgres_format::Lsn;
use postgres_format::page::{self, Checksums, PageState};
use serde::{Deserialize, Serialize};

use super::finding::Share;
use crate::name::{BackupId, ClusterName, NodeName};
use crate::restore_plan::size;

/// Name and version of the JSON. Fields are added, never changed or removed.
pub const SOURCE_SCHEMA: &str = "pgconvoy.verify-source/v1";
/// Pages of one look that are told one by one; more are counted.
pub const PAGES_TOLD: usize = 100;
/// An LSN that no page reaches: then every page is judged by its checksum.
const NEVER: Lsn = Lsn::new(u64::MAX);

/// Whether the hint bits of a stored page must be those of the server's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hints {
    /// They were logged like any change, and both pages are of one node.
    Logged,
    /// They may differ.
    Free,
}

/// By what pages of one backup are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Where the backup starts.
    pub start: Lsn,
    /// Whether pages have checksums.
    pub checksums: Checksums,
    /// About hint bits.
    pub hints: Hints,
}

/// What a page of the server tells before it is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Changed since the backup's start.
    Changed,
    /// Empty, never logged, or not a whole page.
    Silent,
    /// To be compared.
    Settled {
        /// Its LSN, below the start.
        lsn: Lsn,
    },
    /// Wrong in itself.
    Wrong {
        /// Its LSN, as far as it can be believed.
        lsn: Lsn,
    },
}

/// What is wrong with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageFault {
    /// The server's page is damaged.
    ServerDamaged,
    /// The server has an older page than the backup: a write was lost.
    ServerOlder,
    /// What is stored is damaged, and was when it was read.
    StoredDamaged,
    /// What is stored is older than it must be: a change was missed.
    StoredOlder,
    /// Both are sound and of one LSN, and differ.
    Apart,
}

/// A page that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourcePage {
    /// The file, relative to the data directory.
    pub path: String,
    /// Number of the page within the file.
    pub block: u32,
    /// What is wrong.
    pub fault: PageFault,
    /// The LSN of the server's page.
    pub server_lsn: Lsn,
    /// The LSN of the stored page; absent if there is none, or it could not be read.
    pub stored_lsn: Option<Lsn>,
    /// The pack that the stored page lies in.
    pub object: Option<String>,
}

/// What came of comparing a node's pages with a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// [`SOURCE_SCHEMA`].
    pub schema: String,
    /// When it was begun.
    pub generated: Timestamp,
    /// Of which cluster.
    pub cluster: ClusterName,
    /// Whose pages.
    pub node: NodeName,
    /// With what they were compared.
    pub backup: BackupId,
    /// Which part of the files was read; absent if all.
    pub share: Option<Share>,
    /// Nothing is wrong in what was looked at.
    pub sound: bool,
    /// Bytes read on the node.
    pub bytes: u64,
    /// Pages that were compared with what is stored.
    pub compared: u64,
    /// Pages that were changed since the backup's start: only their checksums were verified.
    pub changed: u64,
    /// Files that were not compared, because what is stored of them is damaged in every store.
    pub left_out: u64,
    /// Pages that are wrong.
    pub wrong: u64,
    /// The first of them, at most [`PAGES_TOLD`].
    pub pages: Vec<SourcePage>,
}

/// What a page of the server tells of itself. `block` is its number within the relation.
pub fn look(server: &[u8], block: u32, rules: &Rules) -> Seen {
    let lsn = || page::lsn(server);
    match page::inspect(server, block, NEVER, rules.checksums) {
        PageState::Partial | PageState::New => Seen::Silent,
        PageState::Suspect(_) => Seen::Wrong { lsn: lsn() },
        PageState::Whole | PageState::Changed { .. } if lsn() >= rules.start => Seen::Changed,
        PageState::Whole | PageState::Changed { .. } if lsn() == Lsn::ZERO => Seen::Silent,
        PageState::Whole | PageState::Changed { .. } => Seen::Settled { lsn: lsn() },
    }
}

/// Whose fault it is that the server's page is another one than the stored one, if it is a fault at all. Gives the stored
/// page's LSN with it.
pub fn judge(server: &[u8], stored: Option<&[u8]>, block: u32, rules: &Rules) -> Option<(PageFault, Option<Lsn>)> {
    let stored_lsn = stored.filter(|stored| stored.len() >= 8).map(page::lsn);
    let lsn = match look(server, block, rules) {
        Seen::Changed | Seen::Silent => return None,
        Seen::Wrong { .. } => return Some((PageFault::ServerDamaged, stored_lsn)),
        Seen::Settled { lsn } => lsn,
    };
    let (stored, stored_lsn) = (stored?, stored_lsn?);
    let told = |fault| Some((fault, Some(stored_lsn)));
    match page::inspect(stored, block, NEVER, rules.checksums) {
        _ if stored == server => None,
        PageState::Suspect(_) | PageState::Partial => told(PageFault::StoredDamaged),
        _ if stored_lsn > lsn => told(PageFault::ServerOlder),
        _ if stored_lsn < lsn => told(PageFault::StoredOlder),
        _ if rules.hints == Hints::Logged && rules.checksums == Checksums::Off => told(PageFault::Apart),
        _ => None,
    }
}

impl SourcePage {
    /// What is wrong and what to do, in one line.
    pub fn line(&self, node: &NodeName, backup: &BackupId) -> String {
        let Self { path, block, server_lsn, .. } = self;
        let stored = self.stored_lsn.map_or("nothing readable".to_owned(), |lsn| format!("LSN {lsn}"));
        let place = format!("block {block} of {path} on node {node}");
        match self.fault {
            PageFault::ServerDamaged => format!(
                "{place} is damaged (LSN {server_lsn}); backup {backup} has {stored} of it: restore it, or fail over to a node \
                 that has it sound"
            ),
            PageFault::ServerOlder => format!(
                "{place} has LSN {server_lsn}, and backup {backup} a newer one with {stored}: the server lost a write; \
                 restore it, or fail over"
            ),
            PageFault::StoredDamaged => format!(
                "{place} is sound, and damaged in backup {backup} since it was read: take a backup with --type full"
            ),
            PageFault::StoredOlder => format!(
                "{place} has LSN {server_lsn}, and backup {backup} an older one with {stored}: a restore brings back an old \
                 page; take a backup with --type full"
            ),
            PageFault::Apart => format!(
                "{place} and backup {backup} differ, both with LSN {server_lsn}: one of them changed without a trace; take a \
                 backup with --type full and look into the table"
            ),
        }
    }
}

impl SourceReport {
    /// Adds up in one line.
    pub fn summary(&self) -> String {
        let pages = |count: u64| if count == 1 { "1 page".to_owned() } else { format!("{count} pages") };
        let verdict = match self.wrong {
            0 => "sound".to_owned(),
            1 => "1 PAGE IS WRONG".to_owned(),
            wrong => format!("{wrong} PAGES ARE WRONG"),
        };
        let left_out = match self.left_out {
            0 => String::new(),
            files => format!("; {files} files could not be compared, see pgconvoy verify"),
        };
        format!(
            "{verdict}: {} of node {} compared with backup {}, {} changed since{left_out}",
            pages(self.compared),
            self.node,
            self.backup,
            self.changed
        )
    }
}

/// The report as text.
pub fn render_source(report: &SourceReport) -> String {
    let share = report.share.map(|share| format!(", part {} of {}", share.part + 1, share.of)).unwrap_or_default();
    let mut text = format!("cluster {}: {}\n", report.cluster, report.summary());
    // Writing to a string cannot fail.
    let _ = writeln!(text, "  looked at   {} on node {}{share}", size(report.bytes), report.node);
    for page in &report.pages {
        let _ = writeln!(text, "  WRONG       {}", page.line(&report.node, &report.backup));
    }
    let more = report.wrong.saturating_sub(report.pages.len() as u64);
    if more > 0 {
        let _ = writeln!(text, "  and {more} more");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 8192;
    const START: u64 = 1000;

    fn rules() -> Rules {
        Rules { start: Lsn::new(START), checksums: Checksums::On, hints: Hints::Logged }
    }

    /// Block 3 as a server writes it.
    fn page(lsn: u32, content: u8) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        page[4..8].copy_from_slice(&lsn.to_le_bytes());
        page[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
        page[8000] = content;
        let checksum = page::checksum(&page, 3);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    fn flipped(mut page: Vec<u8>) -> Vec<u8> {
        page[8001] ^= 1;
        page
    }

    #[test]
    fn whose_fault_a_difference_is() {
        let fault = |server: &[u8], stored: &[u8]| judge(server, Some(stored), 3, &rules()).map(|(fault, _)| fault);
        let server = page(500, 1);
        assert_eq!(fault(&server, &server), None);
        assert_eq!(fault(&flipped(server.clone()), &server), Some(PageFault::ServerDamaged));
        assert_eq!(fault(&server, &flipped(server.clone())), Some(PageFault::StoredDamaged));
        assert_eq!(fault(&server, &server[..100]), Some(PageFault::StoredDamaged));
        assert_eq!(fault(&server, &page(400, 2)), Some(PageFault::StoredOlder));
        assert_eq!(fault(&server, &vec![0; PAGE]), Some(PageFault::StoredOlder));
        assert_eq!(fault(&server, &page(600, 2)), Some(PageFault::ServerOlder));
        assert_eq!(fault(&server, &page(START as u32 + 5, 2)), Some(PageFault::ServerOlder));
        assert_eq!(fault(&server, &page(500, 2)), None, "hint bits, where checksums exclude anything else");
        assert_eq!(fault(&page(0, 1), &page(0, 2)), None, "what was never logged tells nothing");
        assert_eq!(fault(&vec![0; PAGE], &server), None);
        assert_eq!(fault(&server[..4000], &server), None);
    }

    #[test]
    fn what_changed_since_the_start_is_judged_by_its_checksum_alone() {
        for lsn in [START as u32, START as u32 + 1] {
            let changed = page(lsn, 1);
            assert_eq!(look(&changed, 3, &rules()), Seen::Changed);
            assert_eq!(judge(&changed, Some(&page(10, 2)), 3, &rules()), None);
            let damaged = judge(&flipped(changed), None, 3, &rules());
            assert_eq!(damaged, Some((PageFault::ServerDamaged, None)));
        }
        assert_eq!(look(&page(999, 1), 3, &rules()), Seen::Settled { lsn: Lsn::new(999) });
        assert_eq!(look(&page(999, 1), 4, &rules()), Seen::Wrong { lsn: Lsn::new(999) }, "a page of another place");
    }

    #[test]
    fn without_checksums_equal_positions_tell_only_where_hints_are_logged() {
        let (server, stored) = (page(500, 1), page(500, 2));
        let with = |hints| Rules { checksums: Checksums::Off, hints, ..rules() };
        let fault = |hints| judge(&server, Some(&stored), 3, &with(hints)).map(|(fault, _)| fault);
        assert_eq!(fault(Hints::Logged), Some(PageFault::Apart));
        assert_eq!(fault(Hints::Free), None);
        let older = judge(&server, Some(&page(400, 1)), 3, &with(Hints::Free));
        assert_eq!(older, Some((PageFault::StoredOlder, Some(Lsn::new(400)))));
    }

    #[test]
    fn a_report_says_where_and_what_to_do() {
        let page = SourcePage {
            path: "base/5/16384".to_owned(),
            block: 3,
            fault: PageFault::StoredOlder,
            server_lsn: Lsn::new(0x500),
            stored_lsn: Some(Lsn::new(0x400)),
            object: Some("c/main/b/20261123T010203Z-00000001/p/000000".to_owned()),
        };
        let report = SourceReport {
            schema: SOURCE_SCHEMA.to_owned(),
            generated: "2026-11-23T05:00:00Z".parse().unwrap(),
            cluster: "main".parse().unwrap(),
            node: "db1".parse().unwrap(),
            backup: "20261123T010203Z-00000001".parse().unwrap(),
            share: Some(Share { part: 0, of: 30 }),
            sound: false,
            bytes: 81_920,
            compared: 9,
            changed: 1,
            left_out: 0,
            wrong: 3,
            pages: vec![page],
        };
        insta::assert_snapshot!(render_source(&report));
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<SourceReport>(&json).unwrap(), report);
    }
}
