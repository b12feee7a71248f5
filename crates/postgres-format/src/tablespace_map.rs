//! `tablespace_map`: which links in `pg_tblspc` the server makes when it starts from a base backup.
//!
//! One line per tablespace, `OID path`; a line feed, carriage return or backslash within the path has a backslash before it
//! (`do_pg_backup_start` in `xlog.c`, `read_tablespace_map` in `xlogrecovery.c`). A backup without tablespaces has no such file.

/// The longest map that is read: thousands of tablespaces.
pub const MAX_BYTES: usize = 1 << 20;

/// A tablespace and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceLink {
    /// The tablespace's object identifier, the name of the link in `pg_tblspc`.
    pub oid: u32,
    /// Where the link points, in the file system's own bytes.
    pub path: Vec<u8>,
}

/// Why a map is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Too long to be a map.
    #[error("tablespace_map has {bytes} bytes, more than any real one")]
    TooLong { bytes: usize },
    /// A line that is not `OID path`.
    #[error("line {line} of tablespace_map is not an object identifier, a space and a path")]
    Line { line: usize },
    /// A tablespace listed twice.
    #[error("tablespace_map lists tablespace {oid} twice")]
    Twice { oid: u32 },
}

/// Reads a map of at most [`MAX_BYTES`]; an empty one has no tablespaces.
pub fn parse(map: &[u8]) -> Result<Vec<TablespaceLink>, MapError> {
    if map.len() > MAX_BYTES {
        return Err(MapError::TooLong { bytes: map.len() });
    }
    let mut links = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    let (mut rest, mut line) = (map, 0);
    while !rest.is_empty() {
        line += 1;
        let (text, behind) = unescaped_line(rest).ok_or(MapError::Line { line })?;
        let link = link(&text).ok_or(MapError::Line { line })?;
        if !seen.insert(link.oid) {
            return Err(MapError::Twice { oid: link.oid });
        }
        links.push(link);
        rest = behind;
    }
    Ok(links)
}

/// The map that a server reads back as these links.
pub fn format(links: &[TablespaceLink]) -> Vec<u8> {
    let mut map = Vec::new();
    for link in links {
        map.extend(format!("{} ", link.oid).as_bytes());
        for &byte in &link.path {
            if matches!(byte, b'\n' | b'\r' | b'\\') {
                map.push(b'\\');
            }
            map.push(byte);
        }
        map.push(b'\n');
    }
    map
}

/// The first line without its escapes, and what is behind its line feed.
fn unescaped_line(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut line = Vec::new();
    let mut at = 0;
    loop {
        match *text.get(at)? {
            b'\n' => return Some((line, &text[at + 1..])),
            b'\r' => return None,
            b'\\' => {
                line.push(*text.get(at + 1)?);
                at += 2;
            }
            byte => {
                line.push(byte);
                at += 1;
            }
        }
    }
}

fn link(line: &[u8]) -> Option<TablespaceLink> {
    let space = line.iter().position(|&byte| byte == b' ')?;
    let (digits, path) = (&line[..space], &line[space + 1..]);
    let canonical = !digits.is_empty() && digits[0] != b'0' && digits.iter().all(u8::is_ascii_digit);
    let oid = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (canonical && !path.is_empty()).then(|| TablespaceLink { oid, path: path.to_vec() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn maps() {
        let link = |oid, path: &[u8]| TablespaceLink { oid, path: path.to_vec() };
        assert_eq!(parse(b""), Ok(Vec::new()));
        assert_eq!(
            parse(b"16384 /srv/a b\n16385 /x\\\\y\\\nz\n"),
            Ok(vec![link(16384, b"/srv/a b"), link(16385, b"/x\\y\nz")])
        );
        assert_eq!(parse(b"16384 /a\n16384 /b\n"), Err(MapError::Twice { oid: 16384 }));
        for refused in [
            &b"16384 /a"[..],
            b"16384\n",
            b"16384 \n",
            b" /a\n",
            b"0 /a\n",
            b"+1 /a\n",
            b"99999999999 /a\n",
            b"\n",
            b"1 /a\r\n",
            b"1 /a\\",
        ] {
            assert_eq!(parse(refused), Err(MapError::Line { line: 1 }), "{refused:?}");
        }
        assert!(matches!(parse(&vec![b'1'; MAX_BYTES + 1]), Err(MapError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn maps_round_trip(paths in proptest::collection::btree_map(1u32.., proptest::collection::vec(any::<u8>(), 1..40), 0..20)) {
            let links: Vec<_> = paths.into_iter().map(|(oid, path)| TablespaceLink { oid, path }).collect();
            prop_assert_eq!(parse(&format(&links)), Ok(links));
        }

        #[test]
        fn any_bytes_are_answered(map in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&map);
        }
    }
}
