//! What a backup was built on, and how it was found what had changed.
//!
//! These are facts for people and for the next plan. A restore never needs them: every manifest lists all layers of
//! every file, so that a backup of any type is restored alone and outlives what it was built on.

use serde::{Deserialize, Serialize};

use crate::name::BackupId;

/// How much a backup read and stored anew. All three are restored alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupType {
    /// Every file was read and stored.
    #[default]
    Full,
    /// What changed since the newest fit full backup was stored.
    Diff,
    /// What changed since the newest fit backup was stored.
    Incr,
}

impl BackupType {
    /// As it stands in objects, options and reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Diff => "diff",
            Self::Incr => "incr",
        }
    }
}

impl std::fmt::Display for BackupType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// How it was found what had changed since the parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeMethod {
    /// Maps of the blocks that WAL touched, made when it was archived.
    ChangeMaps,
    /// PostgreSQL's own WAL summaries, from version 17 on.
    WalSummaries,
    /// Every page was read and the LSN in it compared.
    PageLsn,
    /// It was not found: every file was copied.
    FullCopy,
}

/// How it was found what had changed, and why in this way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeSource {
    /// The way that was taken.
    pub method: ChangeMethod,
    /// Why none that comes before it could be.
    pub reason: String,
}

/// What a backup is, what it was built on, and why in this way: one line for people.
pub fn describe(backup_type: BackupType, parent: Option<BackupId>, changes: Option<&ChangeSource>) -> String {
    let mut text = backup_type.to_string();
    if let Some(parent) = parent {
        text.push_str(&format!(" on {parent}"));
    }
    let Some(ChangeSource { method, reason }) = changes else { return text };
    let way = match (parent, method) {
        (None, _) | (_, ChangeMethod::ChangeMaps) => "",
        (_, ChangeMethod::WalSummaries) => "by WAL summaries, because ",
        (_, ChangeMethod::PageLsn) => "by page LSN, because ",
        (_, ChangeMethod::FullCopy) => "all copied, because ",
    };
    format!("{text}: {way}{reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_backup_is_stands_in_one_line() {
        let parent: BackupId = "20261123T010203Z-00000001".parse().unwrap();
        let check = |kind, parent, changes: Option<(ChangeMethod, &str)>, expected: &str| {
            let changes = changes.map(|(method, reason)| ChangeSource { method, reason: reason.to_owned() });
            assert_eq!(describe(kind, parent, changes.as_ref()), expected);
        };
        let maps = "4 WAL segments from 0/28 to 0/3000028 tell every change";
        check(
            BackupType::Incr,
            Some(parent),
            Some((ChangeMethod::ChangeMaps, maps)),
            "incr on 20261123T010203Z-00000001: 4 WAL segments from 0/28 to 0/3000028 tell every change",
        );
        check(
            BackupType::Diff,
            Some(parent),
            Some((ChangeMethod::PageLsn, "WAL is missing")),
            "diff on 20261123T010203Z-00000001: by page LSN, because WAL is missing",
        );
        check(BackupType::Full, None, Some((ChangeMethod::FullCopy, "it was asked for")), "full: it was asked for");
        check(BackupType::Full, None, None, "full");
    }

    #[test]
    fn names_are_written_as_they_are_read() {
        for kind in [BackupType::Full, BackupType::Diff, BackupType::Incr] {
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("{:?}", kind.as_str()));
        }
        let source = ChangeSource { method: ChangeMethod::PageLsn, reason: "WAL is missing".to_owned() };
        let text = r#"{"method":"page_lsn","reason":"WAL is missing"}"#;
        assert_eq!(serde_json::to_string(&source).unwrap(), text);
        assert_eq!(serde_json::from_str::<ChangeSource>(text).unwrap(), source);
    }
}
