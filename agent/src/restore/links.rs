//! Symbolic links of a backup other than those of tablespaces: which are made again, where they lead, and which are not.
//!
//! A server that writes through a link writes into what may be another server's. So a link that leads to a directory
//! elsewhere is made only if that is asked for, and then that directory must be free; nothing of what lay behind it is in
//! the backup. `pg_wal` is a directory in every backup, whatever it was; it becomes a link if that is asked for.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use repository::backup::manifest::Link;
use repository::byte_text::ByteText;

use super::Place;
use super::outline::Outline;
use super::target::{self, TablespaceTarget, TargetError};

/// Where WAL lies, below the data directory.
pub(super) const WAL: &str = "pg_wal";

/// What becomes of links.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkChoice {
    /// Where links lead that are named by their path below the data directory; `pg_wal` may be named though it is none.
    pub map: BTreeMap<PathBuf, PathBuf>,
    /// What becomes of all others.
    pub others: OtherLinks,
}

/// What becomes of links that are not named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OtherLinks {
    /// Those that lead to directories elsewhere are not made.
    #[default]
    WithoutDirectories,
    /// All are made, and lead to where they led.
    All,
}

/// A link that is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MadeLink {
    /// Its path below the data directory.
    pub(super) path: PathBuf,
    /// What it points to.
    pub(super) target: PathBuf,
    /// The directory elsewhere that it leads to, which is made as well.
    pub(super) directory: Option<PathBuf>,
}

/// The links of a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PlacedLinks {
    pub(super) made: Vec<MadeLink>,
    /// What deserves a look; one line each.
    pub(super) told: Vec<String>,
}

impl PlacedLinks {
    /// The directories elsewhere that are written to.
    pub(super) fn directories(&self) -> impl Iterator<Item = &Path> {
        self.made.iter().filter_map(|link| link.directory.as_deref())
    }

    /// Whether `pg_wal` is a link.
    pub(super) fn wal(&self) -> Option<&MadeLink> {
        self.made.iter().find(|link| link.path == Path::new(WAL))
    }
}

/// Decides about all links. Looks at what is there, touches nothing.
pub(super) fn place(root: &Path, outline: &Outline, choice: &LinkChoice) -> Result<PlacedLinks, TargetError> {
    check_names(&outline.links, choice)?;
    let mut placed = PlacedLinks::default();
    for link in &outline.links {
        let path = link.path.as_path().to_owned();
        let target = to_path(&link.target);
        match (choice.map.get(&path), choice.others) {
            (Some(mapped), _) => {
                let directory = link.directory.then(|| mapped.clone());
                placed.made.push(MadeLink { path, target: mapped.clone(), directory });
            }
            (None, OtherLinks::All) => {
                let directory = elsewhere(root, link).filter(|_| link.directory);
                placed.made.push(MadeLink { path, target, directory });
            }
            (None, OtherLinks::WithoutDirectories) => {
                // Onto what is there: the link is this server's own already.
                let is_there = fs::read_link(root.join(&path)).is_ok_and(|to| to == target);
                let leads_away = elsewhere(root, link).is_some_and(|end| link.directory || end.is_dir());
                match leads_away && !is_there {
                    true => placed.told.push(left_out(&path, &target)),
                    false => placed.made.push(MadeLink { path, target, directory: None }),
                }
            }
        }
    }
    place_wal(root, outline.head.wal_directory.as_ref(), choice, &mut placed);
    Ok(placed)
}

fn left_out(path: &Path, target: &Path) -> String {
    format!(
        "{} was a link to the directory {}, which may be another server's, and was not made: make a directory or a link of \
         your own there if the server needs it, or have it made with --link-map {}=DIR",
        path.display(),
        target.display(),
        path.display()
    )
}

fn place_wal(root: &Path, led_to: Option<&ByteText>, choice: &LinkChoice, placed: &mut PlacedLinks) {
    let led_to = led_to.map(|led_to| plain(&root.join(to_path(led_to))));
    let mapped = choice.map.get(Path::new(WAL)).cloned();
    let wanted = mapped.or_else(|| led_to.clone().filter(|_| choice.others == OtherLinks::All));
    if let Some(target) = wanted {
        placed.made.push(MadeLink { path: PathBuf::from(WAL), directory: Some(target.clone()), target });
    } else if let Some(led_to) = led_to.filter(|_| !root.join(WAL).is_symlink()) {
        placed.told.push(format!(
            "{WAL} was a link to {} and is a directory now: --link-map {WAL}=DIR puts it elsewhere",
            led_to.display()
        ));
    }
}

fn check_names(links: &[Link], choice: &LinkChoice) -> Result<(), TargetError> {
    let known = |name: &Path| name == Path::new(WAL) || links.iter().any(|link| link.path.as_path() == name);
    if let Some(from) = choice.map.keys().find(|name| !known(name)) {
        let known = links.iter().map(|link| link.path.to_string()).chain([WAL.to_owned()]);
        let known: Vec<String> = known.collect();
        return Err(TargetError::LinkUnknown { from: from.clone(), known: known.join(" or ") });
    }
    match choice.map.values().find(|place| !place.is_absolute()) {
        Some(path) => Err(TargetError::Relative { path: path.clone() }),
        None => Ok(()),
    }
}

/// Refuses directories behind links that are taken, or that lie in one another or in the way of anything else.
pub(super) fn check(
    root: &Path,
    place: Place,
    placed: &PlacedLinks,
    tablespaces: &[TablespaceTarget],
) -> Result<(), TargetError> {
    let mut others: Vec<&Path> = tablespaces.iter().map(|tablespace| tablespace.location.as_path()).collect();
    others.push(root);
    for link in &placed.made {
        let Some(directory) = link.directory.as_deref() else { continue };
        if let Some(other) = others.iter().find(|other| directory.starts_with(other) || other.starts_with(directory)) {
            let (path, inner, outer) = (link.path.clone(), directory.to_owned(), (*other).to_owned());
            return Err(TargetError::LinkOverlap { path, inner, outer });
        }
        others.push(directory);
        let leads_to = fs::read_link(root.join(&link.path)).ok();
        match leads_to {
            Some(leads_to) if place == Place::Existing && leads_to == link.target => {}
            // What lies there would neither be used nor removed.
            Some(old) if place == Place::Existing && link.path == Path::new(WAL) => {
                let (what, new) = (WAL.to_owned(), directory.to_owned());
                return Err(TargetError::LeftBehind { what, link: root.join(&link.path), old, new });
            }
            _ => target::check_free(directory)?,
        }
    }
    Ok(())
}

/// Where a link leads, if that is not below the data directory. By its text, because what is restored is not there yet.
fn elsewhere(root: &Path, link: &Link) -> Option<PathBuf> {
    let path = root.join(link.path.as_path());
    let target = plain(&path.parent().unwrap_or(root).join(to_path(&link.target)));
    (!target.starts_with(plain(root))).then_some(target)
}

fn to_path(text: &ByteText) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(text.as_bytes()))
}

/// The path without `.` and `..`, by its text alone.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use repository::byte_text::RelativePath;

    use super::*;

    fn link(path: &str, target: &str, directory: bool) -> Link {
        Link { path: RelativePath::new(path).unwrap(), target: ByteText::new(target), directory }
    }

    fn outline(links: &[Link], wal: Option<&str>) -> Outline {
        Outline::of_links(links.to_vec(), wal.map(ByteText::new))
    }

    fn choice(map: &[(&str, &str)], others: OtherLinks) -> LinkChoice {
        let map = map.iter().map(|(name, place)| (PathBuf::from(name), PathBuf::from(place))).collect();
        LinkChoice { map, others }
    }

    #[test]
    fn a_link_to_a_directory_elsewhere_is_made_only_if_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("data");
        fs::create_dir_all(folder.path().join("live/log")).unwrap();
        fs::write(folder.path().join("live/file"), b"").unwrap();
        let live = folder.path().join("live").display().to_string();
        let check = |path: &str, target: &str, directory: bool, left_out: bool| {
            let outline = outline(&[link(path, target, directory)], None);
            let placed = place(&root, &outline, &LinkChoice::default()).unwrap();
            assert_eq!(
                (placed.made.len(), placed.told.len()),
                (1 - usize::from(left_out), usize::from(left_out)),
                "{target}"
            );
            let all = place(&root, &outline, &choice(&[], OtherLinks::All)).unwrap();
            assert_eq!((all.made.len(), all.told.len()), (1, 0), "{target}");
            assert_eq!(all.made[0].target, Path::new(target));
            let mapped = place(&root, &outline, &choice(&[(path, "/x")], OtherLinks::default())).unwrap();
            let directory = directory.then(|| PathBuf::from("/x"));
            assert_eq!(mapped.made, [MadeLink { path: path.into(), target: "/x".into(), directory }]);
        };
        check("log", "/nonexistent/log", true, true);
        check("log", "/nonexistent/log", false, false);
        check("log", &format!("{live}/log"), false, true);
        check("log", "../live/log", false, true);
        check("log", "x/../../live/log", true, true);
        check("postgresql.conf", &format!("{live}/file"), false, false);
        check("log", "other", true, false);
        check("a/log", "../b", true, false);
        check("a/log", &format!("{}/b", root.display()), true, false);
    }

    #[test]
    fn pg_wal_becomes_a_link_if_asked_for() {
        let root = Path::new("/nonexistent/data");
        let check = |led_to: Option<&str>, choice: LinkChoice, expected: Option<&str>, told: usize| {
            let placed = place(root, &outline(&[], led_to), &choice).unwrap();
            assert_eq!(placed.wal().map(|link| link.target.as_path()), expected.map(Path::new));
            assert_eq!((placed.told.len(), placed.directories().count()), (told, usize::from(expected.is_some())));
        };
        check(None, LinkChoice::default(), None, 0);
        check(None, choice(&[], OtherLinks::All), None, 0);
        check(Some("/fast/wal"), LinkChoice::default(), None, 1);
        check(Some("/fast/wal"), choice(&[], OtherLinks::All), Some("/fast/wal"), 0);
        check(Some("../wal"), choice(&[], OtherLinks::All), Some("/nonexistent/wal"), 0);
        check(Some("/fast/wal"), choice(&[("pg_wal", "/other")], OtherLinks::All), Some("/other"), 0);
        check(None, choice(&[("pg_wal", "/other")], OtherLinks::default()), Some("/other"), 0);
    }

    #[test]
    fn maps_that_fit_nothing_and_places_in_the_way_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("data");
        let at = |name: &str| folder.path().join(name).display().to_string();
        fs::create_dir(folder.path().join("taken")).unwrap();
        fs::write(folder.path().join("taken/precious"), b"").unwrap();
        let tablespaces = [TablespaceTarget { oid: 1, location: folder.path().join("space") }];
        let refused = |map: &[(&str, &str)]| {
            let placed =
                place(&root, &outline(&[link("log", "/nonexistent", true)], None), &choice(map, OtherLinks::default()));
            placed.and_then(|placed| super::check(&root, Place::Free, &placed, &tablespaces)).unwrap_err()
        };
        let unknown = refused(&[("base", "/x")]).to_string();
        assert!(unknown.contains("base") && unknown.contains("log or pg_wal"), "{unknown}");
        assert!(matches!(refused(&[("log", "x")]), TargetError::Relative { .. }));
        assert!(matches!(refused(&[("pg_wal", &at("data/wal"))]), TargetError::LinkOverlap { .. }));
        assert!(matches!(refused(&[("pg_wal", &at("space"))]), TargetError::LinkOverlap { .. }));
        assert!(matches!(refused(&[("pg_wal", &at("a")), ("log", &at("a/b"))]), TargetError::LinkOverlap { .. }));
        assert!(matches!(refused(&[("pg_wal", &at("taken"))]), TargetError::Occupied { .. }));
        // Onto what is there.
        fs::create_dir(&root).unwrap();
        std::os::unix::fs::symlink(at("taken"), root.join(WAL)).unwrap();
        let onto = |to: &str| {
            let placed = place(&root, &outline(&[], None), &choice(&[(WAL, to)], OtherLinks::default())).unwrap();
            super::check(&root, Place::Existing, &placed, &[])
        };
        onto(&at("taken")).unwrap();
        assert!(matches!(onto(&at("new")), Err(TargetError::LeftBehind { .. })));
    }
}
