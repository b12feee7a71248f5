//! What can be wrong with a manifest.

/// What is wrong with a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestDamage {
    /// It does not begin as manifests do.
    #[error("it does not begin with PGCVMAN1")]
    Magic,
    /// It is not the one that was published.
    #[error("it does not match the size and SHA-256 in the root")]
    Digest,
    /// It does not decompress.
    #[error("it cannot be decompressed after line {line}: {reason}")]
    Compression {
        /// Number of the last whole line, from 1.
        line: u64,
        /// What the decompressor said.
        reason: String,
    },
    /// A line is longer than [`super::LINE_LIMIT_BYTES`], or is not one.
    #[error("line {line} cannot be read: {reason}")]
    Line {
        /// Its number, from 1.
        line: u64,
        /// What the JSON reader said.
        reason: String,
    },
    /// Lines are missing or out of order.
    #[error("line {line} is out of order: {reason}")]
    Order {
        /// Its number, from 1.
        line: u64,
        /// What was expected.
        reason: &'static str,
    },
    /// The last line counts something else than what came.
    #[error("it does not have as many lines and bytes as its last line says")]
    Counts,
    /// A file's content is not described.
    #[error("file {path} has no content from byte {at}")]
    Extents {
        /// Which file.
        path: String,
        /// From which byte.
        at: u64,
    },
    /// A file's layers contradict each other or the rest of the manifest.
    #[error("file {path} has {what}")]
    Layers {
        /// Which file.
        path: String,
        /// What it has.
        what: &'static str,
    },
    /// A file's content is said to lie where no listed pack is.
    #[error("file {path} refers to bytes {from} to {to} of pack {pack}, which is not listed with that size")]
    Unlisted {
        /// Which file.
        path: String,
        /// The pack's number, and its backup if it is not this one.
        pack: String,
        /// First byte in the pack.
        from: u64,
        /// The byte after the last one.
        to: u64,
    },
    /// The head says something that lines contradict.
    #[error("line {line} refers to {what}")]
    Reference {
        /// Its number, from 1.
        line: u64,
        /// To what.
        what: &'static str,
    },
    /// A newer version wrote it.
    #[error("{what} is not understood: a newer pgconvoy is needed")]
    Newer {
        /// What is new.
        what: String,
    },
}
