//! WAL objects in the catalog: what exists, what its header says, which store lacks it, who writes a timeline.

use jiff::Timestamp;
use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use repository::fingerprint::Fingerprint;
use repository::name::{ClusterName, NodeName, StoreName};
use rusqlite::{Connection, Row, Rows, params};

use super::{CatalogError, CatalogResult};

/// Names one WAL object of the repository. A history file has no fingerprint in its key, only one can exist.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalObject {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Its system identifier.
    pub system_identifier: SystemIdentifier,
    /// The file's name in `pg_wal`.
    pub name: WalFileName,
    /// Which content; absent for history files.
    pub fingerprint: Option<Fingerprint>,
}

/// What the object's header says about its sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalFacts {
    /// The node that sent it.
    pub node: NodeName,
    /// Whether that node was in recovery.
    pub in_recovery: bool,
    /// Whether the file is complete.
    pub complete: bool,
    /// When the object was made, by the node's clock.
    pub written: Timestamp,
}

/// A row: the object, its size, and its header's facts once somebody has read them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalRow {
    /// The object.
    pub object: WalObject,
    /// Bytes of the object in a store.
    pub size_bytes: u64,
    /// From its header; absent until read.
    pub facts: Option<WalFacts>,
}

/// One object of a listing, and which of the listed stores showed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedWal {
    /// The object.
    pub object: WalObject,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Stores that showed it and keep it.
    pub present: Vec<StoreName>,
    /// Stores that do not keep it, whether they still have it or not.
    pub expired: Vec<StoreName>,
}

/// Number of the kind in SQL; history files come first wherever rows are sorted.
fn kind(name: WalFileName) -> i64 {
    match name {
        WalFileName::History(_) => 0,
        WalFileName::Segment(_) => 1,
        WalFileName::Partial(_) => 2,
        WalFileName::BackupHistory { .. } => 3,
    }
}

/// Order of a segment within its timeline. The segment part has at most 12 bits (1 MiB segments).
pub(super) fn position(name: WalFileName) -> i64 {
    name.segment().map_or(-1, |segment| (i64::from(segment.log()) << 16) | i64::from(segment.segment()))
}

pub(super) fn system(identifier: SystemIdentifier) -> i64 {
    identifier.as_u64().cast_signed()
}

pub(super) fn fingerprint_text(object: &WalObject) -> String {
    object.fingerprint.map(|fingerprint| fingerprint.to_string()).unwrap_or_default()
}

/// Writes down an object of which the header is known, present in some stores and missing in others.
pub fn note_stored(
    connection: &Connection,
    row: &WalRow,
    present: &[StoreName],
    missing: &[StoreName],
) -> CatalogResult<()> {
    upsert(connection, row)?;
    for store in present {
        mark_present(connection, store, &row.object)?;
    }
    for store in missing {
        mark_missing(connection, store, &row.object)?;
    }
    Ok(())
}

fn upsert(connection: &Connection, row: &WalRow) -> CatalogResult<()> {
    let object = &row.object;
    let facts = row.facts.as_ref();
    connection
        .prepare_cached(
            "INSERT INTO wal (cluster, system_identifier, name, fingerprint, kind, timeline, position, size_bytes,
                              node, in_recovery, complete, written_us)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
             ON CONFLICT DO UPDATE SET node = coalesce(node, excluded.node),
                 in_recovery = coalesce(in_recovery, excluded.in_recovery),
                 complete = coalesce(complete, excluded.complete),
                 written_us = coalesce(written_us, excluded.written_us)",
        )?
        .execute(params![
            object.cluster.as_str(),
            system(object.system_identifier),
            object.name.to_string(),
            fingerprint_text(object),
            kind(object.name),
            object.name.timeline().get(),
            position(object.name),
            row.size_bytes.cast_signed(),
            facts.map(|facts| facts.node.as_str().to_owned()),
            facts.map(|facts| facts.in_recovery),
            facts.map(|facts| facts.complete),
            facts.map(|facts| facts.written.as_microsecond()),
        ])?;
    Ok(())
}

/// A store has the object after all.
pub fn mark_present(connection: &Connection, store: &StoreName, object: &WalObject) -> CatalogResult<bool> {
    let changed = connection
        .prepare_cached(
            "DELETE FROM wal_missing WHERE store = ?1 AND cluster = ?2 AND system_identifier = ?3 AND kind = ?4
                 AND timeline = ?5 AND position = ?6 AND name = ?7 AND fingerprint = ?8",
        )?
        .execute(missing_params(store, object))?;
    Ok(changed > 0)
}

/// A store lacks the object.
pub fn mark_missing(connection: &Connection, store: &StoreName, object: &WalObject) -> CatalogResult<()> {
    connection
        .prepare_cached(
            "INSERT OR IGNORE INTO wal_missing
                 (store, cluster, system_identifier, kind, timeline, position, name, fingerprint)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?
        .execute(missing_params(store, object))?;
    Ok(())
}

pub(super) fn missing_params<'a>(store: &'a StoreName, object: &'a WalObject) -> impl rusqlite::Params + 'a {
    (
        store.as_str(),
        object.cluster.as_str(),
        system(object.system_identifier),
        kind(object.name),
        object.name.timeline().get(),
        position(object.name),
        object.name.to_string(),
        fingerprint_text(object),
    )
}

/// Compares a listing with the catalog: unknown objects get a row, and `wal_missing` follows what the `listed` stores
/// showed. A store of `all` that was not listed keeps what is known of it and lacks every new object. Answers the
/// objects that were unknown.
pub fn record_listing(
    connection: &Connection,
    listing: &[ListedWal],
    listed: &[StoreName],
    all: &[StoreName],
) -> CatalogResult<Vec<ListedWal>> {
    let mut unknown = Vec::new();
    for entry in listing {
        let known = is_known(connection, &entry.object)?;
        if !known {
            let row = WalRow { object: entry.object.clone(), size_bytes: entry.size_bytes, facts: None };
            upsert(connection, &row)?;
            unknown.push(entry.clone());
        }
        for store in all {
            if entry.expired.contains(store) {
                super::expired::mark(connection, store, &entry.object)?;
            } else if entry.present.contains(store) {
                mark_present(connection, store, &entry.object)?;
            } else if !known || listed.contains(store) {
                mark_missing(connection, store, &entry.object)?;
            }
        }
    }
    Ok(unknown)
}

/// Whether the catalog has a row of the object.
pub fn is_known(connection: &Connection, object: &WalObject) -> CatalogResult<bool> {
    let found = connection
        .prepare_cached(
            "SELECT 1 FROM wal WHERE cluster = ?1 AND system_identifier = ?2 AND name = ?3 AND fingerprint = ?4",
        )?
        .exists(params![
            object.cluster.as_str(),
            system(object.system_identifier),
            object.name.to_string(),
            fingerprint_text(object)
        ])?;
    Ok(found)
}

/// The oldest objects a store lacks and should have, and that another one of `stores` stores may have: history files first,
/// then timeline by timeline.
pub fn oldest_missing(
    connection: &Connection,
    store: &StoreName,
    stores: usize,
    limit: u32,
) -> CatalogResult<Vec<WalRow>> {
    let mut statement = connection.prepare_cached(
        "SELECT w.cluster, w.system_identifier, w.name, w.fingerprint, w.size_bytes,
                w.node, w.in_recovery, w.complete, w.written_us
         FROM wal_missing m JOIN wal w USING (cluster, system_identifier, name, fingerprint)
         WHERE m.store = ?1 AND m.expired = 0 AND (SELECT count(*) FROM wal_missing o WHERE o.cluster = m.cluster
             AND o.system_identifier = m.system_identifier AND o.name = m.name AND o.fingerprint = m.fingerprint) < ?3
         ORDER BY m.kind > 0, m.cluster, m.system_identifier, m.timeline, m.position LIMIT ?2",
    )?;
    collect(statement.query(params![store.as_str(), limit, stores as i64])?)
}

/// How many objects each store lacks that it should have; stores that lack none are not in the answer.
pub fn missing_counts(connection: &Connection) -> CatalogResult<Vec<(StoreName, u64)>> {
    let mut statement =
        connection.prepare_cached("SELECT store, count(*) FROM wal_missing WHERE expired = 0 GROUP BY store")?;
    let mut rows = statement.query([])?;
    let mut counts = Vec::new();
    while let Some(row) = rows.next()? {
        let count: i64 = row.get(1)?;
        counts.push((parsed(row, 0, "a store name")?, count.unsigned_abs()));
    }
    Ok(counts)
}

/// The newest objects of a timeline whose header nobody has read yet.
pub fn newest_unread(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
    timeline: Timeline,
    limit: u32,
) -> CatalogResult<Vec<WalRow>> {
    let mut statement = connection.prepare_cached(
        "SELECT cluster, system_identifier, name, fingerprint, size_bytes, node, in_recovery, complete, written_us
         FROM wal WHERE cluster = ?1 AND system_identifier = ?2 AND timeline = ?3 AND kind <> 2
         ORDER BY position DESC LIMIT ?4",
    )?;
    let newest = collect(statement.query(params![cluster.as_str(), system(identifier), timeline.get(), limit])?)?;
    Ok(newest.into_iter().filter(|row| row.facts.is_none()).collect())
}

/// The newest objects of a cluster that every store has.
pub fn newest_everywhere(connection: &Connection, cluster: &ClusterName, limit: u32) -> CatalogResult<Vec<WalObject>> {
    let mut statement = connection.prepare_cached(
        "SELECT w.cluster, w.system_identifier, w.name, w.fingerprint, w.size_bytes,
                w.node, w.in_recovery, w.complete, w.written_us
         FROM wal w WHERE w.cluster = ?1 AND NOT EXISTS (
             SELECT 1 FROM wal_missing m WHERE m.cluster = w.cluster AND m.system_identifier = w.system_identifier
                 AND m.name = w.name AND m.fingerprint = w.fingerprint)
         ORDER BY w.system_identifier DESC, w.name DESC LIMIT ?2",
    )?;
    let rows = collect(statement.query(params![cluster.as_str(), limit])?)?;
    Ok(rows.into_iter().map(|row| row.object).collect())
}

/// The timelines known of a system and the newest segment of each, oldest timeline first.
pub fn timelines(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
) -> CatalogResult<Vec<(Timeline, WalFileName)>> {
    let mut statement = connection.prepare_cached(
        "SELECT timeline, max(name) FROM wal WHERE cluster = ?1 AND system_identifier = ?2 AND kind = 1
         GROUP BY timeline ORDER BY timeline",
    )?;
    let mut rows = statement.query(params![cluster.as_str(), system(identifier)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let name: WalFileName = parsed(row, 1, "a WAL file name")?;
        found.push((name.timeline(), name));
    }
    Ok(found)
}

/// Every timeline that any object is on, oldest first.
pub fn all_timelines(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
) -> CatalogResult<Vec<Timeline>> {
    let mut statement = connection.prepare_cached(
        "SELECT DISTINCT timeline FROM wal WHERE cluster = ?1 AND system_identifier = ?2 ORDER BY timeline",
    )?;
    let mut rows = statement.query(params![cluster.as_str(), system(identifier)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(Timeline::new(row.get(0)?).ok_or_else(|| damaged("a timeline", "0"))?);
    }
    Ok(found)
}

/// History files whose header nobody has read yet.
pub fn unread_histories(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
) -> CatalogResult<Vec<WalRow>> {
    let mut statement = connection.prepare_cached(
        "SELECT cluster, system_identifier, name, fingerprint, size_bytes, node, in_recovery, complete, written_us
         FROM wal WHERE cluster = ?1 AND system_identifier = ?2 AND kind = 0 AND node IS NULL",
    )?;
    collect(statement.query(params![cluster.as_str(), system(identifier)])?)
}

/// The stores that lack an object.
pub fn stores_lacking(connection: &Connection, object: &WalObject) -> CatalogResult<Vec<StoreName>> {
    let mut statement = connection.prepare_cached(
        "SELECT store FROM wal_missing WHERE cluster = ?1 AND system_identifier = ?2 AND name = ?3 AND fingerprint = ?4",
    )?;
    let mut rows = statement.query(params![
        object.cluster.as_str(),
        system(object.system_identifier),
        object.name.to_string(),
        fingerprint_text(object)
    ])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(parsed(row, 0, "a store name")?);
    }
    Ok(found)
}

/// How many contents that are not known to be incomplete a name has; more than one is a conflict.
pub fn complete_variants(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
    name: &WalFileName,
) -> CatalogResult<u64> {
    let count: i64 = connection
        .prepare_cached(
            "SELECT count(*) FROM wal WHERE cluster = ?1 AND system_identifier = ?2 AND name = ?3
                 AND complete IS NOT 0",
        )?
        .query_row(params![cluster.as_str(), system(identifier), name.to_string()], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// WAL objects in the catalog.
pub fn count(connection: &Connection) -> CatalogResult<u64> {
    let count: i64 = connection.query_row("SELECT count(*) FROM wal", [], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// Forgets what stores lack that are no longer configured.
pub fn keep_stores(connection: &Connection, stores: &[StoreName]) -> CatalogResult<()> {
    let mut statement = connection.prepare("SELECT DISTINCT store FROM wal_missing")?;
    let known: Vec<String> = statement.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    for store in known.iter().filter(|known| stores.iter().all(|store| store.as_str() != known.as_str())) {
        connection.execute("DELETE FROM wal_missing WHERE store = ?1", [store])?;
    }
    Ok(())
}

pub(super) fn collect(mut rows: Rows<'_>) -> CatalogResult<Vec<WalRow>> {
    let mut collected = Vec::new();
    while let Some(row) = rows.next()? {
        collected.push(wal_row(row)?);
    }
    Ok(collected)
}

fn wal_row(row: &Row<'_>) -> CatalogResult<WalRow> {
    let identifier: i64 = row.get(1)?;
    let fingerprint: String = row.get(3)?;
    let size: i64 = row.get(4)?;
    let node: Option<String> = row.get(5)?;
    let facts = match node {
        None => None,
        Some(node) => Some(WalFacts {
            node: parse(&node, "a node name")?,
            in_recovery: row.get::<_, Option<bool>>(6)?.unwrap_or(true),
            complete: row.get::<_, Option<bool>>(7)?.unwrap_or(false),
            written: Timestamp::from_microsecond(row.get::<_, Option<i64>>(8)?.unwrap_or(0))
                .map_err(|_| damaged("a time", "out of range"))?,
        }),
    };
    Ok(WalRow {
        object: WalObject {
            cluster: parsed(row, 0, "a cluster name")?,
            system_identifier: SystemIdentifier::new(identifier.cast_unsigned()),
            name: parsed(row, 2, "a WAL file name")?,
            fingerprint: if fingerprint.is_empty() { None } else { Some(parse(&fingerprint, "a fingerprint")?) },
        },
        size_bytes: size.cast_unsigned(),
        facts,
    })
}

pub(super) fn parsed<T: std::str::FromStr>(row: &Row<'_>, column: usize, what: &'static str) -> CatalogResult<T> {
    let text: String = row.get(column)?;
    parse(&text, what)
}

/// Reads a stored text back into a value.
pub(super) fn parse<T: std::str::FromStr>(text: &str, what: &'static str) -> CatalogResult<T> {
    text.parse().map_err(|_| damaged(what, text))
}

/// An error about a stored value.
pub(super) fn damaged(what: &'static str, value: &str) -> CatalogError {
    CatalogError::Damaged { what, value: value.chars().take(80).collect() }
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::super::senders::{newest_sent, newest_writer};
    use super::*;

    fn object(name: &str, seed: u8) -> WalObject {
        let name: WalFileName = name.parse().unwrap();
        let fingerprint = (!matches!(name, WalFileName::History(_))).then(|| Fingerprint::of_sha256(&[seed; 32]));
        WalObject {
            cluster: "main".parse().unwrap(),
            system_identifier: SystemIdentifier::new(u64::MAX - 3),
            name,
            fingerprint,
        }
    }

    fn row(name: &str, node: &str, in_recovery: bool) -> WalRow {
        let written = Timestamp::from_second(1_800_000_000).unwrap();
        WalRow {
            object: object(name, 1),
            size_bytes: 77,
            facts: Some(WalFacts { node: node.parse().unwrap(), in_recovery, complete: true, written }),
        }
    }

    fn store(name: &str) -> StoreName {
        name.parse().unwrap()
    }

    async fn with<T: Send + 'static>(work: impl FnOnce(&Connection) -> CatalogResult<T> + Send + 'static) -> T {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        catalog.call(|savepoint| work(savepoint)).await.unwrap()
    }

    #[tokio::test]
    async fn lagging_stores_are_filled_history_first_then_oldest() {
        let names = with(|connection| {
            let stores = [store("s3")];
            for name in ["000000010000000000000003", "000000010000000000000002", "00000002.history"] {
                note_stored(connection, &row(name, "a", false), &[store("dir")], &stores)?;
            }
            note_stored(connection, &row("000000010000000000000001", "a", false), &[store("dir"), store("s3")], &[])?;
            assert_eq!(missing_counts(connection)?, [(store("s3"), 3)]);
            let oldest = oldest_missing(connection, &store("s3"), 2, 10)?;
            mark_present(connection, &store("s3"), &oldest[0].object)?;
            assert_eq!(missing_counts(connection)?, [(store("s3"), 2)]);
            assert!(stores_lacking(connection, &oldest[0].object)?.is_empty());
            assert_eq!(stores_lacking(connection, &oldest[1].object)?, [store("s3")]);
            let everywhere = newest_everywhere(connection, &"main".parse().unwrap(), 10)?;
            assert_eq!(everywhere.len(), 2);
            Ok(oldest.into_iter().map(|row| row.object.name.to_string()).collect::<Vec<_>>())
        })
        .await;
        assert_eq!(names, ["00000002.history", "000000010000000000000002", "000000010000000000000003"]);
    }

    #[tokio::test]
    async fn the_writer_is_the_newest_sender_out_of_recovery() {
        with(|connection| {
            let (cluster, system) = ("main".parse().unwrap(), SystemIdentifier::new(u64::MAX - 3));
            let writer = |timeline| {
                newest_writer(connection, &cluster, system, Timeline::new(timeline).unwrap())
                    .map(|node| node.map(|node| node.to_string()))
            };
            assert_eq!(writer(1)?, None);
            note_stored(connection, &row("000000010000000000000002", "a", false), &[], &[])?;
            note_stored(connection, &row("000000010000000000000003", "standby", true), &[], &[])?;
            note_stored(connection, &row("00000002.history", "b", false), &[], &[])?;
            note_stored(connection, &row("000000010000000000000004.partial", "b", false), &[], &[])?;
            assert_eq!(writer(1)?.as_deref(), Some("a"));
            assert_eq!(writer(2)?.as_deref(), Some("b"));
            let sent = |node: &str| newest_sent(connection, &cluster, system, &node.parse().unwrap());
            assert_eq!([sent("a")?, sent("b")?, sent("standby")?], [Timeline::new(1), Timeline::new(2), None]);
            let newest = timelines(connection, &cluster, system)?;
            assert_eq!(newest.len(), 1);
            assert_eq!(newest[0].1.to_string(), "000000010000000000000003");
            Ok(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_listing_adds_what_is_new_and_corrects_what_is_missing() {
        with(|connection| {
            let (dir, s3) = (store("dir"), store("s3"));
            let all = [dir.clone(), s3.clone()];
            let known = object("000000010000000000000001", 1);
            note_stored(connection, &row("000000010000000000000001", "a", false), &all, &[])?;
            let entry = |object: &WalObject, present: &[&StoreName]| ListedWal {
                object: object.clone(),
                size_bytes: 5,
                present: present.iter().map(|store| (*store).clone()).collect(),
                expired: Vec::new(),
            };
            let direct = object("000000010000000000000002", 2);
            // The directory store is away: it lacks what is new, and keeps what was known of it.
            let listing = [entry(&known, &[&s3]), entry(&direct, &[&s3])];
            let unknown = record_listing(connection, &listing, std::slice::from_ref(&s3), &all)?;
            assert_eq!(unknown.len(), 1);
            assert_eq!(unknown[0].object, direct);
            assert_eq!(missing_counts(connection)?, [(dir.clone(), 1)]);
            assert_eq!(
                newest_unread(connection, &direct.cluster, direct.system_identifier, Timeline::FIRST, 8)?.len(),
                1
            );
            // It comes back empty: now it lacks both.
            let unknown = record_listing(connection, &listing, &all, &all)?;
            assert!(unknown.is_empty());
            assert_eq!(missing_counts(connection)?, [(dir, 2)]);
            keep_stores(connection, &[s3])?;
            assert_eq!(missing_counts(connection)?, []);
            Ok(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_second_complete_content_is_counted() {
        with(|connection| {
            let name = "000000010000000000000005";
            note_stored(connection, &row(name, "a", false), &[], &[])?;
            let mut second = row(name, "b", false);
            second.object.fingerprint = Some(Fingerprint::of_sha256(&[9; 32]));
            let mut incomplete = row(name, "b", true);
            incomplete.object.fingerprint = Some(Fingerprint::of_sha256(&[8; 32]));
            incomplete.facts.as_mut().unwrap().complete = false;
            let object = second.object.clone();
            let variants = || complete_variants(connection, &object.cluster, object.system_identifier, &object.name);
            note_stored(connection, &incomplete, &[], &[])?;
            assert_eq!(variants()?, 1);
            note_stored(connection, &second, &[], &[])?;
            assert_eq!(variants()?, 2);
            assert_eq!(count(connection)?, 3);
            Ok(())
        })
        .await;
    }
}
