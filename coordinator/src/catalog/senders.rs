//! Who sent what: nodes and the timelines that they write, as far as the catalog has read the headers of their WAL.
//!
//! Only what was sent out of recovery says something of a writer. What follows from it is decided in [`crate::writer`] and
//! [`crate::decisions`].

use postgres_format::{SystemIdentifier, Timeline};
use repository::name::{ClusterName, NodeName};
use rusqlite::{Connection, OptionalExtension, params};

use super::CatalogResult;
use super::wal::{damaged, parse, parsed, system};

/// The node of a timeline's newest segment, backup history or own history file sent out of recovery. A `.partial` is
/// no evidence: the promoted node sends it for the timeline it left.
pub fn newest_writer(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
    timeline: Timeline,
) -> CatalogResult<Option<NodeName>> {
    let text: Option<String> = connection
        .prepare_cached(
            "SELECT node FROM wal WHERE cluster = ?1 AND system_identifier = ?2 AND timeline = ?3
                 AND in_recovery = 0 AND kind <> 2 ORDER BY position DESC, written_us DESC LIMIT 1",
        )?
        .query_row(params![cluster.as_str(), system(identifier), timeline.get()], |row| row.get(0))
        .optional()?;
    text.map(|text| parse(&text, "a node name")).transpose()
}

/// The newest timeline of which a node sent anything out of recovery, besides a `.partial`.
pub fn newest_sent(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
    node: &NodeName,
) -> CatalogResult<Option<Timeline>> {
    let newest: Option<u32> = connection
        .prepare_cached(
            "SELECT max(timeline) FROM wal WHERE cluster = ?1 AND system_identifier = ?2 AND node = ?3
                 AND in_recovery = 0 AND kind <> 2",
        )?
        .query_row(params![cluster.as_str(), system(identifier), node.as_str()], |row| row.get(0))?;
    Ok(newest.and_then(Timeline::new))
}

/// The timelines of a system and the nodes that opened them: whoever sent the history file out of recovery.
pub fn openers(
    connection: &Connection,
    cluster: &ClusterName,
    identifier: SystemIdentifier,
) -> CatalogResult<Vec<(Timeline, NodeName)>> {
    let mut statement = connection.prepare_cached(
        "SELECT DISTINCT timeline, node FROM wal WHERE cluster = ?1 AND system_identifier = ?2
             AND in_recovery = 0 AND kind = 0",
    )?;
    let mut rows = statement.query(params![cluster.as_str(), system(identifier)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let timeline = Timeline::new(row.get(0)?).ok_or_else(|| damaged("a timeline", "0"))?;
        found.push((timeline, parsed(row, 1, "a node name")?));
    }
    Ok(found)
}
