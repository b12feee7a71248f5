//! Whether the directories that a configuration names are what they are meant to be, here and now.
//!
//! Only what would keep the coordinator from running is an error: a store may be unmounted today, and is refused until it is
//! there. Nothing stays behind.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use repository::config::{StoreConfig, StoreKind};
use repository::key;

use crate::RunError;
use crate::config::Settings;

/// How long a file system is waited for: a mount may hang.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is to be noted about the directories, a line each.
///
/// # Errors
/// [`RunError::StateDirectory`] if the state directory cannot be used.
pub(super) fn look(settings: &Settings) -> Result<Vec<String>, RunError> {
    let path = settings.state_directory.clone();
    let found = in_time(path.clone(), state_directory).unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()));
    let mut notes: Vec<String> =
        found.map_err(|source| RunError::StateDirectory { path, source })?.into_iter().collect();
    notes.extend(settings.stores.iter().filter_map(store));
    Ok(notes)
}

/// Runs a look at the file system, and gives up on one that hangs.
fn in_time<T: Send + 'static>(path: PathBuf, look: impl FnOnce(&Path) -> T + Send + 'static) -> Option<T> {
    let (tell, told) = mpsc::sync_channel(1);
    // A thread that hangs in the kernel ends with the process.
    std::thread::spawn(move || tell.send(look(&path)));
    told.recv_timeout(PATIENCE).ok()
}

fn state_directory(path: &Path) -> io::Result<Option<String>> {
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => Err(io::ErrorKind::NotADirectory.into()),
        Ok(_) => {
            let probe = path.join(format!(".check-{}", std::process::id()));
            File::options().write(true).create_new(true).open(&probe)?;
            fs::remove_file(&probe)?;
            Ok(None)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let is_there = |ancestor: &&Path| fs::metadata(ancestor).is_ok();
            let above = path.ancestors().find(is_there).unwrap_or(Path::new("/"));
            if !fs::metadata(above)?.is_dir() {
                return Err(io::ErrorKind::NotADirectory.into());
            }
            Ok(Some(format!("{} is not there yet; it is made in {} at the start", path.display(), above.display())))
        }
        Err(error) => Err(error),
    }
}

/// What is to be noted about a store: nothing about a bucket, which is not spoken to.
fn store(config: &StoreConfig) -> Option<String> {
    let StoreKind::Directory(directory) = &config.kind else { return None };
    let problem = match in_time(directory.path.clone(), store_directory) {
        Some(problem) => problem?,
        None => format!("does not answer within {} s", PATIENCE.as_secs()),
    };
    Some(format!("store {}: {} {problem}", config.name, directory.path.display()))
}

fn store_directory(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Some("is no directory".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Some("is not there: mount it, or make it once by hand".to_owned());
        }
        Err(error) => return Some(format!("cannot be looked at: {error}")),
    }
    match fs::metadata(path.join(key::repository_identity().as_str())) {
        Ok(_) => None,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(
            "holds no repo.json: something is not mounted, or the repository is new and `pgconvoy cluster create` begins it"
                .to_owned(),
        ),
        Err(error) => Some(format!("cannot be looked into: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_is_there_or_can_be_made() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(state_directory(folder.path()).unwrap(), None);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing stays");
        let note = state_directory(&folder.path().join("a/b")).unwrap().unwrap();
        assert!(note.contains(&format!("made in {} ", folder.path().display())), "{note}");
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below")] {
            assert!(state_directory(&path).is_err(), "{}", path.display());
        }
    }

    #[test]
    fn a_store_without_its_repository_is_noted() {
        let folder = tempfile::tempdir().unwrap();
        let noted = |path: &Path| {
            let config = serde_json::json!({"name": "repo1", "kind": "directory", "path": path});
            store(&serde_json::from_value(config).unwrap()).unwrap_or_default()
        };
        assert!(noted(&folder.path().join("mistyped")).contains("is not there"));
        assert!(noted(folder.path()).contains("holds no repo.json"));
        fs::write(folder.path().join("repo.json"), "{}").unwrap();
        assert_eq!(noted(folder.path()), "");
    }
}
