//! What to do about a catalog that cannot be read: it is an index, so it is moved aside and made anew from the stores.
//!
//! Damaged is a file that SQLite cannot read, whose pages contradict each other, or that holds values we never wrote. A
//! catalog of a newer version is not damaged, and neither is a file that may not be opened: those are refused, because an
//! operator can mend them. The damaged file stays for whoever wants to know what happened to the disk, up to [`KEPT`] of
//! them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rusqlite::{Connection, Error, ErrorCode};

use super::{CatalogError, CatalogResult, FILE_NAME};

/// Damaged catalogs kept; the oldest go first.
const KEPT: usize = 3;
/// What the names of damaged catalogs begin with.
const ASIDE: &str = "catalog.damaged-";
/// What SQLite keeps beside its file.
const COMPANIONS: [&str; 3] = ["", "-wal", "-shm"];
/// Tables without which a file is no catalog of ours.
const TABLES: [&str; 10] =
    ["fact", "cluster", "wal", "wal_missing", "backup", "backup_store", "operation", "schedule_run", "seat", "sender"];

impl CatalogError {
    /// Whether the file is damaged, so that only making it anew helps.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Open { source, .. } | Self::Statement(source) => is_corrupt(source),
            Self::Broken { .. } | Self::Damaged { .. } => true,
            Self::Newer { .. } | Self::Aside { .. } | Self::Closed => false,
        }
    }
}

/// Whether SQLite says that what it read makes no sense.
fn is_corrupt(error: &Error) -> bool {
    match error {
        // A column holds what a strict table never takes.
        Error::FromSqlConversionFailure(..) | Error::IntegralValueOutOfRange(..) | Error::InvalidColumnType(..) => true,
        error => matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)),
    }
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
    let names = (0..).map(|number: u32| match number {
        0 => format!("{ASIDE}{time}"),
        number => format!("{ASIDE}{time}.{number}"),
    });
    let aside = names.map(|name| directory.join(name)).find(|aside| !aside.exists()).expect("numbers do not end");
    for companion in COMPANIONS {
        match fs::rename(beside(path, companion), beside(&aside, companion)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    forget_oldest(directory)?;
    Ok(aside)
}

fn forget_oldest(directory: &Path) -> io::Result<()> {
    let mut kept = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(ASIDE) && COMPANIONS[1..].iter().all(|companion| !name.ends_with(companion)) {
            kept.push(directory.join(name));
        }
    }
    kept.sort();
    for oldest in kept.iter().take(kept.len().saturating_sub(KEPT)) {
        remove(oldest)?;
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

    #[tokio::test]
    async fn damage_that_shows_while_running_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (catalog, thread, _) = Catalog::open(directory.path()).unwrap();
        let odd = || CatalogError::Damaged { what: "a node name", value: "?".to_owned() };
        assert!(catalog.call(|connection| Ok(connection.execute("SELECT nonsense", [])?)).await.is_err());
        assert!(!catalog.is_damaged());
        assert!(catalog.call::<(), _>(move |_| Err(odd())).await.is_err());
        assert!(catalog.is_damaged());
        catalog.damaged().await;
        drop(catalog);
        thread.join();
    }
}
