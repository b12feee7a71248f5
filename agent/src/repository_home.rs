//! The repository that this node archives into, as its coordinator says; remembered over restarts.
//!
//! "It is durable" is true of one repository. An answer that was given for another one, such as that of a store that was
//! lost and began anew, says nothing; and a direct store of another one takes WAL that nobody finds. So answers and the
//! direct store are held against the identity that is kept here.
//!
//! Invariants: it is known only from a coordinator. One that says it has no repository at all (an empty disk) leaves what
//! is known, and no remembered answer counts until there is one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::durable;

/// Where the identity is remembered, and what was heard last.
#[derive(Debug)]
pub struct RepositoryHome {
    path: PathBuf,
    heard: Mutex<Heard>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    known: Option<Uuid>,
    absent: bool,
}

/// What a word of the coordinator changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    Same,
    /// It is known now and was not before.
    Learnt,
    /// It was this one before.
    Moved(Uuid),
}

impl RepositoryHome {
    /// What the file remembers; nothing when there is none.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let heard = Heard { known: remembered(path)?, absent: false };
        Ok(Self { path: path.to_owned(), heard: Mutex::new(heard) })
    }

    /// The repository, as far as a coordinator ever said.
    pub fn known(&self) -> Option<Uuid> {
        self.heard().known
    }

    /// Whether the coordinator said last that it has no repository.
    pub fn is_absent(&self) -> bool {
        self.heard().absent
    }

    /// The coordinator says which repository it has. It counts from now on, even if it could not be written.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn told(&self, repository: Uuid) -> io::Result<Change> {
        let mut heard = self.heard();
        let before = heard.known.replace(repository);
        heard.absent = false;
        let change = match before {
            Some(before) if before == repository => return Ok(Change::Same),
            Some(before) => Change::Moved(before),
            None => Change::Learnt,
        };
        durable::replace(&self.path, format!("{repository}\n").as_bytes(), 0o600)?;
        Ok(change)
    }

    /// The coordinator says that it has none.
    pub fn told_absent(&self) {
        self.heard().absent = true;
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The identity in a file. A file that holds none is as good as no file: the coordinator says it again.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn remembered(path: &Path) -> io::Result<Option<Uuid>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().parse().ok()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes a coordinator's word and says in the log when it moves answers: a repository is rarely another one.
pub fn take_word(home: &RepositoryHome, repository: &str) {
    if repository.is_empty() {
        return home.told_absent();
    }
    let Ok(repository) = repository.parse() else {
        return tracing::warn!(repository, "the coordinator names its repository in a way that is not understood");
    };
    match home.told(repository) {
        Ok(Change::Moved(before)) => tracing::warn!(%repository, %before,
            "the coordinator has another repository than before; WAL that is still here is archived there anew"),
        Ok(Change::Same | Change::Learnt) => {}
        Err(error) => tracing::warn!(%error, "the identity of the repository could not be remembered"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_remembered_and_absence_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("repository");
        let home = RepositoryHome::open(&path).unwrap();
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert_eq!((home.known(), home.is_absent()), (None, false));
        assert_eq!(home.told(one).unwrap(), Change::Learnt);
        assert_eq!(home.told(one).unwrap(), Change::Same);
        home.told_absent();
        assert_eq!((home.known(), home.is_absent()), (Some(one), true));
        let home = RepositoryHome::open(&path).unwrap();
        assert_eq!((home.known(), home.is_absent()), (Some(one), false));
        home.told_absent();
        assert_eq!(home.told(two).unwrap(), Change::Moved(one));
        assert_eq!((home.known(), home.is_absent()), (Some(two), false));
        fs::write(&path, "nonsense").unwrap();
        assert_eq!(RepositoryHome::open(&path).unwrap().known(), None);
    }
}
