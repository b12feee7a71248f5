//! WAL objects that a store does not show any more, and those that no store has.

use std::collections::BTreeSet;

use postgres_format::SystemIdentifier;
use repository::name::{ClusterName, StoreName};
use rusqlite::{Connection, params};

use super::CatalogResult;
use super::wal::{WalObject, WalRow, collect, parsed, system};

/// Objects of a store that one look takes up besides those that were listed; the next one goes on.
pub const LIMIT: usize = 10_000;

/// A part of the names of one system that was listed as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Its system identifier.
    pub system_identifier: SystemIdentifier,
    /// Whether it is history files that were listed, or all others.
    pub histories: bool,
    /// Names from here on, as text.
    pub from: String,
    /// Names before this, as text.
    pub to: String,
    /// Stores that said everything about them.
    pub stores: Vec<StoreName>,
    /// What any of them showed.
    pub shown: BTreeSet<WalObject>,
}

/// What none of the listed stores showed, with each store that was believed to have it.
pub fn not_shown(connection: &Connection, listed: &Listed) -> CatalogResult<Vec<(StoreName, WalObject)>> {
    let mut found = Vec::new();
    for store in &listed.stores {
        let mut statement = connection.prepare_cached(
            "SELECT name, fingerprint FROM wal w
             WHERE cluster = ?1 AND system_identifier = ?2 AND name >= ?3 AND name < ?4 AND (kind = 0) = ?5
                 AND NOT EXISTS (SELECT 1 FROM wal_missing m WHERE m.cluster = w.cluster
                     AND m.system_identifier = w.system_identifier AND m.name = w.name
                     AND m.fingerprint = w.fingerprint AND m.store = ?6)
             ORDER BY name LIMIT ?7",
        )?;
        let mut rows = statement.query(params![
            listed.cluster.as_str(),
            system(listed.system_identifier),
            listed.from,
            listed.to,
            listed.histories,
            store.as_str(),
            (LIMIT + listed.shown.len()) as i64,
        ])?;
        while let Some(row) = rows.next()? {
            let fingerprint: String = row.get(1)?;
            let object = WalObject {
                cluster: listed.cluster.clone(),
                system_identifier: listed.system_identifier,
                name: parsed(row, 0, "a WAL file name")?,
                fingerprint: match fingerprint.as_str() {
                    "" => None,
                    text => Some(super::wal::parse(text, "a fingerprint")?),
                },
            };
            if !listed.shown.contains(&object) {
                found.push((store.clone(), object));
            }
        }
    }
    Ok(found)
}

/// The newest objects of each cluster, at most `limit` of it, that all of so many stores lack, though one of them should have
/// it. The newest are those that a node still has, for a while.
pub fn in_no_store(connection: &Connection, stores: usize, limit: u32) -> CatalogResult<Vec<WalRow>> {
    let mut statement = connection.prepare_cached(
        "SELECT cluster, system_identifier, name, fingerprint, size_bytes, node, in_recovery, complete, written_us
         FROM (SELECT w.*, row_number() OVER (PARTITION BY w.cluster ORDER BY w.name DESC) AS place
         FROM (SELECT cluster, system_identifier, name, fingerprint FROM wal_missing
               GROUP BY cluster, system_identifier, name, fingerprint HAVING count(*) >= ?1 AND min(expired) = 0)
         JOIN wal w USING (cluster, system_identifier, name, fingerprint)
         ) WHERE place <= ?2
         ORDER BY cluster, system_identifier, name",
    )?;
    collect(statement.query(params![stores as i64, limit])?)
}

#[cfg(test)]
mod tests {
    use repository::fingerprint::Fingerprint;

    use super::super::Catalog;
    use super::super::wal::{mark_missing, mark_present, note_stored};
    use super::*;

    fn object(name: &str) -> WalObject {
        let name: postgres_format::WalFileName = name.parse().unwrap();
        let is_history = matches!(name, postgres_format::WalFileName::History(_));
        WalObject {
            cluster: "main".parse().unwrap(),
            system_identifier: SystemIdentifier::new(7),
            name,
            fingerprint: (!is_history).then(|| Fingerprint::of_sha256(&[7; 32])),
        }
    }

    #[tokio::test]
    async fn what_a_whole_listing_did_not_show_is_asked_for_and_what_nobody_has_is_lost() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let checked = catalog.call(|connection| {
            let stores: [StoreName; 2] = ["repo1".parse().unwrap(), "s3".parse().unwrap()];
            let names = ["1", "2", "3", "4"].map(|number| format!("00000001000000000000000{number}"));
            for name in names.iter().map(String::as_str).chain(["00000002.history"]) {
                note_stored(connection, &WalRow { object: object(name), size_bytes: 9, facts: None }, &stores, &[])?;
            }
            let listed = |histories, from: &str, to: &str, shown: &[&str]| Listed {
                cluster: "main".parse().unwrap(),
                system_identifier: SystemIdentifier::new(7),
                histories,
                from: from.to_owned(),
                to: to.to_owned(),
                stores: stores.to_vec(),
                shown: shown.iter().map(|name| object(name)).collect(),
            };
            // 4 lies behind what was listed, 1 before it, and history files are listed apart.
            let to = format!("{}~", names[2]);
            let absent = not_shown(connection, &listed(false, &names[1], &to, &[&names[2]]))?;
            assert_eq!(absent, stores.each_ref().map(|store| (store.clone(), object(&names[1]))));
            assert_eq!(not_shown(connection, &listed(true, "", "~", &[]))?.len(), 2);
            // What is known to be missing is not asked for again.
            mark_missing(connection, &stores[0], &object(&names[1]))?;
            assert_eq!(not_shown(connection, &listed(false, &names[1], &to, &[&names[2]]))?.len(), 1);
            assert_eq!(in_no_store(connection, 2, 9)?.len(), 0);
            mark_missing(connection, &stores[1], &object(&names[1]))?;
            mark_missing(connection, &stores[1], &object(&names[2]))?;
            let lost = in_no_store(connection, 2, 9)?;
            assert_eq!(lost.iter().map(|row| row.object.clone()).collect::<Vec<_>>(), [object(&names[1])]);
            // Of more than are asked for, the newest.
            mark_missing(connection, &stores[0], &object(&names[2]))?;
            let newest = in_no_store(connection, 2, 1)?;
            assert_eq!(newest.iter().map(|row| row.object.clone()).collect::<Vec<_>>(), [object(&names[2])]);
            mark_present(connection, &stores[0], &object(&names[2]))?;
            mark_present(connection, &stores[0], &object(&names[1]))?;
            assert_eq!(in_no_store(connection, 2, 9)?.len(), 0);
            Ok(())
        });
        checked.await.unwrap();
    }
}
