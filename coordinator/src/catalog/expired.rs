//! WAL that stores do not keep any more: what one store condemned it lacks on purpose, and what all of them condemned is
//! forgotten.
//!
//! What is condemned may lie there until the sweep comes by. The catalog does not wait for that, because nobody may count
//! on it any more.

use std::collections::BTreeSet;

use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use repository::fingerprint::Fingerprint;
use repository::name::{ClusterName, StoreName};
use repository::root::WalKept;
use rusqlite::{Connection, params};

use super::CatalogResult;
use super::wal::{WalObject, mark_missing, missing_params, parse, system};

/// Writes down what stores keep of a system's WAL, and forgets what none of all `stores` keeps. Answers how many objects that
/// were.
pub fn note_all(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
    kept: &[(StoreName, Vec<WalKept>)],
    stores: &[StoreName],
) -> CatalogResult<u64> {
    for (store, kept) in kept {
        note_kept_again(connection, store, cluster, identifier, kept)?;
        kept.iter().try_for_each(|kept| note_kept(connection, store, cluster, identifier, kept))?;
    }
    let timelines: BTreeSet<Timeline> = kept.iter().flat_map(|(_, kept)| kept).map(WalKept::timeline).collect();
    timelines.into_iter().map(|timeline| forget(connection, cluster, identifier, timeline, stores)).sum()
}

/// A store lacks the object on purpose: its retention condemned it.
pub fn mark(connection: &Connection, store: &StoreName, object: &WalObject) -> CatalogResult<()> {
    mark_missing(connection, store, object)?;
    connection
        .prepare_cached(
            "UPDATE wal_missing SET expired = 1 WHERE store = ?1 AND cluster = ?2 AND system_identifier = ?3 AND kind = ?4
                 AND timeline = ?5 AND position = ?6 AND name = ?7 AND fingerprint = ?8 AND expired = 0",
        )?
        .execute(missing_params(store, object))?;
    Ok(())
}

/// What a store lacked on purpose and keeps by now is missing: the store was set back.
fn note_kept_again(
    connection: &Connection,
    store: &StoreName,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
    kept: &[WalKept],
) -> CatalogResult<()> {
    let mut statement = connection.prepare_cached(
        "SELECT name, fingerprint FROM wal_missing
         WHERE store = ?1 AND cluster = ?2 AND system_identifier = ?3 AND expired = 1",
    )?;
    let mut rows = statement.query(params![store.as_str(), cluster.as_str(), system(identifier)])?;
    let mut kept_again = Vec::new();
    while let Some(row) = rows.next()? {
        let object = object(cluster, identifier, &row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?;
        if object.name.segment().is_none_or(|segment| WalKept::all_keep(kept, segment)) {
            kept_again.push(object);
        }
    }
    kept_again.iter().try_for_each(|object| {
        connection
            .prepare_cached(
                "UPDATE wal_missing SET expired = 0 WHERE store = ?1 AND cluster = ?2 AND system_identifier = ?3
                     AND kind = ?4 AND timeline = ?5 AND position = ?6 AND name = ?7 AND fingerprint = ?8",
            )?
            .execute(missing_params(store, object))?;
        Ok(())
    })
}

/// Writes down what one store keeps of a timeline's WAL.
fn note_kept(
    connection: &Connection,
    store: &StoreName,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
    kept: &WalKept,
) -> CatalogResult<()> {
    // Names of segments, `.partial` and `.backup` files sort by position within a timeline.
    let mut statement = connection.prepare_cached(
        "SELECT w.name, w.fingerprint FROM wal w
         WHERE w.cluster = ?1 AND w.system_identifier = ?2 AND w.name >= ?3 AND w.name < ?4 AND w.kind > 0
             AND NOT EXISTS (SELECT 1 FROM wal_missing m WHERE m.cluster = w.cluster
                 AND m.system_identifier = w.system_identifier AND m.name = w.name AND m.fingerprint = w.fingerprint
                 AND m.store = ?5 AND m.expired = 1)",
    )?;
    let (first, from) = (kept.timeline().to_hex().to_string(), kept.from.to_string());
    let mut rows = statement.query(params![cluster.as_str(), system(identifier), first, from, store.as_str()])?;
    let mut condemned = Vec::new();
    while let Some(row) = rows.next()? {
        let object = object(cluster, identifier, &row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?;
        if object.name.segment().is_some_and(|segment| !kept.keeps(segment)) {
            condemned.push(object);
        }
    }
    condemned.iter().try_for_each(|object| mark(connection, store, object))
}

/// Forgets what none of the stores keeps. Answers how many objects that were.
fn forget(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
    timeline: Timeline,
    stores: &[StoreName],
) -> CatalogResult<u64> {
    let mut statement = connection.prepare_cached(
        "SELECT name, fingerprint FROM wal_missing WHERE cluster = ?1 AND system_identifier = ?2 AND timeline = ?3
             AND expired = 1 GROUP BY name, fingerprint HAVING count(*) >= ?4",
    )?;
    let stores = i64::try_from(stores.len()).unwrap_or(i64::MAX);
    let mut rows = statement.query(params![cluster.as_str(), system(identifier), timeline.get(), stores])?;
    let mut gone: Vec<(String, String)> = Vec::new();
    while let Some(row) = rows.next()? {
        gone.push((row.get(0)?, row.get(1)?));
    }
    for (name, fingerprint) in &gone {
        let key = params![cluster.as_str(), system(identifier), name, fingerprint];
        connection
            .prepare_cached(
                "DELETE FROM wal_missing WHERE cluster = ?1 AND system_identifier = ?2 AND name = ?3 AND fingerprint = ?4",
            )?
            .execute(key)?;
        connection
            .prepare_cached(
                "DELETE FROM wal WHERE cluster = ?1 AND system_identifier = ?2 AND name = ?3 AND fingerprint = ?4",
            )?
            .execute(key)?;
    }
    Ok(gone.len() as u64)
}

fn object(
    cluster: &ClusterName,
    system_identifier: SystemIdentifier,
    name: &str,
    fingerprint: &str,
) -> CatalogResult<WalObject> {
    let name: WalFileName = parse(name, "a WAL file name")?;
    let fingerprint: Option<Fingerprint> = match fingerprint {
        "" => None,
        text => Some(parse(text, "a fingerprint")?),
    };
    Ok(WalObject { cluster: cluster.clone(), system_identifier, name, fingerprint })
}

#[cfg(test)]
mod tests {
    use repository::root::WalSpan;

    use super::super::Catalog;
    use super::super::wal::{WalRow, count, missing_counts, note_stored, oldest_missing, stores_lacking};
    use super::*;

    fn row(name: &str) -> WalRow {
        let name: WalFileName = name.parse().unwrap();
        let fingerprint = (!matches!(name, WalFileName::History(_))).then(|| Fingerprint::of_sha256(&[7; 32]));
        let object = WalObject {
            cluster: "main".parse().unwrap(),
            system_identifier: SystemIdentifier::new(7),
            name,
            fingerprint,
        };
        WalRow { object, size_bytes: 5, facts: None }
    }

    #[tokio::test]
    async fn what_a_store_condemned_it_does_not_lack_and_what_all_condemned_is_forgotten() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let checked = catalog.call(|connection| {
            let (cluster, system): (ClusterName, _) = ("main".parse().unwrap(), SystemIdentifier::new(7));
            let stores: [StoreName; 2] = ["dir".parse().unwrap(), "s3".parse().unwrap()];
            let segment = |number: u32| format!("0000000100000000{number:08X}");
            for number in 1..=9 {
                note_stored(connection, &row(&segment(number)), &stores, &[])?;
            }
            // The second store never got two of them.
            note_stored(connection, &row(&segment(2)), &[], &stores[1..])?;
            note_stored(connection, &row(&segment(7)), &[], &stores[1..])?;
            note_stored(connection, &row("00000001.history"), &stores, &[])?;
            note_stored(connection, &row("000000020000000000000001"), &stores, &[])?;
            assert_eq!(missing_counts(connection)?, [(stores[1].clone(), 2)]);
            let name = |number: u32| segment(number).parse().unwrap();
            let also = vec![WalSpan { first: name(3), last: name(3) }];
            let kept = |from: u32| WalKept { from: name(from), also: also.clone() };
            note_kept(connection, &stores[1], &cluster, system, &kept(6))?;
            // 2 is not missing any more, 7 is.
            assert_eq!(missing_counts(connection)?, [(stores[1].clone(), 1)]);
            assert_eq!(oldest_missing(connection, &stores[1], 2, 9)?.len(), 1);
            assert_eq!(stores_lacking(connection, &row(&segment(4)).object)?, stores[1..]);
            assert_eq!(stores_lacking(connection, &row(&segment(3)).object)?, []);
            assert_eq!(forget(connection, &cluster, system, Timeline::FIRST, &stores)?, 0);
            // Set back, it keeps more, and what it lacks of that is missing.
            note_all(connection, &cluster, system, &[(stores[1].clone(), vec![kept(5)])], &stores)?;
            assert_eq!(missing_counts(connection)?, [(stores[1].clone(), 2)]);
            note_all(connection, &cluster, system, &[(stores[1].clone(), Vec::new())], &stores)?;
            assert_eq!(missing_counts(connection)?, [(stores[1].clone(), 5)]);
            note_all(connection, &cluster, system, &[(stores[1].clone(), vec![kept(6)])], &stores)?;
            assert_eq!(missing_counts(connection)?, [(stores[1].clone(), 1)]);
            note_kept(connection, &stores[0], &cluster, system, &kept(5))?;
            // 1, 2 and 4 are in no store; the first one still has 5.
            assert_eq!(forget(connection, &cluster, system, Timeline::FIRST, &stores)?, 3);
            assert_eq!((count(connection)?, forget(connection, &cluster, system, Timeline::FIRST, &stores)?), (8, 0));
            Ok(())
        });
        checked.await.unwrap();
    }
}
