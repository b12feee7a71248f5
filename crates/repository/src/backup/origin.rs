//! What a backup was built on, and how it was found what had changed.
//!
//! These are facts for people and for the next plan. A restore never needs them: every manifest lists all layers of
//! every file, so that a backup of any type is restored alone and outlives what it was built on.

use serde::{Deserialize, Serialize};

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

#[cfg(test)]
mod tests {
    use super::*;

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
