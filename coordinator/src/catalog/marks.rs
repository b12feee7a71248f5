//! Marks in the catalog: the newest root of each cluster that was seen in each store.
//!
//! A rebuild does not touch them, for the stores cannot tell what they lost; a new catalog learns what it finds.

use repository::digest;
use repository::name::{ClusterName, Generation, StoreName};
use repository::root::Mark;
use rusqlite::{Connection, params};

use super::CatalogResult;
use super::wal::{damaged, parse};

/// One mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkRow {
    /// The store.
    pub store: StoreName,
    /// Whose roots.
    pub cluster: ClusterName,
    /// The newest root seen.
    pub mark: Mark,
    /// Whether it may be gone, because an operator began the store anew.
    pub forgone: bool,
}

/// Writes a newer mark down; an older one changes nothing. What was accepted of the one before is over.
pub fn put(connection: &Connection, store: &StoreName, cluster: &ClusterName, mark: &Mark) -> CatalogResult<()> {
    connection
        .prepare_cached(
            "INSERT INTO root_mark (store, cluster, generation, sha256, forgone) VALUES (?1, ?2, ?3, ?4, 0)
             ON CONFLICT DO UPDATE SET generation = excluded.generation, sha256 = excluded.sha256, forgone = 0
                 WHERE excluded.generation > generation",
        )?
        .execute(params![
            store.as_str(),
            cluster.as_str(),
            mark.generation.get().cast_signed(),
            digest::to_hex(&mark.sha256)
        ])?;
    Ok(())
}

/// An operator began the store anew: the marked root may be gone.
pub fn forgo(connection: &Connection, store: &StoreName, cluster: &ClusterName) -> CatalogResult<()> {
    connection
        .prepare_cached("UPDATE root_mark SET forgone = 1 WHERE store = ?1 AND cluster = ?2")?
        .execute([store.as_str(), cluster.as_str()])?;
    Ok(())
}

/// All marks.
pub fn all(connection: &Connection) -> CatalogResult<Vec<MarkRow>> {
    let mut statement =
        connection.prepare_cached("SELECT store, cluster, generation, sha256, forgone FROM root_mark")?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let (store, cluster): (String, String) = (row.get(0)?, row.get(1)?);
        let (generation, sha256): (i64, String) = (row.get(2)?, row.get(3)?);
        let odd = || damaged("a mark of a root", &format!("{generation} {sha256}"));
        found.push(MarkRow {
            store: parse(&store, "a store name")?,
            cluster: parse(&cluster, "a cluster name")?,
            mark: Mark {
                generation: Generation::new(generation.cast_unsigned()).ok_or_else(odd)?,
                sha256: digest::from_hex(&sha256).and_then(|bytes| bytes.try_into().ok()).ok_or_else(odd)?,
            },
            forgone: row.get(4)?,
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;

    #[tokio::test]
    async fn marks_only_go_forward_and_a_newer_one_ends_what_was_accepted() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let (store, cluster): (StoreName, ClusterName) = ("repo1".parse().unwrap(), "main".parse().unwrap());
        let mark = |number: u64| Mark { generation: Generation::new(number).unwrap(), sha256: [number as u8; 32] };
        let row = |mark, forgone| MarkRow { store: store.clone(), cluster: cluster.clone(), mark, forgone };
        let expected = [row(mark(7), false), row(mark(7), true), row(mark(9), false)];
        let found = catalog.call(move |connection| {
            let mut found = Vec::new();
            for number in [5, 7, 6] {
                put(connection, &store, &cluster, &mark(number))?;
            }
            found.extend(all(connection)?);
            forgo(connection, &store, &cluster)?;
            put(connection, &store, &cluster, &mark(7))?;
            found.extend(all(connection)?);
            put(connection, &store, &cluster, &mark(9))?;
            found.extend(all(connection)?);
            Ok(found)
        });
        assert_eq!(found.await.unwrap(), expected);
    }
}
