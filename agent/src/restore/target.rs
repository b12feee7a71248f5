//! The place a restore writes to: checked before a byte is fetched, made afterwards.
//!
//! Invariant: nothing that exists is removed or overwritten here; `existing.rs` has the exception that can be asked for. The
//! data directory and every tablespace's location must be absent or empty; a directory with a running server is named as such. Tablespaces never lie inside the data directory
//! or inside one another, compared by whole path components.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use postgres_format::SystemIdentifier;
use thiserror::Error;

/// Files kept in the root of a file system that do not make a directory occupied.
pub(super) const NOT_OCCUPYING: [&str; 1] = ["lost+found"];

/// File in the data directory while a restore goes on.
pub(super) const MARK: &str = "pgconvoy.restore";

/// Why a place cannot be restored to.
#[derive(Debug, Error)]
pub enum TargetError {
    /// Something is there.
    #[error("{path} is not empty: restore into an empty or new directory, or move it away")]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// A server runs on it.
    #[error("{path} belongs to a running server (process {process}): stop it and move the directory away")]
    Running {
        /// The directory.
        path: PathBuf,
        /// Process number from `postmaster.pid`.
        process: i32,
    },
    /// It lies in a data directory.
    #[error("{path} lies inside the data directory {outer}: restore into a directory beside it")]
    Inside {
        /// The directory.
        path: PathBuf,
        /// The data directory around it.
        outer: PathBuf,
    },
    /// Nothing tells whose it is.
    #[error(
        "{path} holds neither a pg_control nor the mark of an unfinished restore, so nothing tells that it belongs to \
         this cluster: restore into an empty or new directory"
    )]
    NobodyKnows {
        /// The directory.
        path: PathBuf,
    },
    /// It is another cluster's.
    #[error("{path} belongs to system {found}, the backup to {expected}: restore into another directory")]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        found: SystemIdentifier,
        /// Whose backup it is.
        expected: SystemIdentifier,
    },
    /// It holds WAL that would be lost.
    #[error(
        "{path} holds WAL that its server has not archived ({first} first, {count} files flagged .ready in \
         pg_wal/archive_status), and it would be removed: run `pgconvoy-wal push pg_wal/{first}` there and so on, keep a \
         copy of pg_wal if what was written last may be needed, and remove those flags"
    )]
    Unarchived {
        /// The directory.
        path: PathBuf,
        /// Name of the first file.
        first: String,
        /// How many there are.
        count: usize,
    },
    /// Not a directory.
    #[error("{path} is not a directory")]
    NotDirectory {
        /// The path.
        path: PathBuf,
    },
    /// Not absolute.
    #[error("{path} is not an absolute path")]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// Two places overlap.
    #[error("{inner} lies inside {outer}: give tablespace {oid} another place with --tablespace-map")]
    Overlap {
        /// The tablespace.
        oid: u32,
        /// Its place.
        inner: PathBuf,
        /// The place around it.
        outer: PathBuf,
    },
    /// A mapping that fits no tablespace of the backup.
    #[error("--tablespace-map names {from:?}, which is no tablespace of this backup; expected {expected}")]
    MapUnknown {
        /// What was named.
        from: String,
        /// What the backup has, for people.
        expected: String,
    },
    /// A database that the backup does not have.
    #[error("the backup has no database {database}, it has {known}")]
    DatabaseUnknown {
        /// What was asked for.
        database: String,
        /// What there is, for people.
        known: String,
    },
    /// A database by its name, of a backup that does not tell names.
    #[error("the backup does not tell the names of its databases: instead of {database} name an OID, it has {known}")]
    DatabaseUnnamed {
        /// What was asked for.
        database: String,
        /// What there is, for people.
        known: String,
    },
    /// A database by what means two of them.
    #[error(
        "{database} is the name of one database and the OID of another: name the one by its OID, the other by its name"
    )]
    DatabaseAmbiguous {
        /// What was asked for.
        database: String,
    },
    /// A link that the backup does not have.
    #[error("--link-map names {from}, which is no link of this backup; expected {known}")]
    LinkUnknown {
        /// What was named.
        from: PathBuf,
        /// What there is, for people.
        known: String,
    },
    /// A directory behind a link lies in the way.
    #[error("{inner} and {outer} lie in one another: give {path} another place with --link-map")]
    LinkOverlap {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        inner: PathBuf,
        /// What is there.
        outer: PathBuf,
    },
    /// What is there lies elsewhere than what it shall become.
    #[error(
        "{what} lies in {old} now and would be made in {new}: the old files would be left behind, so map it to {old}, or \
         move them to {new} and let {link} lead there, or remove that link and keep or remove the files yourself"
    )]
    LeftBehind {
        /// What it is.
        what: String,
        /// The link that leads there.
        link: PathBuf,
        /// Where it lies.
        old: PathBuf,
        /// Where it would lie.
        new: PathBuf,
    },
    /// A restore has begun there and did not end.
    #[error("{path} holds an unfinished restore: go on with it with --delta --confirm, or remove it")]
    Unfinished {
        /// The directory.
        path: PathBuf,
    },
    /// The owner is not known on this host.
    #[error("user {user:?} is not known on this host: name the owner of the data directory")]
    OwnerUnknown {
        /// The name.
        user: String,
    },
    /// The operating system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried, such as "create".
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Who shall own what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User number.
    pub user: u32,
    /// Group number.
    pub group: u32,
}

/// Where a tablespace goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceTarget {
    /// Its object identifier.
    pub oid: u32,
    /// Its new place.
    pub location: PathBuf,
}

/// Old place or object identifier (as text) to new place, from `--tablespace-map`.
pub type TablespaceMap = BTreeMap<String, PathBuf>;

/// PURE: where each tablespace of a backup goes; refuses maps that fit nothing and places that overlap.
pub fn place_tablespaces(
    data_directory: &Path,
    tablespaces: &[(u32, PathBuf)],
    map: &TablespaceMap,
) -> Result<Vec<TablespaceTarget>, TargetError> {
    let names = |oid: u32, location: &Path| [oid.to_string(), location.display().to_string()];
    let known = |from: &String| tablespaces.iter().any(|(oid, location)| names(*oid, location).contains(from));
    if let Some(from) = map.keys().find(|from| !known(from)) {
        let expected: Vec<String> =
            tablespaces.iter().map(|(oid, location)| format!("{oid} ({})", location.display())).collect();
        let expected = if expected.is_empty() { "none, for it has none".to_owned() } else { expected.join(" or ") };
        return Err(TargetError::MapUnknown { from: from.clone(), expected });
    }
    let mut placed: Vec<TablespaceTarget> = Vec::with_capacity(tablespaces.len());
    for (oid, location) in tablespaces {
        let mapped = names(*oid, location).iter().find_map(|name| map.get(name));
        let location = mapped.unwrap_or(location).clone();
        if !location.is_absolute() {
            return Err(TargetError::Relative { path: location });
        }
        let others = placed.iter().map(|other| other.location.as_path()).chain([data_directory]);
        for other in others {
            if location.starts_with(other) || other.starts_with(&location) {
                return Err(TargetError::Overlap { oid: *oid, inner: location.clone(), outer: other.to_owned() });
            }
        }
        placed.push(TablespaceTarget { oid: *oid, location });
    }
    Ok(placed)
}

/// Refuses a directory with anything in it, or in a data directory; absent and empty are both fine.
pub fn check_free(path: &Path) -> Result<(), TargetError> {
    if !path.is_absolute() {
        return Err(TargetError::Relative { path: path.to_owned() });
    }
    if let Some(outer) = data_directory_around(path) {
        return Err(TargetError::Inside { path: path.to_owned(), outer });
    }
    let refused = |source| TargetError::Io { action: "read", path: path.to_owned(), source };
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(TargetError::NotDirectory { path: path.to_owned() });
        }
        Err(error) => return Err(refused(error)),
    };
    for entry in entries {
        let name = entry.map_err(refused)?.file_name();
        if !NOT_OCCUPYING.iter().any(|allowed| name == *allowed) {
            return Err(match running_server(path) {
                Some(process) => TargetError::Running { path: path.to_owned(), process },
                None if path.join(MARK).exists() => TargetError::Unfinished { path: path.to_owned() },
                None => TargetError::Occupied { path: path.to_owned() },
            });
        }
    }
    Ok(())
}

/// The data directory that a place lies in: its server, and every backup of it, would take the place for its own.
fn data_directory_around(path: &Path) -> Option<PathBuf> {
    let existing = path.ancestors().skip(1).find_map(|above| fs::canonicalize(above).ok())?;
    let is_one = |above: &&Path| above.join("PG_VERSION").exists() && above.join("global/pg_control").exists();
    existing.ancestors().find(is_one).map(Path::to_owned)
}

/// Process number of the server that runs on a data directory.
fn running_server(data_directory: &Path) -> Option<i32> {
    let text = fs::read_to_string(data_directory.join("postmaster.pid")).ok()?;
    let process = text.lines().next()?.trim().parse().ok()?;
    let number = rustix::process::Pid::from_raw(process)?;
    match rustix::process::test_kill_process(number) {
        // A number that another process has got since: servers stand in their data directory.
        Ok(()) | Err(rustix::io::Errno::PERM) => match fs::read_link(format!("/proc/{process}/cwd")) {
            Ok(stands) if fs::canonicalize(data_directory).is_ok_and(|real| real != stands) => None,
            _ => Some(process),
        },
        Err(_) => None,
    }
}

/// Makes a directory with a mode, parents included; an existing empty one gets the mode and owner.
pub fn make_directory(path: &Path, mode: u32, owner: Option<Owner>) -> Result<(), TargetError> {
    let refused = |source| TargetError::Io { action: "create", path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(refused)?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(refused(error)),
        Ok(()) | Err(_) => {}
    }
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::set_permissions(path, permissions).map_err(refused)?;
    // A directory given as a link to one: the server looks at the owner of its end.
    let Some(owner) = owner else { return Ok(()) };
    std::os::unix::fs::chown(path, Some(owner.user), Some(owner.group)).map_err(refused)
}

/// Hands a path (a link itself, not its end) to its owner.
pub fn give(path: &Path, owner: Option<Owner>) -> Result<(), TargetError> {
    let Some(owner) = owner else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(owner.user), Some(owner.group)).map_err(|source| TargetError::Io {
        action: "change the owner of",
        path: path.to_owned(),
        source,
    })
}

/// Who shall own the files: nobody else unless we are root; then the user named, the owner of an existing target, or
/// `postgres` (the server refuses to run as root, and to use a data directory of another user).
pub fn owner_for(target: &Path, user: Option<&str>) -> Result<Option<Owner>, TargetError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    if let (None, Ok(found)) = (user, fs::metadata(target))
        && found.uid() != 0
    {
        return Ok(Some(Owner { user: found.uid(), group: found.gid() }));
    }
    let user = user.unwrap_or("postgres");
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    account(user, &passwd).map(Some).ok_or_else(|| TargetError::OwnerUnknown { user: user.to_owned() })
}

fn account(user: &str, passwd: &str) -> Option<Owner> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, number, group, ..] = fields[..] else { return None };
        (name == user).then_some(())?;
        Some(Owner { user: number.parse().ok()?, group: group.parse().ok()? })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_a_data_directory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        fs::create_dir_all(data.join("global")).unwrap();
        let inside = data.join("deep/inside");
        check_free(&inside).unwrap();
        fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        fs::write(data.join("global/pg_control"), "").unwrap();
        std::os::unix::fs::symlink(&data, folder.path().join("link")).unwrap();
        for path in [inside, folder.path().join("link/x")] {
            assert!(matches!(check_free(&path), Err(TargetError::Inside { .. })), "{path:?}");
        }
        check_free(&folder.path().join("beside")).unwrap();
    }

    #[test]
    fn free_means_absent_or_empty() {
        let folder = tempfile::tempdir().unwrap();
        check_free(folder.path()).unwrap();
        check_free(&folder.path().join("absent")).unwrap();
        fs::create_dir(folder.path().join("lost+found")).unwrap();
        check_free(folder.path()).unwrap();
        fs::write(folder.path().join("a"), "").unwrap();
        assert!(matches!(check_free(folder.path()), Err(TargetError::Occupied { .. })));
        assert!(matches!(check_free(&folder.path().join("a")), Err(TargetError::NotDirectory { .. })));
        fs::write(folder.path().join("postmaster.pid"), std::process::id().to_string()).unwrap();
        assert!(matches!(check_free(folder.path()), Err(TargetError::Occupied { .. })), "it stands elsewhere");
        let mut server = std::process::Command::new("sleep").arg("60").current_dir(folder.path()).spawn().unwrap();
        fs::write(folder.path().join("postmaster.pid"), server.id().to_string()).unwrap();
        assert!(matches!(check_free(folder.path()), Err(TargetError::Running { .. })));
        server.kill().unwrap();
        server.wait().unwrap();
        assert!(matches!(check_free(Path::new("relative")), Err(TargetError::Relative { .. })));
    }

    #[test]
    fn tablespaces_are_mapped_and_never_overlap() {
        let data = Path::new("/new/data");
        let backup = [(16400, PathBuf::from("/ts/a")), (16401, PathBuf::from("/ts/b"))];
        let map =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(from, to)| ((*from).to_owned(), PathBuf::from(to))).collect();
        let place = |pairs: &[(&str, &str)]| {
            let placed = place_tablespaces(data, &backup, &map(pairs));
            placed.map(|placed| placed.iter().map(|target| target.location.display().to_string()).collect::<Vec<_>>())
        };
        assert_eq!(place(&[]).unwrap(), ["/ts/a", "/ts/b"]);
        assert_eq!(place(&[("16400", "/x"), ("/ts/b", "/y")]).unwrap(), ["/x", "/y"]);
        assert_eq!(place(&[("16400", "/new/data2")]).unwrap(), ["/new/data2", "/ts/b"]);
        assert!(matches!(place(&[("16400", "/new/data/ts")]), Err(TargetError::Overlap { .. })));
        assert!(matches!(place(&[("16400", "/ts/b")]), Err(TargetError::Overlap { .. })));
        assert!(matches!(place(&[("16400", "/new")]), Err(TargetError::Overlap { .. })));
        assert!(matches!(place(&[("16400", "x")]), Err(TargetError::Relative { .. })));
        let unknown = place(&[("1", "/x")]).unwrap_err();
        assert!(matches!(unknown, TargetError::MapUnknown { .. }));
        assert!(unknown.to_string().contains("expected 16400 (/ts/a) or 16401 (/ts/b)"), "{unknown}");
    }

    #[test]
    fn accounts() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgres:x:101:104::/:/bin/sh\n";
        assert_eq!(account("postgres", passwd), Some(Owner { user: 101, group: 104 }));
        assert_eq!(account("nobody", passwd), None);
    }
}
