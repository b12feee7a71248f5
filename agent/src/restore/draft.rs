//! What a restore will do, known before anything is touched: what the manifest says, held against what was asked for and
//! against the place. Refuses what cannot be done.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::databases::Known;
use super::links::{self, PlacedLinks};
use super::manifest::Manifest;
use super::outline::Outline;
use super::paths::PathSet;
use super::sources::Sources;
use super::target::{self, TablespaceTarget};
use super::{Place, RestoreError, RestoreOptions, RestoreSource, existing};

/// A restore that can be begun.
pub(super) struct Draft {
    pub(super) manifest: Manifest,
    pub(super) outline: Outline,
    /// The paths of all files, if there is something to compare with them.
    pub(super) paths: Option<PathSet>,
    /// The databases that are wanted; none for all.
    pub(super) databases: Option<Arc<BTreeSet<u32>>>,
    pub(super) tablespaces: Vec<TablespaceTarget>,
    pub(super) links: PlacedLinks,
    /// What deserves a look; one line each.
    pub(super) notes: Vec<String>,
}

impl Draft {
    /// Reads the manifest, and looks at the place.
    pub(super) async fn make(
        source: &RestoreSource,
        sources: &Sources,
        options: &RestoreOptions,
    ) -> Result<Self, RestoreError> {
        let manifest = Manifest::fetch(source, sources, &options.scratch).await?;
        let (options, files) = (options.clone(), source.backup.files);
        super::blocking(move || Self::of(manifest, files, &options)).await
    }

    fn of(manifest: Manifest, files: u64, options: &RestoreOptions) -> Result<Self, RestoreError> {
        let mut paths = match options.place {
            Place::Free => None,
            Place::Existing => Some(PathSet::create_in(&options.scratch, files).map_err(RestoreError::Scratch)?),
        };
        let outline = Outline::gather(&manifest, paths.as_mut())?;
        if !outline.has_control {
            return Err(RestoreError::NoControl);
        }
        let known = Known { named: &outline.head.databases, with_files: &outline.databases };
        let databases = known.wanted(&options.databases)?;
        let zeroed = known.left_out(databases.as_ref());
        let links = links::place(&options.target, &outline, &options.links)?;
        let tablespaces = tablespaces(&outline, options)?;
        links::check(&options.target, options.place, &links, &tablespaces)?;
        let mut notes = links.told.clone();
        notes.extend(zeroed.map(|databases| {
            format!("the files of databases {databases} hold zeros: drop these databases after recovery")
        }));
        Ok(Self { manifest, outline, paths, databases: databases.map(Arc::new), tablespaces, links, notes })
    }
}

/// Where each tablespace goes; refuses places that are taken.
fn tablespaces(outline: &Outline, options: &RestoreOptions) -> Result<Vec<TablespaceTarget>, RestoreError> {
    let located = outline.tablespaces.iter().map(|tablespace| {
        let location = PathBuf::from(OsStr::from_bytes(tablespace.location.as_bytes()));
        (tablespace.oid, location)
    });
    let located: Vec<(u32, PathBuf)> = located.collect();
    let tablespaces = target::place_tablespaces(&options.target, &located, &options.tablespace_map)?;
    for tablespace in &tablespaces {
        match options.place {
            Place::Free => target::check_free(&tablespace.location)?,
            Place::Existing => existing::check_tablespace(&options.target, tablespace)?,
        }
    }
    Ok(tablespaces)
}
