//! What is known to be wrong in the stores, in the catalog: one text a cluster. It outlives a rebuild.

use repository::name::ClusterName;
use rusqlite::{Connection, params};

use super::CatalogResult;
use super::wal::parse;

/// Writes down what is known of a cluster.
pub fn put(connection: &Connection, cluster: &ClusterName, text: &str) -> CatalogResult<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO soundness (cluster, known) VALUES (?1, ?2)")?
        .execute(params![cluster.as_str(), text])?;
    Ok(())
}

/// What is known of every cluster.
pub fn all(connection: &Connection) -> CatalogResult<Vec<(ClusterName, String)>> {
    let mut statement = connection.prepare_cached("SELECT cluster, known FROM soundness")?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push((parse(&row.get::<_, String>(0)?, "a cluster name")?, row.get(1)?));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;

    #[tokio::test]
    async fn the_newest_text_of_a_cluster_is_kept() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        catalog
            .call(|connection| {
                let cluster: ClusterName = "main".parse().expect("a name");
                put(connection, &cluster, "{}")?;
                put(connection, &cluster, "[]")?;
                assert_eq!(all(connection)?, [(cluster, "[]".to_owned())]);
                Ok(())
            })
            .await
            .unwrap();
    }
}
