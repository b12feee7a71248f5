//! The manifest of the backup that is restored, on this host's disk: compared with what the root says, and then read from
//! its beginning as often as needed, because its files may be too many to remember.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use repository::backup::manifest::{ManifestDamage, ManifestReader};
use repository::backup::{BackupError, fetch_manifest_file};
use repository::key::{self, ObjectKey};
use repository::name::{BackupId, StoreName};

use super::sources::Sources;
use super::{RestoreError, RestoreSource};
use crate::from_start::FromStart;

/// A manifest that is what the root says.
#[derive(Debug, Clone)]
pub(super) struct Manifest {
    file: Arc<File>,
    backup: BackupId,
    /// Where it came from.
    store: StoreName,
    key: ObjectKey,
}

impl Manifest {
    /// Fetches it from the first store that has it whole. It takes its own size in `scratch`, in a file without a name.
    pub(super) async fn fetch(source: &RestoreSource, sources: &Sources, scratch: &Path) -> Result<Self, RestoreError> {
        let mut last = None;
        for index in sources.in_order() {
            let store = sources.store(index);
            match fetch_manifest_file(store.as_ref(), &source.cluster, &source.backup, scratch).await {
                Ok(file) => {
                    let key = key::manifest(&source.cluster, &source.backup.backup);
                    let (file, store) = (Arc::new(file), store.name().clone());
                    return Ok(Self { file, backup: source.backup.backup, store, key });
                }
                Err(error) => {
                    sources.warn(format!("store {}: the manifest could not be read: {error}", store.name()));
                    sources.leave(index);
                    last = Some(error);
                }
            }
        }
        let error = last.ok_or(RestoreError::NoStore)?;
        Err(RestoreError::Manifest { backup: source.backup.backup.to_string(), source: Box::new(error) })
    }

    /// Its lines, from the first one after the head.
    pub(super) fn lines(&self) -> Result<ManifestReader<FromStart>, RestoreError> {
        let from_start = FromStart::of(&self.file);
        ManifestReader::new(from_start).map_err(|damage| self.damaged(damage))
    }

    /// What it is when a line cannot be read: it was published so, or the disk it lies on now is broken.
    pub(super) fn damaged(&self, damage: ManifestDamage) -> RestoreError {
        let source = BackupError::Manifest { store: self.store.clone(), key: self.key.clone(), damage };
        RestoreError::Manifest { backup: self.backup.to_string(), source: Box::new(source) }
    }
}
