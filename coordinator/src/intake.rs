//! Where the bytes of an upload wait until the stores have them.
//!
//! A body stays in memory while it fits the global byte budget; what is larger than [`MEMORY_OBJECT_MAX`] or finds the
//! budget taken goes to a file in the state directory. So the coordinator's memory does not grow with the number of
//! nodes. The file is no copy anybody relies on: it is not synced, and those of an earlier life are deleted at start.
//!
//! Size and SHA-256 are checked here; a body that differs from its announcement never leaves this room.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use repository::store::Body;
use sha2::{Digest, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::refusal::Refusal;

/// Bytes of bodies kept in memory at one time, over all calls.
pub const MEMORY_BYTES: usize = 24 << 20;
/// An object larger than this goes to a file in any case.
pub const MEMORY_OBJECT_MAX: u64 = 8 << 20;
/// Largest object taken: a 1 GiB segment that does not compress, with its header, and room for packs.
pub const OBJECT_BYTES_MAX: u64 = (1 << 30) + (16 << 20);
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
    sha256: [u8; 32],
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

    /// SHA-256 of the body.
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// Keeps memory or file alive.
    pub fn keep(&self) -> impl Send + 'static {
        Arc::clone(&self.hold)
    }
}

/// What a sender announced.
#[derive(Debug, Clone, Copy)]
pub struct Announced {
    /// Bytes of the object.
    pub size_bytes: u64,
    /// SHA-256 of the object; absent when only its reader can tell whether it is whole.
    pub sha256: Option<[u8; 32]>,
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

    /// Takes one body in, and checks it.
    ///
    /// # Errors
    /// [`Refusal::BodyDamaged`] when it is not what was announced, [`Refusal::Silence`], what the stream says.
    pub async fn receive<S>(&self, announced: Announced, chunks: S) -> Result<Received, Refusal>
    where
        S: Stream<Item = Result<Bytes, Refusal>> + Unpin,
    {
        if announced.size_bytes > OBJECT_BYTES_MAX {
            return Err(Refusal::BodyDamaged(format!(
                "{} bytes are more than an object may have",
                announced.size_bytes
            )));
        }
        match self.memory(announced.size_bytes).await {
            Some(permit) => {
                let mut bytes = Vec::with_capacity(announced.size_bytes as usize);
                let mut checked = Checked::new(announced, chunks);
                while let Some(chunk) = checked.next().await? {
                    bytes.extend_from_slice(&chunk);
                }
                let body = Body::Memory(Bytes::from(bytes));
                Ok(Received { body, sha256: checked.found, hold: Arc::new(Hold::Memory { _permit: permit }) })
            }
            None => self.receive_to_file(announced, chunks).await,
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

    async fn receive_to_file<S>(&self, announced: Announced, chunks: S) -> Result<Received, Refusal>
    where
        S: Stream<Item = Result<Bytes, Refusal>> + Unpin,
    {
        let path = self.directory.join(uuid::Uuid::now_v7().to_string());
        let mut file = File::create_new(&path).await.map_err(Refusal::StateDirectory)?;
        let hold = Arc::new(Hold::File(path.clone()));
        let mut checked = Checked::new(announced, chunks);
        while let Some(chunk) = checked.next().await? {
            file.write_all(&chunk).await.map_err(Refusal::StateDirectory)?;
        }
        file.flush().await.map_err(Refusal::StateDirectory)?;
        let body = Body::File { path, len: announced.size_bytes };
        Ok(Received { body, sha256: checked.found, hold })
    }
}

/// Passes chunks on while they keep to the announcement.
struct Checked<S> {
    announced: Announced,
    chunks: S,
    hash: Sha256,
    seen_bytes: u64,
    /// SHA-256 of what came, once all of it did.
    found: [u8; 32],
}

impl<S> Checked<S>
where
    S: Stream<Item = Result<Bytes, Refusal>> + Unpin,
{
    fn new(announced: Announced, chunks: S) -> Self {
        Self { announced, chunks, hash: Sha256::new(), seen_bytes: 0, found: [0; 32] }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Refusal> {
        let next = tokio::time::timeout(SILENCE_MAX, self.chunks.next()).await;
        let Some(chunk) = next.map_err(|_| Refusal::Silence(SILENCE_MAX.as_secs()))? else {
            return self.finish().map(|()| None);
        };
        let chunk = chunk?;
        self.seen_bytes += chunk.len() as u64;
        if self.seen_bytes > self.announced.size_bytes {
            return Err(Refusal::BodyDamaged(format!(
                "more than the announced {} bytes came",
                self.announced.size_bytes
            )));
        }
        self.hash.update(&chunk);
        Ok(Some(chunk))
    }

    fn finish(&mut self) -> Result<(), Refusal> {
        if self.seen_bytes != self.announced.size_bytes {
            let (seen, announced) = (self.seen_bytes, self.announced.size_bytes);
            return Err(Refusal::BodyDamaged(format!("{seen} of {announced} bytes came")));
        }
        self.found = std::mem::take(&mut self.hash).finalize().into();
        if self.announced.sha256.is_none_or(|announced| announced == self.found) {
            Ok(())
        } else {
            Err(Refusal::BodyDamaged("its SHA-256 is not the announced one".to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;

    fn announced(content: &[u8]) -> Announced {
        Announced { size_bytes: content.len() as u64, sha256: Some(Sha256::digest(content).into()) }
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
            let received = intake.receive(announced(&content), chunks(&content, 1 << 20)).await.unwrap();
            assert_eq!(matches!(received.body(), Body::Memory(_)), expect_memory);
            assert_eq!(Some(received.sha256()), announced(&content).sha256);
            assert_eq!(received.body().sha256().await.unwrap(), received.sha256());
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
            let refusal = intake.receive(right, chunks(content, 4)).await.unwrap_err();
            assert_eq!(refusal.reason(), "BODY_DAMAGED");
        }
        let huge = Announced { size_bytes: OBJECT_BYTES_MAX + 1, ..right };
        assert_eq!(intake.receive(huge, chunks(b"", 4)).await.unwrap_err().reason(), "BODY_DAMAGED");
    }
}
