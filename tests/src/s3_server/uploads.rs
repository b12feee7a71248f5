//! Multipart uploads under way: their parts, until they become one object, are given up, or the server ends.
//!
//! An upload is taken out while it is being completed, so of two who complete it one is told that there is none; when
//! completing fails, it is put back and may be completed or given up again.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::objects::Content;

/// Least size of every part but the last, as in S3.
const PART_MIN_BYTES: u64 = 5 * 1024 * 1024;

/// A part that was received.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) etag: String,
    pub(super) content: Content,
}

/// An upload under way.
#[derive(Debug)]
pub(super) struct Upload {
    key: String,
    parts: BTreeMap<i32, Part>,
}

/// Why parts do not become an object.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// None are named.
    Empty,
    /// They are not named in ascending order.
    Order,
    /// One was not received, or with another ETag.
    Unknown(i32),
    /// One that is not the last is smaller than S3 allows.
    Small(i32),
}

impl Upload {
    /// The contents of the named parts, in order.
    pub(super) fn contents(&self, named: &[(i32, Option<String>)]) -> Result<Vec<Content>, Unfit> {
        let (last, _) = named.last().ok_or(Unfit::Empty)?;
        if named.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
            return Err(Unfit::Order);
        }
        let content = |(number, etag): &(i32, Option<String>)| {
            let part = self.parts.get(number).filter(|part| etag.as_ref().is_none_or(|etag| *etag == part.etag));
            let part = part.ok_or(Unfit::Unknown(*number))?;
            let small = number != last && part.content.len() < PART_MIN_BYTES;
            if small { Err(Unfit::Small(*number)) } else { Ok(part.content.clone()) }
        };
        named.iter().map(content).collect()
    }

    /// Removes what the parts occupy.
    pub(super) fn discard(self) {
        self.parts.into_values().for_each(|part| part.content.discard());
    }
}

/// All uploads under way, by their ids.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    map: Mutex<HashMap<String, Upload>>,
}

impl Uploads {
    fn map(&self) -> MutexGuard<'_, HashMap<String, Upload>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, id: &str, key: &str) {
        self.map().insert(id.to_owned(), Upload { key: key.to_owned(), parts: BTreeMap::new() });
    }

    /// Keeps a part, in place of an earlier one with its number; gives it back when there is no such upload.
    pub(super) fn add(&self, id: &str, key: &str, number: i32, part: Part) -> Result<(), Part> {
        let mut map = self.map();
        let Some(upload) = map.get_mut(id).filter(|upload| upload.key == key) else { return Err(part) };
        let replaced = upload.parts.insert(number, part);
        drop(map);
        if let Some(replaced) = replaced {
            replaced.content.discard();
        }
        Ok(())
    }

    /// Takes an upload out.
    pub(super) fn take(&self, id: &str, key: &str) -> Option<Upload> {
        let mut map = self.map();
        map.get(id).filter(|upload| upload.key == key)?;
        map.remove(id)
    }

    /// Puts back one that was taken out.
    pub(super) fn put_back(&self, id: &str, upload: Upload) {
        self.map().insert(id.to_owned(), upload);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn part(etag: &str, bytes: u64) -> Part {
        Part { etag: etag.to_owned(), content: Content::Memory(Bytes::from(vec![0; bytes as usize])) }
    }

    #[test]
    fn parts_become_an_object_only_as_s3_wants_them_named() {
        let uploads = Uploads::default();
        uploads.begin("u", "key");
        for (number, etag, bytes) in [(1, "a", PART_MIN_BYTES), (2, "b", 3), (4, "old", 9), (4, "d", 1)] {
            uploads.add("u", "key", number, part(etag, bytes)).unwrap();
        }
        assert!(uploads.add("u", "other key", 1, part("x", 1)).is_err());
        assert!(uploads.take("u", "other key").is_none());
        let upload = uploads.take("u", "key").unwrap();
        assert!(uploads.add("u", "key", 5, part("x", 1)).is_err());
        let check = |named: &[(i32, &str)], expected: Result<Vec<u64>, Unfit>| {
            let named: Vec<_> = named.iter().map(|(number, etag)| (*number, Some((*etag).to_owned()))).collect();
            let found = upload.contents(&named).map(|contents| contents.iter().map(Content::len).collect::<Vec<_>>());
            assert_eq!(found, expected);
        };
        check(&[], Err(Unfit::Empty));
        check(&[(1, "a"), (2, "b")], Ok(vec![PART_MIN_BYTES, 3]));
        check(&[(1, "a"), (4, "d")], Ok(vec![PART_MIN_BYTES, 1]));
        check(&[(1, "a"), (4, "old")], Err(Unfit::Unknown(4)));
        check(&[(1, "a"), (3, "c")], Err(Unfit::Unknown(3)));
        check(&[(4, "d"), (1, "a")], Err(Unfit::Order));
        check(&[(1, "a"), (1, "a")], Err(Unfit::Order));
        check(&[(1, "a"), (2, "b"), (4, "d")], Err(Unfit::Small(2)));
    }
}
