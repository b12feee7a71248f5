//! Bytes that are nearly always text, such as paths and labels: text in JSON when they are UTF-8, hex when not.
//!
//! ```text
//! "base/1/1249"            {"hex":"62617365fe"}
//! ```

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// Bytes of any content. [`fmt::Display`] shows what is not UTF-8 as replacement characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteText(Vec<u8>);

impl ByteText {
    /// Takes bytes of any content.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for ByteText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for ByteText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(&self.0), f)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Spelled<'a> {
    Text(std::borrow::Cow<'a, str>),
    Hex { hex: String },
}

impl Serialize for ByteText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => Spelled::Text(text.into()).serialize(serializer),
            Err(_) => Spelled::Hex { hex: crate::digest::to_hex(&self.0) }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for ByteText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Spelled::deserialize(deserializer)? {
            Spelled::Text(text) => Ok(Self(text.into_owned().into_bytes())),
            Spelled::Hex { hex } => {
                let bytes = crate::digest::from_hex(&hex);
                bytes.map(Self).ok_or_else(|| D::Error::custom("expected lower-case hexadecimal digits"))
            }
        }
    }
}

/// The path of a file below the data directory: components joined by `/`, none of them empty, `.` or `..`.
///
/// A manifest cannot name anything outside of the directory it is restored into.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "ByteText", into = "ByteText")]
pub struct RelativePath(ByteText);

/// The bytes are no path below a data directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path} is not a path below a data directory: expected components without `.` and `..`, joined by /")]
pub struct RelativePathError {
    /// What was given, made printable.
    pub path: String,
}

impl RelativePath {
    /// Longest path, in bytes; what Linux takes.
    pub const LIMIT_BYTES: usize = 4095;

    /// Checks bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, RelativePathError> {
        let bytes = bytes.into();
        let component = |component: &[u8]| !component.is_empty() && component != b"." && component != b"..";
        let well_formed =
            bytes.len() <= Self::LIMIT_BYTES && !bytes.contains(&0) && bytes.split(|byte| *byte == b'/').all(component);
        match well_formed {
            true => Ok(Self(ByteText(bytes))),
            false => {
                let path = String::from_utf8_lossy(&bytes).chars().take(200).collect();
                Err(RelativePathError { path })
            }
        }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// As the system's path.
    pub fn as_path(&self) -> &std::path::Path {
        use std::os::unix::ffi::OsStrExt;
        std::path::Path::new(std::ffi::OsStr::from_bytes(self.as_bytes()))
    }
}

impl TryFrom<ByteText> for RelativePath {
    type Error = RelativePathError;

    fn try_from(bytes: ByteText) -> Result<Self, RelativePathError> {
        Self::new(bytes.0)
    }
}

impl From<RelativePath> for ByteText {
    fn from(path: RelativePath) -> Self {
        path.0
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_json() {
        let check = |bytes: &[u8], json: &str| {
            let text = ByteText::new(bytes);
            assert_eq!(serde_json::to_string(&text).unwrap(), json);
            assert_eq!(serde_json::from_str::<ByteText>(json).unwrap(), text);
        };
        check(b"base/1/1249", r#""base/1/1249""#);
        check(b"", r#""""#);
        check(b"a\nb", r#""a\nb""#);
        check(b"\xfe", r#"{"hex":"fe"}"#);
    }

    #[test]
    fn paths_stay_below() {
        for good in [&b"PG_VERSION"[..], b"base/1/2", b"pg_tblspc/16385/PG_15_202209061", b"\xff", b"...", b"a..b"] {
            assert_eq!(RelativePath::new(good).unwrap().as_bytes(), good);
        }
        for bad in [&b""[..], b"/etc", b"a//b", b"a/", b"../a", b"a/../b", b"./a", b"a/.", b"a\0b", &[b'a'; 5000]] {
            assert!(RelativePath::new(bad).is_err(), "{bad:?}");
        }
        assert!(serde_json::from_str::<RelativePath>(r#""../etc/passwd""#).is_err());
    }
}
