//! Where the bytes of an upload wait until the stores have them.
//!
//! A body stays in memory while it fits the global byte budget; what is larger than [`MEMORY_OBJECT_MAX`] or finds the
//! budget taken goes to a file in the state directory. So the coordinator's memory does not grow with the number of
//! nodes. The file is no copy anybody relies on: it is not synced, and those of an earlier life are deleted at start.
//!
//! Size and digest are checked here, a WAL object's by its header; a body that differs from its announcement never leaves
//! this room. Each byte is hashed once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use repository::store::Body;
use repository::wal::{Damage, EncodedWal, WalArrival};
use sha2::{Digest, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::refusal::Refusal;

/// Bytes of bodies kept in memory at one time, over all calls.
pub const MEMORY_BYTES: usize = 24 << 20;
/// An object larger than this goes to a file in any case.
pub const MEMORY_OBJECT_MAX: u64 = 8 << 20;
/// Largest object taken: a 1 GiB segment that does not compress, with its header, what it tells of changes, and room for
/// packs.
pub const OBJECT_BYTES_MAX: u64 = (1 << 30) + (80 << 20);
/// How long a body waits for memory before it goes to a file.
const MEMORY_WAIT: Duration = Duration::from_millis(50);
/// A sender silent for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Takes bodies in.
#[derive(Debug, Clone)]
pub struct Intake {
    budget: Arc<Semaphore>,
    directory: Arc<PathBuf>,
}

/// A body that arrived whole. Clones share it; its memory or file is given back with the last one.
#[derive(Debug, Clone)]
pub struct Received {
    body: Body,
    hold: Arc<Hold>,
}

#[derive(Debug)]
enum Hold {
    Memory { _permit: OwnedSemaphorePermit },
    File(PathBuf),
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Self::File(path) = self
            && let Err(error) = std::fs::remove_file(&*path)
        {
            tracing::warn!(path = %path.display(), %error, "a temporary file could not be deleted");
        }
    }
}

impl Received {
    /// The body, for a store.
    pub fn body(&self) -> Body {
        self.body.clone()
    }

    /// Keeps memory or file alive.
    pub fn keep(&self) -> impl Send + 'static {
        Arc::clone(&self.hold)
    }
}

/// What a sender announced of a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announced {
    /// It is this.
    Sha256([u8; 32]),
    /// Nothing: it comes from a store, and its reader or the one who copies it checks it.
    Nothing,
}

impl Announced {
    fn check(self, what: &str, found: &[u8; 32]) -> Result<(), Refusal> {
        match self {
            Self::Sha256(announced) if announced != *found => {
                Err(Refusal::BodyDamaged(format!("{what} is not the announced one")))
            }
            _ => Ok(()),
        }
    }
}

impl Intake {
    /// An intake with its files below `state_directory`; what an earlier life left there is deleted.
    ///
    /// # Errors
    /// When the directory cannot be made or cleared.
    pub fn new(state_directory: &Path) -> std::io::Result<Self> {
        let directory = state_directory.join("incoming");
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => std::fs::create_dir_all(&directory)?,
        }
        Ok(Self { budget: Arc::new(Semaphore::new(MEMORY_BYTES)), directory: Arc::new(directory) })
    }

    /// Takes a WAL object of this size in; `announced` is about its header, which pins the rest.
    ///
    /// # Errors
    /// [`Refusal::BodyDamaged`] when it is not what was announced, [`Refusal::Silence`], what the stream says.
    pub async fn receive_wal<S>(
        &self,
        size_bytes: u64,
        announced: Announced,
        chunks: S,
    ) -> Result<(EncodedWal, Received), Refusal>
    where
        S: Stream<Item = Result<Bytes, Refusal>> + Unpin,
    {
        let damaged = |damage: Damage| Refusal::BodyDamaged(damage.to_string());
        let mut arrival = WalArrival::new();
        let received = self.receive(size_bytes, chunks, |chunk| arrival.push(chunk).map_err(damaged)).await?;
        let arrived = match announced {
            Announced::Sha256(_) => arrival.finish(),
            // From a store: a WAL file is worth copying even if what lies beside it is damaged there.
            Announced::Nothing => arrival.finish_file(),
        };
        let arrived = arrived.map_err(damaged)?;
        announced.check("the SHA-256 of its header", &arrived.header_sha256)?;
        Ok((EncodedWal::arrived(arrived, received.body()), received))
    }

    /// Takes any object of this size in, and says its SHA-256.
    ///
    /// # Errors
    /// As [`Intake::receive_wal`].
    pub async fn receive_object<S>(
        &self,
        size_bytes: u64,
        announced: Announced,
        chunks: S,
    ) -> Result<([u8; 32], Received), Refusal>
    where
        S: Stream<Item = Result<Bytes, Refusal>> + Unpin,
    {
        let mut hash = Sha256::new();
        let received = self.receive(size_bytes, chunks, |chunk| {
            hash.update(chunk);
            Ok(())
        });
        let received = received.await?;
        let sha256 = hash.finalize().into();
        announced.check("its SHA-256", &sha256)?;
        Ok((sha256, received))
    }

    /// Takes a body of exactly this size in; `look` sees each piece before it is kept.
    async fn receive<S>(
        &self,
        size_bytes: u64,
        chunks: S,
        look: impl FnMut(&[u8]) -> Result<(), Refusal>,
    ) -> Result<Received, Refusal>
    where
        S: Stream<Item = Result<Bytes, Refusal>> + Unpin,
    {
        if size_bytes > OBJECT_BYTES_MAX {
            return Err(Refusal::BodyDamaged(format!("{size_bytes} bytes are more than an object may have")));
        }
        let mut coming = Coming { size_bytes, chunks, look, seen_bytes: 0 };
        match self.memory(size_bytes).await {
            Some(permit) => {
                let mut bytes = Vec::with_capacity(size_bytes as usize);
                while let Some(chunk) = coming.next().await? {
                    bytes.extend_from_slice(&chunk);
                }
                let body = Body::Memory(Bytes::from(bytes));
                Ok(Received { body, hold: Arc::new(Hold::Memory { _permit: permit }) })
            }
            None => self.receive_to_file(coming).await,
        }
    }

    async fn memory(&self, size_bytes: u64) -> Option<OwnedSemaphorePermit> {
        if size_bytes > MEMORY_OBJECT_MAX {
            return None;
        }
        let permits = u32::try_from(size_bytes).ok()?;
        let acquired = tokio::time::timeout(MEMORY_WAIT, Arc::clone(&self.budget).acquire_many_owned(permits)).await;
        acquired.ok()?.ok()
    }

    async fn receive_to_file<S, L>(&self, mut coming: Coming<S, L>) -> Result<Received, Refusal>
    where
        S: Stream<Item = Result<Bytes, Refusal>> + Unpin,
        L: FnMut(&[u8]) -> Result<(), Refusal>,
    {
        let path = self.directory.join(uuid::Uuid::now_v7().to_string());
        let mut file = File::create_new(&path).await.map_err(Refusal::StateDirectory)?;
        let hold = Arc::new(Hold::File(path.clone()));
        while let Some(chunk) = coming.next().await? {
            file.write_all(&chunk).await.map_err(Refusal::StateDirectory)?;
        }
        file.flush().await.map_err(Refusal::StateDirectory)?;
        Ok(Received { body: Body::File { path, len: coming.size_bytes }, hold })
    }
}

/// Passes chunks on while they keep to the size and look right.
struct Coming<S, L> {
    size_bytes: u64,
    chunks: S,
    look: L,
    seen_bytes: u64,
}

impl<S, L> Coming<S, L>
where
    S: Stream<Item = Result<Bytes, Refusal>> + Unpin,
    L: FnMut(&[u8]) -> Result<(), Refusal>,
{
    async fn next(&mut self) -> Result<Option<Bytes>, Refusal> {
        let next = tokio::time::timeout(SILENCE_MAX, self.chunks.next()).await;
        let (seen, announced) = (self.seen_bytes, self.size_bytes);
        let Some(chunk) = next.map_err(|_| Refusal::Silence(SILENCE_MAX.as_secs()))? else {
            return match seen == announced {
                true => Ok(None),
                false => Err(Refusal::BodyDamaged(format!("{seen} of {announced} bytes came"))),
            };
        };
        let chunk = chunk?;
        self.seen_bytes += chunk.len() as u64;
        if self.seen_bytes > announced {
            return Err(Refusal::BodyDamaged(format!("more than the announced {announced} bytes came")));
        }
        (self.look)(&chunk)?;
        Ok(Some(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;
    use postgres_format::wal_changes::{ChangeMap, Lead, SegmentChanges, Tail};
    use postgres_format::wal_segment::SegmentEnd;
    use postgres_format::{Lsn, SegmentSize};
    use repository::wal::{Sink, WalEncoder, WalFacts};

    fn announced(content: &[u8]) -> Announced {
        Announced::Sha256(repository::digest::sha256(content))
    }

    /// A WAL object that tells what its WAL changed, as agents make them of segments.
    fn wal_that_tells() -> EncodedWal {
        let (size, start) = (SegmentSize::MIN, Lsn::new(1 << 20));
        let changes = SegmentChanges {
            start,
            size,
            end: SegmentEnd::Full,
            logical_end: Lsn::new(2 << 20),
            postgres_major: 15,
            map: ChangeMap::empty(),
            lead: Lead::Fresh,
            tail: Tail::Closed,
            doubt: None,
        };
        let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
        encoder.push(&vec![7; 1 << 20]).unwrap();
        let like = crate::tests::wal(&crate::tests::segment(1), "a", "one").header;
        let facts = WalFacts {
            cluster: like.cluster,
            system_identifier: like.system_identifier,
            name: like.name,
            node: like.node,
            in_recovery: false,
            complete: true,
            logical_end: Some(changes.logical_end),
            postgres_major: Some(15),
            first_commit_time: None,
            last_commit_time: None,
            written: like.written,
        };
        encoder.finish_with_changes(facts, &changes).unwrap()
    }

    fn chunks(content: &[u8], piece: usize) -> impl Stream<Item = Result<Bytes, Refusal>> + Unpin + use<> {
        let pieces: Vec<_> = content.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        stream::iter(pieces)
    }

    #[tokio::test]
    async fn bodies_go_to_memory_and_what_does_not_fit_to_files() {
        let directory = tempfile::tempdir().unwrap();
        let intake = Intake::new(directory.path()).unwrap();
        let content: Vec<u8> = (0..MEMORY_OBJECT_MAX).map(|byte| byte as u8).collect();
        let mut held = Vec::new();
        for expect_memory in [true, true, true, false] {
            let coming = chunks(&content, 1 << 20);
            let received = intake.receive_object(MEMORY_OBJECT_MAX, announced(&content), coming).await;
            let (sha256, received) = received.unwrap();
            assert_eq!(matches!(received.body(), Body::Memory(_)), expect_memory);
            assert_eq!(Announced::Sha256(sha256), announced(&content));
            assert_eq!(received.body().sha256().await.unwrap(), sha256);
            held.push(received);
        }
        let incoming = || std::fs::read_dir(directory.path().join("incoming")).unwrap().count();
        assert_eq!(incoming(), 1);
        drop(held);
        assert_eq!(incoming(), 0);
    }

    #[tokio::test]
    async fn a_body_that_differs_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let intake = Intake::new(directory.path()).unwrap();
        let right = announced(b"0123456789");
        for content in [&b"0123456788"[..], b"012345678", b"01234567890"] {
            let refusal = intake.receive_object(10, right, chunks(content, 4)).await.unwrap_err();
            assert_eq!(refusal.reason(), "BODY_DAMAGED");
        }
        let huge = intake.receive_object(OBJECT_BYTES_MAX + 1, right, chunks(b"", 4)).await;
        assert_eq!(huge.unwrap_err().reason(), "BODY_DAMAGED");
    }

    #[tokio::test]
    async fn a_wal_object_that_differs_anywhere_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let intake = Intake::new(directory.path()).unwrap();
        let wal = crate::tests::wal(&crate::tests::segment(1), "a", "one");
        let Body::Memory(whole) = &wal.body else { panic!("test objects are small") };
        let right = Announced::Sha256(wal.header_sha256);
        let receive = async |content: &[u8], announced| {
            intake.receive_wal(whole.len() as u64, announced, chunks(content, 700)).await
        };
        for announced in [right, Announced::Nothing] {
            let (arrived, received) = receive(whole, announced).await.unwrap();
            assert_eq!((arrived.header, arrived.header_sha256), (wal.header.clone(), wal.header_sha256));
            assert!(matches!(received.body(), Body::Memory(bytes) if bytes == *whole));
        }
        let refused = async |content: &[u8], announced| receive(content, announced).await.unwrap_err().reason();
        for at in [0, 50, repository::wal::HEADER_BYTES, whole.len() - 1] {
            let mut damaged = whole.to_vec();
            damaged[at] ^= 1;
            assert_eq!(refused(&damaged, right).await, "BODY_DAMAGED", "byte {at}");
        }
        assert_eq!(refused(&whole[1..], right).await, "BODY_DAMAGED");
        assert_eq!(refused(whole, Announced::Sha256([0; 32])).await, "BODY_DAMAGED");
        // What follows the header must be as long as it says, whatever was announced.
        let longer = [&whole[..], b"x"].concat();
        let size_bytes = longer.len() as u64;
        let refusal = intake.receive_wal(size_bytes, right, chunks(&longer, 700)).await.unwrap_err();
        assert_eq!(refusal.reason(), "BODY_DAMAGED");
    }

    /// What lies beside a WAL file may be damaged where it comes from; the file is worth copying.
    #[tokio::test]
    async fn damage_beside_a_wal_file_is_refused_of_a_sender_and_taken_from_a_store() {
        let directory = tempfile::tempdir().unwrap();
        let intake = Intake::new(directory.path()).unwrap();
        let wal = wal_that_tells();
        let Body::Memory(whole) = &wal.body else { panic!("test objects are small") };
        assert!(wal.header.changes.is_some());
        let mut damaged = whole.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        let size_bytes = whole.len() as u64;
        let sent = intake.receive_wal(size_bytes, Announced::Sha256(wal.header_sha256), chunks(&damaged, 700)).await;
        assert_eq!(sent.unwrap_err().reason(), "BODY_DAMAGED");
        for bytes in [&whole[..], &damaged] {
            let (arrived, received) =
                intake.receive_wal(size_bytes, Announced::Nothing, chunks(bytes, 700)).await.unwrap();
            assert_eq!(arrived.header, wal.header);
            assert!(matches!(received.body(), Body::Memory(body) if body == bytes));
        }
    }
}
