//! WAL objects that a store does not show any more, and those that no store has.

use std::collections::BTreeSet;

use postgres_format::{SystemIdentifier, WalFileName};
use repository::name::{ClusterName, StoreName};
use rusqlite::{Connection, params};

use super::CatalogResult;
use super::wal::{WalObject, WalRow, collect, fingerprint_text, parsed, system};

/// Objects of a store that one look takes up, the newest; the next one goes on.
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

/// What none of the listed stores showed, with each store that was believed to have it: the newest names, at most [`LIMIT`] of each
/// store.
pub fn not_shown(connection: &Connection, listed: &Listed) -> CatalogResult<Vec<(StoreName, WalObject)>> {
    let mut found = Vec::new();
    for store in &listed.stores {
        let mut statement = connection.prepare_cached(
            "SELECT name, fingerprint FROM wal w
             WHERE cluster = ?1 AND system_identifier = ?2 AND name >= ?3 AND name < ?4 AND (kind = 0) = ?5
                 AND NOT EXISTS (SELECT 1 FROM wal_missing m WHERE m.cluster = w.cluster
                     AND m.system_identifier = w.system_identifier AND m.name = w.name
                     AND m.fingerprint = w.fingerprint AND m.store = ?6)
             ORDER BY name DESC",
        )?;
        let mut rows = statement.query(params![
            listed.cluster.as_str(),
            system(listed.system_identifier),
            listed.from,
            listed.to,
            listed.histories,
            store.as_str(),
        ])?;
        let mut room = LIMIT;
        while let Some(row) = rows.next()?.filter(|_| room > 0) {
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
                room -= 1;
                found.push((store.clone(), object));
            }
        }
    }
    Ok(found)
}

/// All objects of one cluster that are in no store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// How many, at least one.
    pub objects: u64,
    /// The first name, as text.
    pub first: WalFileName,
    /// The last name, as text.
    pub last: WalFileName,
    /// The newest that is no history file.
    pub newest: Option<WalFileName>,
    /// Whether history files are among them.
    pub histories: bool,
}

/// What a look at all that is lost found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// What agents are to be asked for.
    pub objects: BTreeSet<WalObject>,
    /// All that is lost; clusters of which nothing is lost are not among them.
    pub totals: Vec<Lost>,
    /// What agents were not asked for before.
    pub news: Vec<WalObject>,
    /// How many of those that they were asked for before are lost no more.
    pub back: usize,
}

/// Looks what none of so many stores has, though one of them should have it, and what became of that which agents were asked
/// for `before`. They are to be asked for at most `limit` objects of each system.
pub fn look(connection: &Connection, stores: usize, limit: u32, before: &BTreeSet<WalObject>) -> CatalogResult<Found> {
    let objects: BTreeSet<WalObject> =
        in_no_store(connection, stores, limit)?.into_iter().map(|row| row.object).collect();
    let mut back = 0;
    // What newer losses pushed out is lost as before.
    for object in before.difference(&objects) {
        back += usize::from(!is_in_no_store(connection, stores, object)?);
    }
    let news = objects.difference(before).cloned().collect();
    Ok(Found { objects, totals: totals(connection, stores)?, news, back })
}

/// What all of so many stores lack, though one of them should have it.
const IN_NO_STORE: &str = "SELECT w.* FROM (SELECT cluster, system_identifier, name, fingerprint FROM wal_missing
        GROUP BY cluster, system_identifier, name, fingerprint HAVING count(*) >= ?1 AND min(expired) = 0)
    JOIN wal w USING (cluster, system_identifier, name, fingerprint)";

/// Objects of each system, at most `limit` of it, that all of so many stores lack, though one of them should have it: history
/// files, because nothing on their timelines is of use without them, then the newest, which a node still has for a while.
fn in_no_store(connection: &Connection, stores: usize, limit: u32) -> CatalogResult<Vec<WalRow>> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT cluster, system_identifier, name, fingerprint, size_bytes, node, in_recovery, complete, written_us
         FROM (SELECT *, row_number() OVER (PARTITION BY cluster, system_identifier
                   ORDER BY kind > 0, timeline DESC, position DESC, name DESC) AS place
               FROM ({IN_NO_STORE}))
         WHERE place <= ?2 ORDER BY cluster, system_identifier, name"
    ))?;
    collect(statement.query(params![stores as i64, limit])?)
}

/// How much of each cluster all of so many stores lack, though one of them should have it. Clusters of which nothing is lost are
/// not in the answer.
fn totals(connection: &Connection, stores: usize) -> CatalogResult<Vec<Lost>> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT cluster, count(*), min(name), max(name), max(CASE WHEN kind > 0 THEN name END), min(kind) = 0
         FROM ({IN_NO_STORE}) GROUP BY cluster"
    ))?;
    let mut rows = statement.query([stores as i64])?;
    let mut totals = Vec::new();
    while let Some(row) = rows.next()? {
        totals.push(Lost {
            cluster: parsed(row, 0, "a cluster name")?,
            objects: row.get::<_, i64>(1)?.unsigned_abs(),
            first: parsed(row, 2, "a WAL file name")?,
            last: parsed(row, 3, "a WAL file name")?,
            newest: match row.get::<_, Option<String>>(4)? {
                Some(name) => Some(super::wal::parse(&name, "a WAL file name")?),
                None => None,
            },
            histories: row.get(5)?,
        });
    }
    Ok(totals)
}

/// Whether all of so many stores lack an object, though one of them should have it.
fn is_in_no_store(connection: &Connection, stores: usize, object: &WalObject) -> CatalogResult<bool> {
    let lacking: (i64, bool) = connection
        .prepare_cached(
            "SELECT count(*), coalesce(min(expired) = 0, 0) FROM wal_missing
             WHERE cluster = ?1 AND system_identifier = ?2 AND name = ?3 AND fingerprint = ?4",
        )?
        .query_row(
            params![
                object.cluster.as_str(),
                system(object.system_identifier),
                object.name.to_string(),
                fingerprint_text(object)
            ],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
    Ok(lacking.0 >= stores as i64 && lacking.1)
}

#[cfg(test)]
mod tests {
    use repository::fingerprint::Fingerprint;

    use super::super::Catalog;
    use super::super::wal::{mark_missing, mark_present, note_stored};
    use super::*;

    fn object(name: &str) -> WalObject {
        let name: WalFileName = name.parse().unwrap();
        let is_history = matches!(name, WalFileName::History(_));
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
            assert!(is_in_no_store(connection, 2, &object(&names[1]))?);
            assert!(
                !is_in_no_store(connection, 2, &object(&names[2]))?
                    && !is_in_no_store(connection, 2, &object(&names[3]))?
            );
            mark_present(connection, &stores[0], &object(&names[1]))?;
            assert_eq!((in_no_store(connection, 2, 9)?.len(), totals(connection, 2)?.len()), (0, 0));
            Ok(())
        });
        checked.await.unwrap();
    }

    /// Of each system the names that are in no store and come first, and the totals, for so many objects of a system.
    async fn lost_of(objects: Vec<WalObject>, limit: u32) -> (Vec<String>, Vec<Lost>) {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let found = catalog.call(move |connection| {
            let store: StoreName = "repo1".parse().unwrap();
            for object in objects {
                let row = WalRow { object, size_bytes: 9, facts: None };
                note_stored(connection, &row, &[], std::slice::from_ref(&store))?;
            }
            let first = in_no_store(connection, 1, limit)?;
            let first =
                first.iter().map(|row| format!("{} {}", row.object.system_identifier, row.object.name)).collect();
            Ok((first, totals(connection, 1)?))
        });
        found.await.unwrap()
    }

    #[tokio::test]
    async fn history_files_are_asked_for_before_segments_and_of_these_the_newest() {
        let names =
            ["000000010000000000000009", "000000020000000000000003", "000000020000000000000004", "00000002.history"];
        let objects = || names.map(object).to_vec();
        assert_eq!(lost_of(objects(), 1).await.0, ["7 00000002.history"]);
        assert_eq!(lost_of(objects(), 2).await.0, ["7 00000002.history", "7 000000020000000000000004"]);
        // The totals know no limit.
        let (_, totals) = lost_of(objects(), 1).await;
        let all = Lost {
            cluster: "main".parse().unwrap(),
            objects: 4,
            first: names[0].parse().unwrap(),
            last: names[2].parse().unwrap(),
            newest: Some(names[2].parse().unwrap()),
            histories: true,
        };
        assert_eq!(totals, [all]);
    }

    #[tokio::test]
    async fn what_newer_losses_push_out_is_not_found_again() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let looked = catalog.call(|connection| {
            let store: StoreName = "repo1".parse().unwrap();
            let objects = ["1", "2", "3"].map(|number| object(&format!("00000001000000000000000{number}")));
            let before = BTreeSet::from([objects[0].clone(), objects[1].clone()]);
            for object in &objects {
                let row = WalRow { object: object.clone(), size_bytes: 9, facts: None };
                note_stored(connection, &row, &[], std::slice::from_ref(&store))?;
            }
            let pushed = look(connection, 1, 2, &before)?;
            assert_eq!((pushed.news, pushed.back, pushed.totals[0].objects), (vec![objects[2].clone()], 0, 3));
            mark_present(connection, &store, &objects[0])?;
            let found = look(connection, 1, 2, &before)?;
            assert_eq!((found.back, found.totals[0].objects), (1, 2));
            Ok(())
        });
        looked.await.unwrap();
    }

    #[tokio::test]
    async fn each_system_of_a_cluster_has_its_own_limit() {
        let mut objects = ["000000020000000000000003", "000000020000000000000004"].map(object).to_vec();
        let newer = WalObject { system_identifier: SystemIdentifier::new(8), ..object("000000010000000000000001") };
        objects.push(newer);
        let (first, totals) = lost_of(objects, 1).await;
        assert_eq!(first, ["7 000000020000000000000004", "8 000000010000000000000001"]);
        assert_eq!(totals.iter().map(|lost| lost.objects).collect::<Vec<_>>(), [3]);
    }

    #[tokio::test]
    async fn the_newest_of_what_was_not_shown_are_asked_for_first_and_what_was_shown_takes_no_room() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let checked = catalog.call(|connection| {
            let store: StoreName = "repo1".parse().unwrap();
            let name = |number: usize| format!("00000001{:08X}{:08X}", number / 256, number % 256);
            let all = LIMIT + 3;
            for number in 1..=all {
                let row = WalRow { object: object(&name(number)), size_bytes: 9, facts: None };
                note_stored(connection, &row, std::slice::from_ref(&store), &[])?;
            }
            let listed = Listed {
                cluster: "main".parse().unwrap(),
                system_identifier: SystemIdentifier::new(7),
                histories: false,
                from: String::new(),
                to: "~".to_owned(),
                stores: vec![store],
                shown: BTreeSet::from([object(&name(all))]),
            };
            let found = not_shown(connection, &listed)?;
            assert_eq!((found.len(), &found[0].1), (LIMIT, &object(&name(all - 1))));
            assert_eq!(found[LIMIT - 1].1, object(&name(3)));
            Ok(())
        });
        checked.await.unwrap();
    }
}
