//! What to do about a catalog that cannot be read: it is an index, so it is moved aside and made anew from the stores.
//!
//! Damaged is a file that SQLite cannot read, whose pages contradict each other, or that holds values we never wrote. A
//! catalog of a newer version is not damaged, and neither is a file that may not be opened: those are refused, because an
//! operator can mend them. The damaged file stays for whoever wants to know what happened to the disk: the first one, and
//! the newest up to [`KEPT`] of them.
//!
//! A file that SQLite calls damaged is moved aside always. A value that we would not have written may come back with the new
//! catalog, because it is our own mistake after all, so that is believed once in [`DOUBT`] and only told otherwise.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, Error, ErrorCode};

use super::{Catalog, CatalogError, CatalogResult, FILE_NAME};

/// Damaged catalogs kept.
const KEPT: usize = 3;
/// For how long after a catalog was moved aside an odd value is no reason to move the next one.
pub(super) const DOUBT: Duration = Duration::from_secs(3600);
/// What the names of damaged catalogs begin with.
const ASIDE: &str = "catalog.damaged-";
/// What SQLite keeps beside its file.
const COMPANIONS: [&str; 3] = ["", "-wal", "-shm"];
/// Tables without which a file is no catalog of ours.
const TABLES: [&str; 11] = [
    "fact",
    "cluster",
    "wal",
    "wal_missing",
    "backup",
    "backup_store",
    "backup_reference",
    "operation",
    "schedule_run",
    "seat",
    "sender",
];

impl CatalogError {
    /// Whether the file is damaged, so that only making it anew helps.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Open { source, .. } | Self::Statement(source) => is_corrupt(source),
            Self::Broken { .. } | Self::Damaged { .. } => true,
            Self::Newer { .. } | Self::Aside { .. } | Self::Closed => false,
        }
    }

    /// Whether SQLite itself says so, so that it is not our own mistake.
    pub fn is_certain_damage(&self) -> bool {
        match self {
            Self::Open { source, .. } | Self::Statement(source) => is_refused_by_sqlite(source),
            Self::Broken { .. } => true,
            _ => false,
        }
    }
}

impl Catalog {
    /// Whether the file is to be moved aside at the end of a run, which an error of the catalog may have ended.
    pub fn is_to_be_set_aside(&self, ended_by: Option<&CatalogError>) -> bool {
        self.is_damaged() || ended_by.is_some_and(CatalogError::is_certain_damage)
    }
}

/// Whether SQLite says that what it read makes no sense.
fn is_corrupt(error: &Error) -> bool {
    match error {
        // A column holds what a strict table never takes.
        Error::FromSqlConversionFailure(..) | Error::IntegralValueOutOfRange(..) | Error::InvalidColumnType(..) => true,
        error => is_refused_by_sqlite(error),
    }
}

fn is_refused_by_sqlite(error: &Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// How long ago a catalog of a directory was moved aside last; a moment in the future counts as now.
pub(super) fn last_aside(directory: &Path, now: Timestamp) -> Option<Duration> {
    let newest = aside(directory).ok()?.into_iter().next_back()?;
    let civil = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", &newest.time).ok()?;
    let moved = civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
    Some(Duration::try_from(now.duration_since(moved)).unwrap_or_default())
}

/// A damaged catalog that is kept. The order is that in which they were moved aside.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Aside {
    time: String,
    number: u32,
    path: PathBuf,
}

/// The damaged catalogs of a directory, the first one first.
fn aside(directory: &Path) -> io::Result<Vec<Aside>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(stem) = name.strip_prefix(ASIDE) else { continue };
        if COMPANIONS[1..].iter().any(|companion| name.ends_with(companion)) {
            continue;
        }
        let (time, number) = stem.split_once('.').unwrap_or((stem, "0"));
        if let Ok(number) = number.parse() {
            found.push(Aside { time: time.to_owned(), number, path: directory.join(&name) });
        }
    }
    found.sort();
    Ok(found)
}

/// Reads every page once and compares them.
///
/// # Errors
/// [`CatalogError::Broken`] with the first thing that is wrong, or what SQLite says.
pub(super) fn check_pages(connection: &Connection, path: &Path) -> CatalogResult<()> {
    let open = |source| CatalogError::Open { path: path.to_owned(), source };
    let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(open)?;
    match found.as_str() {
        "ok" => Ok(()),
        _ => Err(CatalogError::Broken { path: path.to_owned(), detail: found }),
    }
}

/// Checks that a migrated file has our tables.
///
/// # Errors
/// [`CatalogError::Broken`].
pub(super) fn check_tables(connection: &Connection, path: &Path) -> CatalogResult<()> {
    for table in TABLES {
        if !connection
            .table_exists(None, table)
            .map_err(|source| CatalogError::Open { path: path.to_owned(), source })?
        {
            return Err(CatalogError::Broken { path: path.to_owned(), detail: format!("it has no table {table}") });
        }
    }
    Ok(())
}

/// Moves the catalog of a directory aside, with what belongs to it; nobody may have it open. Answers its new name.
///
/// # Errors
/// [`CatalogError::Aside`].
pub fn set_aside(directory: &Path, now: Timestamp) -> CatalogResult<PathBuf> {
    let path = directory.join(FILE_NAME);
    let moved = move_aside(directory, &path, now);
    moved.map_err(|source| CatalogError::Aside { path, source })
}

fn move_aside(directory: &Path, path: &Path, now: Timestamp) -> io::Result<PathBuf> {
    let time = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let earlier = aside(directory)?.into_iter().filter(|kept| kept.time == time).map(|kept| kept.number).max();
    let name = match earlier {
        None => format!("{ASIDE}{time}"),
        Some(number) => format!("{ASIDE}{time}.{}", number.saturating_add(1)),
    };
    let aside = directory.join(name);
    for companion in COMPANIONS {
        match fs::rename(beside(path, companion), beside(&aside, companion)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    forget_middle(directory)?;
    Ok(aside)
}

/// Keeps the first one, because what follows may be its consequence, and the newest.
fn forget_middle(directory: &Path) -> io::Result<()> {
    let kept = aside(directory)?;
    for middle in kept.iter().skip(1).take(kept.len().saturating_sub(KEPT)) {
        remove(&middle.path)?;
    }
    Ok(())
}

/// Removes a database file with what SQLite keeps beside it.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    for companion in COMPANIONS {
        match fs::remove_file(beside(path, companion)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn beside(path: &Path, companion: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(companion);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::super::{Catalog, Freshness};
    use super::*;
    use std::os::unix::fs::FileExt;

    fn now() -> Timestamp {
        "2026-11-23T03:41:38Z".parse().unwrap()
    }

    /// A catalog with enough rows to have a middle, closed.
    async fn made(directory: &Path) {
        let (catalog, thread, _) = Catalog::open(directory).unwrap();
        catalog
            .call(|connection| {
                let mut insert = connection.prepare("INSERT INTO schedule_run VALUES (?1, 'x', 1)")?;
                for number in 0..5000 {
                    insert.execute([format!("cluster-{number:040}")])?;
                }
                Ok(())
            })
            .await
            .unwrap();
        drop(catalog);
        thread.join();
    }

    fn overwrite(path: &Path, from: u64, length: usize) {
        let noise: Vec<u8> = (0..length).map(|index| (index.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
        fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(&noise, from).unwrap();
    }

    #[tokio::test]
    async fn whatever_is_overwritten_is_noticed_moved_aside_and_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        made(directory.path()).await;
        let size = fs::metadata(&path).unwrap().len();
        for (from, length) in [(0, 100), (0, 16), (size / 2, 20_000), (size / 3, 4096), (4096, size as usize)] {
            overwrite(&path, from, length);
            let error = Catalog::open(directory.path()).unwrap_err();
            assert!(error.is_damage(), "{from} {length}: {error}");
            let (catalog, thread, freshness) = Catalog::open_or_set_aside(directory.path(), now()).unwrap();
            assert_eq!(freshness, Freshness::New);
            drop(catalog);
            thread.join();
            made(directory.path()).await;
        }
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size / 2).unwrap();
        assert!(Catalog::open(directory.path()).unwrap_err().is_damage());
        let kept = fs::read_dir(directory.path()).unwrap().filter(|entry| {
            entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("catalog.damaged-20261123T034138Z")
        });
        assert_eq!(kept.count(), KEPT);
    }

    #[tokio::test]
    async fn what_an_operator_can_mend_is_no_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        made(directory.path()).await;
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", 999).unwrap();
        drop(connection);
        let error = Catalog::open_or_set_aside(directory.path(), now()).unwrap_err();
        assert!(matches!(error, CatalogError::Newer { .. }) && !error.is_damage());
        assert!(path.exists());
        // A version that nobody ever writes is damage, and so are tables that are not ours.
        for version in [-1, 0] {
            let connection = Connection::open(&path).unwrap();
            connection.pragma_update(None, "user_version", version).unwrap();
            drop(connection);
            assert!(Catalog::open(directory.path()).unwrap_err().is_damage(), "{version}");
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = Catalog::open_or_set_aside(directory.path(), now()).unwrap_err();
        assert!(matches!(error, CatalogError::Open { .. }) && !error.is_damage());
    }

    #[test]
    fn the_first_and_the_newest_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        let names = || aside(directory.path()).unwrap().into_iter().map(|kept| (kept.time, kept.number));
        assert_eq!(last_aside(directory.path(), now()), None);
        for _ in 0..12 {
            fs::write(&path, "x").unwrap();
            fs::write(beside(&path, "-wal"), "x").unwrap();
            set_aside(directory.path(), now()).unwrap();
        }
        let time = || "20261123T034138Z".to_owned();
        assert_eq!(names().collect::<Vec<_>>(), [(time(), 0), (time(), 10), (time(), 11)]);
        let later = now() + Duration::from_secs(90);
        assert_eq!(last_aside(directory.path(), later), Some(Duration::from_secs(90)));
        assert_eq!(last_aside(directory.path(), now() - Duration::from_secs(90)), Some(Duration::ZERO));
        fs::write(&path, "x").unwrap();
        set_aside(directory.path(), later).unwrap();
        assert_eq!(names().collect::<Vec<_>>(), [(time(), 0), (time(), 11), ("20261123T034308Z".to_owned(), 0)]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 5, "with the files beside two of them");
    }

    #[tokio::test]
    async fn an_odd_value_that_comes_back_within_the_hour_ends_nothing() {
        let directory = tempfile::tempdir().unwrap();
        made(directory.path()).await;
        set_aside(directory.path(), process::clock::now()).unwrap();
        let (catalog, thread, _) = Catalog::open(directory.path()).unwrap();
        let odd = || CatalogError::Damaged { what: "a node name", value: "?".to_owned() };
        for _ in 0..2 {
            assert!(catalog.call::<(), _>(move |_| Err(odd())).await.is_err());
            assert!(!catalog.is_damaged());
        }
        let broken = || Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT), None);
        assert!(catalog.call::<(), _>(move |_| Err(broken().into())).await.is_err());
        assert!(catalog.is_damaged());
        drop(catalog);
        thread.join();
    }

    #[tokio::test]
    async fn damage_that_shows_while_running_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (catalog, thread, _) = Catalog::open(directory.path()).unwrap();
        let odd = || CatalogError::Damaged { what: "a node name", value: "?".to_owned() };
        assert!(catalog.call(|connection| Ok(connection.execute("SELECT nonsense", [])?)).await.is_err());
        assert!(!catalog.is_damaged());
        let torn = CatalogError::Broken { path: directory.path().to_owned(), detail: "a page".to_owned() };
        assert!(!catalog.is_to_be_set_aside(Some(&odd())) && catalog.is_to_be_set_aside(Some(&torn)));
        assert!(catalog.call::<(), _>(move |_| Err(odd())).await.is_err());
        assert!(catalog.is_damaged() && catalog.is_to_be_set_aside(None));
        catalog.damaged().await;
        drop(catalog);
        thread.join();
    }
}
