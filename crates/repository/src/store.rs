//! The seam to whatever holds objects: a directory, an S3 bucket, memory.
//!
//! An object is written once and never changes. [`ObjectStore::put_new`] therefore answers only *created* or *exists*;
//! whether an existing object has the same content is decided above, by reading it. The trait holds what the
//! repository needs and nothing else: no rename, no overwrite. [`ObjectStore::delete`] is called by the sweep, for
//! what a committed root condemned, and by `verify/repair.rs`, for bytes that are proven not to be the object.
//!
//! Rules every implementation keeps (the suite in `conformance` checks them):
//! * `Put::Created` means durable and complete under the key; a reader never sees part of an object;
//! * of several racing creators exactly one gets `Created`, and its content is what is read;
//! * listing is in byte order of the key and shows everything whose put had returned before the listing began;
//! * *absent* is said only when the store itself said so; a store that is away or unmounted is an error;
//! * every call ends within the deadlines the store was built with; [`StoreError::Timeout`] leaves the outcome unknown.
//!
//! Dropping a future of any method is safe; a put that was dropped may still happen, like one that timed out.

use std::error::Error;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use uuid::Uuid;

use crate::key::ObjectKey;
use crate::name::StoreName;

/// Largest piece that [`Body::chunks`] and [`ObjectStore::get`] yield, in bytes.
pub const PIECE_LIMIT_BYTES: usize = 1024 * 1024;

/// Objects that every [`ObjectStore::list`] call can return; S3 and coordinators give no more, whatever was asked.
pub const LIST_LIMIT: usize = 1000;

/// Most objects that any [`ObjectStore::list`] call returns. It is asked for where very many are expected: each page of a
/// large directory costs to read the whole of it.
pub const LONG_LIST_LIMIT: usize = 16_384;

/// The bytes of an object to be stored.
#[derive(Debug, Clone)]
pub enum Body {
    /// All of it in memory.
    Memory(Bytes),
    /// The first `len` bytes of a file, which must not change or go away until the put has returned.
    File {
        /// Where the file is.
        path: PathBuf,
        /// How many bytes of it are the object.
        len: u64,
    },
}

impl Body {
    /// The length of the object in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { len, .. } => *len,
        }
    }

    /// The content in pieces of at most [`PIECE_LIMIT_BYTES`], read as they are asked for.
    ///
    /// A file shorter than its `len` ends the stream with [`io::ErrorKind::UnexpectedEof`].
    pub fn chunks(&self) -> BoxStream<'static, io::Result<Bytes>> {
        match self {
            Self::Memory(bytes) => memory_chunks(bytes.clone()),
            Self::File { path, len } => file_chunks(path.clone(), *len),
        }
    }

    /// SHA-256 of the content.
    pub async fn sha256(&self) -> io::Result<[u8; 32]> {
        let mut hash = Sha256::new();
        let mut chunks = self.chunks();
        while let Some(chunk) = chunks.try_next().await? {
            hash.update(&chunk);
        }
        Ok(hash.finalize().into())
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::Memory(bytes)
    }
}

fn memory_chunks(bytes: Bytes) -> BoxStream<'static, io::Result<Bytes>> {
    stream::unfold(bytes, |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        let piece = rest.split_to(rest.len().min(PIECE_LIMIT_BYTES));
        Some((Ok(piece), rest))
    })
    .boxed()
}

fn file_chunks(path: PathBuf, len: u64) -> BoxStream<'static, io::Result<Bytes>> {
    let pieces = async move {
        let file = tokio::fs::File::open(&path).await?;
        Ok::<_, io::Error>(stream::try_unfold((file, len), |(mut file, left)| async move {
            if left == 0 {
                return Ok(None);
            }
            let size = left.min(PIECE_LIMIT_BYTES as u64) as usize;
            let mut piece = vec![0; size];
            file.read_exact(&mut piece).await?;
            Ok(Some((Bytes::from(piece), (file, left - size as u64))))
        }))
    };
    stream::once(pieces).try_flatten().boxed()
}

/// What a create-only put found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "an existing object may hold other content"]
pub enum Put {
    /// The object was not there, and now holds the given content, durably.
    Created,
    /// An object is already there; it was not touched, and its content is not known to be the same.
    Exists,
}

/// What came of removing an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a retained object is still there"]
pub enum Deleted {
    /// It is not there any more. A store that does not say whether it was there answers this.
    Removed,
    /// It was not there.
    Absent,
    /// The store keeps it, by a lock or a rule of its own. Not an error: a later sweep tries again.
    Retained {
        /// Until when, if the store says so.
        until: Option<Timestamp>,
    },
}

/// Which bytes of an object to read. A range is cut at the end of the object; one that lies behind it is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteRange {
    /// The whole object.
    All,
    /// From `offset` to the end.
    From {
        /// First byte, from 0.
        offset: u64,
    },
    /// `length` bytes from `offset`.
    Slice {
        /// First byte, from 0.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
}

impl ByteRange {
    /// The first byte and the byte after the last within an object of `size` bytes.
    pub fn within(self, size: u64) -> std::ops::Range<u64> {
        let (start, end) = match self {
            Self::All => (0, size),
            Self::From { offset } => (offset, size),
            Self::Slice { offset, length } => (offset, offset.saturating_add(length)),
        };
        let start = start.min(size);
        start..end.clamp(start, size)
    }
}

/// One listed object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectEntry {
    /// Its key.
    pub key: ObjectKey,
    /// Its length in bytes.
    pub size: u64,
}

/// Part of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListPage {
    /// Objects in byte order of their keys.
    pub objects: Vec<ObjectEntry>,
    /// Whether there are more after the last one. Never true for a page without objects.
    pub more: bool,
}

/// How much a store of limited size holds, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// What an unprivileged writer may still use.
    pub free_bytes: u64,
    /// The size of the whole, as far as an unprivileged writer may use it.
    pub total_bytes: u64,
}

impl Room {
    /// How full it is, from 0 to 100, rounded up.
    pub fn used_percent(&self) -> u8 {
        let used = self.total_bytes.saturating_sub(self.free_bytes);
        if self.total_bytes == 0 {
            return 100;
        }
        (u128::from(used) * 100).div_ceil(u128::from(self.total_bytes)).min(100) as u8
    }
}

/// The bytes of an object as they come, in pieces of at most [`PIECE_LIMIT_BYTES`].
pub type ByteStream = BoxStream<'static, Result<Bytes, StoreError>>;

/// Where objects are kept. See the rules at the head of this file.
#[async_trait]
pub trait ObjectStore: Send + Sync + Debug + 'static {
    /// The name the configuration gives this store.
    fn name(&self) -> &StoreName;

    /// Creates the object if nothing is under `key`; durable when it returns.
    ///
    /// After [`StoreError::Timeout`] or [`StoreError::Unavailable`] the object may or may not be there; asking again
    /// with the same body is safe.
    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError>;

    /// Reads an object, or [`StoreError::NotFound`]. The stream fails if fewer bytes come than the store announced.
    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError>;

    /// The size of an object in bytes; `None` only if the store itself said that it is absent.
    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError>;

    /// Objects whose key starts with `prefix` (any text, not only whole components) and is greater than `start_after`,
    /// in byte order, at most `limit` (from 1, cut to [`LIST_LIMIT`] or [`LONG_LIST_LIMIT`], as the store can). Names that are
    /// no keys of ours are left out.
    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError>;

    /// Removes an object. For the sweep and for repairs: see `sweep.rs` and `verify/repair.rs` for what may be removed, and
    /// when.
    ///
    /// A store with versions hides the object and keeps its bytes as long as its own rules say. Stores that cannot remove,
    /// such as those a node has, answer [`StoreError::Unsupported`].
    async fn delete(&self, key: &ObjectKey) -> Result<Deleted, StoreError> {
        let _ = key;
        let reason = "nothing is removed by this road".to_owned();
        Err(StoreError::Unsupported { store: self.name().clone(), reason })
    }

    /// Says to which repository the store is to belong. One that can be exchanged under its name, as a directory can by a
    /// mount, works on no other from now on; without this it keeps to the first one that it meets.
    fn expect_repository(&self, repository: Uuid) {
        let _ = repository;
    }

    /// How full the store is; `None` if it knows no limit.
    async fn room(&self) -> Result<Option<Room>, StoreError>;
}

/// Why a store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The object is not there, and the store itself said so.
    #[error("store {store}: object {key} does not exist")]
    NotFound {
        /// Which store.
        store: StoreName,
        /// What was asked for.
        key: ObjectKey,
    },
    /// The store could not be reached or answered with a fault of its own; for a put the outcome is unknown.
    #[error("store {store} is unavailable")]
    Unavailable {
        /// Which store.
        store: StoreName,
        /// What it said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// No answer in time. It is unknown whether the operation happened.
    #[error("store {store}: {operation} did not finish in time, and it is unknown whether it happened")]
    Timeout {
        /// Which store.
        store: StoreName,
        /// What was asked for: `put`, `get`, `head`, `list`, `delete`, `room`.
        operation: &'static str,
    },
    /// The store does not let us: credentials or permissions.
    #[error("store {store} denies access: check its credentials and permissions")]
    Denied {
        /// Which store.
        store: StoreName,
        /// What it said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// This is not the store we were promised: unmounted, foreign, or misconfigured.
    #[error("store {store} is refused: {reason}")]
    Refused {
        /// Which store.
        store: StoreName,
        /// What was found, what was expected, and what to do.
        reason: String,
    },
    /// The store takes no new objects.
    #[error("store {store} is full")]
    Full {
        /// Which store.
        store: StoreName,
    },
    /// What the store holds is not what was put there.
    #[error("store {store}: object {key} is damaged: {reason}")]
    Damaged {
        /// Which store.
        store: StoreName,
        /// Which object.
        key: ObjectKey,
        /// What was found and what was expected.
        reason: String,
    },
    /// The store lacks something the repository cannot do without.
    #[error("store {store} cannot be used: {reason}")]
    Unsupported {
        /// Which store.
        store: StoreName,
        /// What it lacks.
        reason: String,
    },
    /// The content to be stored could not be read; nothing is wrong with the store.
    #[error("the content to be stored as {key} could not be read")]
    Body {
        /// Which object it was to be.
        key: ObjectKey,
        /// What reading said.
        source: io::Error,
    },
    /// An object is longer than its reader accepts.
    #[error("an object is longer than the {limit_bytes} bytes its reader accepts")]
    TooLong {
        /// What was accepted, in bytes.
        limit_bytes: u64,
    },
}

/// What helps against an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Ask again later; nobody need do anything.
    Retry,
    /// A human must change something outside.
    Operator,
    /// Stored bytes are wrong or missing; another store may have them.
    Corrupt,
    /// Two contents claim one name; a human must choose.
    Conflict,
    /// We did something that cannot be right.
    Bug,
}

impl StoreError {
    /// What helps.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Unavailable { .. } | Self::Timeout { .. } => Remedy::Retry,
            Self::Denied { .. } | Self::Refused { .. } | Self::Full { .. } | Self::Unsupported { .. } => {
                Remedy::Operator
            }
            Self::NotFound { .. } | Self::Damaged { .. } | Self::TooLong { .. } => Remedy::Corrupt,
            Self::Body { .. } => Remedy::Bug,
        }
    }

    /// Whether the store as a whole cannot serve now, so that the same request about any object would fare alike.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Unavailable { .. }
            | Self::Timeout { .. }
            | Self::Denied { .. }
            | Self::Refused { .. }
            | Self::Full { .. }
            | Self::Unsupported { .. } => true,
            Self::NotFound { .. } | Self::Damaged { .. } | Self::Body { .. } | Self::TooLong { .. } => false,
        }
    }

    /// Whether a put that failed so may nevertheless have happened, or may happen later.
    pub fn outcome_unknown(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Timeout { .. })
    }
}

/// Gathers a stream in memory; fails with [`StoreError::TooLong`] past `limit_bytes`.
pub async fn collect(mut stream: ByteStream, limit_bytes: u64) -> Result<Bytes, StoreError> {
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    while let Some(piece) = stream.try_next().await? {
        if (first.len() + all.len() + piece.len()) as u64 > limit_bytes {
            return Err(StoreError::TooLong { limit_bytes });
        }
        if first.is_empty() && all.is_empty() {
            first = piece;
            continue;
        }
        if !first.is_empty() {
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&piece);
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// Reads a whole small object; `None` if it is absent.
pub async fn read(store: &dyn ObjectStore, key: &ObjectKey, limit_bytes: u64) -> Result<Option<Bytes>, StoreError> {
    match store.get(key, ByteRange::All).await {
        Ok(stream) => collect(stream, limit_bytes).await.map(Some),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Every object under `prefix`, page after page; fails with [`StoreError::TooLong`] past `limit` objects. For what is few:
/// each is remembered with its whole key.
pub async fn list_all(store: &dyn ObjectStore, prefix: &str, limit: usize) -> Result<Vec<ObjectEntry>, StoreError> {
    let mut objects: Vec<ObjectEntry> = Vec::new();
    list_each(store, prefix, limit, |entry| objects.push(entry)).await?;
    Ok(objects)
}

/// Shows every object under `prefix`, page after page; fails with [`StoreError::TooLong`] past `limit` objects. Memory is one
/// page.
pub async fn list_each(
    store: &dyn ObjectStore,
    prefix: &str,
    limit: usize,
    mut each: impl FnMut(ObjectEntry),
) -> Result<(), StoreError> {
    let (mut after, mut seen) = (None, 0);
    loop {
        let page = store.list(prefix, after.as_deref(), LONG_LIST_LIMIT).await?;
        seen += page.objects.len();
        if seen > limit {
            return Err(StoreError::TooLong { limit_bytes: limit as u64 });
        }
        if let Some(last) = page.objects.last() {
            after = Some(last.key.as_str().to_owned());
        }
        page.objects.into_iter().for_each(&mut each);
        if !page.more {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_the_end() {
        let check = |range: ByteRange, size, expected| assert_eq!(range.within(size), expected, "{range:?} of {size}");
        check(ByteRange::All, 10, 0..10);
        check(ByteRange::All, 0, 0..0);
        check(ByteRange::From { offset: 3 }, 10, 3..10);
        check(ByteRange::From { offset: 10 }, 10, 10..10);
        check(ByteRange::From { offset: u64::MAX }, 10, 10..10);
        check(ByteRange::Slice { offset: 3, length: 4 }, 10, 3..7);
        check(ByteRange::Slice { offset: 8, length: 4 }, 10, 8..10);
        check(ByteRange::Slice { offset: 8, length: u64::MAX }, 10, 8..10);
        check(ByteRange::Slice { offset: 20, length: 1 }, 10, 10..10);
        check(ByteRange::Slice { offset: 2, length: 0 }, 10, 2..2);
    }

    #[test]
    fn room_is_rounded_towards_full() {
        let check = |free_bytes, total_bytes, percent| {
            assert_eq!(Room { free_bytes, total_bytes }.used_percent(), percent, "{free_bytes} of {total_bytes}");
        };
        check(100, 100, 0);
        check(99, 100, 1);
        check(999, 1000, 1);
        check(0, 100, 100);
        check(0, 0, 100);
        check(u64::MAX, u64::MAX, 0);
        check(200, 100, 0);
    }

    #[tokio::test]
    async fn bodies_come_in_pieces_and_hash_alike() {
        let content: Vec<u8> = (0..PIECE_LIMIT_BYTES * 2 + 17).map(|i| i as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &content).unwrap();
        let memory = Body::from(Bytes::from(content.clone()));
        let from_file = Body::File { path: file.path().to_owned(), len: content.len() as u64 };
        for body in [&memory, &from_file] {
            let pieces: Vec<Bytes> = body.chunks().try_collect().await.unwrap();
            assert!(pieces.iter().all(|piece| piece.len() <= PIECE_LIMIT_BYTES));
            assert_eq!(pieces.concat(), content);
            assert_eq!(body.len(), content.len() as u64);
        }
        assert_eq!(memory.sha256().await.unwrap(), from_file.sha256().await.unwrap());
        let too_long = Body::File { path: file.path().to_owned(), len: content.len() as u64 + 1 };
        assert_eq!(too_long.sha256().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn collecting_is_bounded() {
        let pieces = || stream::iter([Ok(Bytes::from("ab")), Ok(Bytes::from("cd"))]).boxed();
        assert_eq!(collect(pieces(), 4).await.unwrap(), "abcd");
        assert!(matches!(collect(pieces(), 3).await, Err(StoreError::TooLong { limit_bytes: 3 })));
        assert_eq!(collect(stream::empty().boxed(), 0).await.unwrap(), "");
    }
}
