//! Reading configuration files: TOML, unknown keys refused, and every error shows file, line and a caret.
//!
//! The types read here should carry `#[serde(deny_unknown_fields)]`; this room adds the path and, for a misspelt key
//! or value, the nearest one that would be accepted. Nothing is read from the environment.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;

/// Largest configuration file read, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration file was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read configuration file {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is larger than [`CONFIG_BYTES_MAX`].
    #[error("configuration file {} is larger than {CONFIG_BYTES_MAX} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not what was expected.
    #[error("configuration file {}: {detail}{}", path.display(), hint.as_deref().map(|h| format!("\n{h}")).unwrap_or_default())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, column, the line itself with a caret, and what is wrong.
        detail: String,
        /// What was probably meant.
        hint: Option<String>,
    },
}

impl ConfigError {
    /// An error found after parsing, about the file as a whole.
    pub fn invalid(path: &Path, detail: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_owned(), detail: detail.into(), hint: None }
    }

    /// Whether the file does not exist.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Unreadable { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Reads a configuration file.
///
/// # Errors
/// See [`ConfigError`]; each message names the file.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path).and_then(|file| file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)).map_err(unreadable)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    parse(path, &text)
}

/// Reads configuration text; `path` only names it in errors.
///
/// # Errors
/// [`ConfigError::Invalid`].
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| ConfigError::Invalid {
        path: path.to_owned(),
        detail: error.to_string().trim_end().to_owned(),
        hint: did_you_mean(error.message()),
    })
}

/// Serde writes ``unknown field `a`, expected `b` or `c` ``; the names in backquotes are taken from there.
fn did_you_mean(message: &str) -> Option<String> {
    if !message.starts_with("unknown field") && !message.starts_with("unknown variant") {
        return None;
    }
    let mut names = message.split('`').skip(1).step_by(2);
    let written = names.next()?;
    let (nearest, distance) = names.map(|name| (name, edits(written, name))).min_by_key(|(_, distance)| *distance)?;
    (distance <= 1 + written.chars().count() / 3).then(|| format!("did you mean `{nearest}`?"))
}

/// Levenshtein distance of two short words.
fn edits(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Span;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        listen: String,
        #[serde(default)]
        patience: Option<Span>,
    }

    fn refused(text: &str) -> String {
        parse::<Sample>(Path::new("/etc/sample.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_good_file_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.toml");
        std::fs::write(&path, "listen = \"127.0.0.1:1\"\npatience = \"5min\"\n").unwrap();
        let sample: Sample = load(&path).unwrap();
        assert_eq!(sample.listen, "127.0.0.1:1");
        assert_eq!(sample.patience, Some(Span::from_seconds(300)));
    }

    #[test]
    fn errors_show_file_line_caret_and_what_was_meant() {
        let text = refused("listen = \"x\"\npatiense = \"1s\"\n");
        for part in ["/etc/sample.toml", "line 2", "patiense = ", "^^^", "did you mean `patience`?"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let text = refused("listen = \"x\"\npatience = \"60\"\n");
        for part in ["line 2", "has no unit", "min"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!refused("listen = \"x\"\nzzzzzzzz = 1\n").contains("did you mean"));
    }

    #[test]
    fn a_missing_or_huge_file_is_named() {
        let error = load::<Sample>(Path::new("/nonexistent/x.toml")).unwrap_err();
        assert!(error.is_absent() && error.to_string().contains("/nonexistent/x.toml"));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("big.toml");
        std::fs::write(&path, " ".repeat(CONFIG_BYTES_MAX as usize + 1)).unwrap();
        assert!(matches!(load::<Sample>(&path), Err(ConfigError::TooLarge { .. })));
    }

    #[test]
    fn edits_counts_single_letters() {
        for (left, right, distance) in [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("ab", "ba", 2)]
        {
            assert_eq!(edits(left, right), distance);
        }
    }
}
