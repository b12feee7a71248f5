//! The one statement that asks a server where it stands.

use postgres_format::Timeline;

use super::{Session, ask, column, lsn};
use crate::postgres::{Position, Role, ServerError};

/// Role, timeline, LSN, `full_page_writes`, a mark of the transactions, and up to where is committed.
///
/// The timeline of a primary is taken from the name of the segment at its insert position, which is right also before the
/// first checkpoint after a promotion; only the timeline is read from the name. A standby's is that of its WAL receiver, or
/// else the newest that recovery has met.
///
/// The snapshot is taken before the position is read, so what it shows as committed lies before that. Where no transaction was
/// active when the last checkpoint began, and none has begun since, nothing was committed beyond its start
/// (`CreateCheckPoint` in `src/backend/access/transam/xlog.c`).
const POSITION: &str = "SELECT r, CASE WHEN r THEN coalesce(
      (SELECT received_tli FROM pg_stat_wal_receiver), \
      (SELECT greatest(min_recovery_end_timeline, (SELECT timeline_id FROM pg_control_checkpoint())) FROM pg_control_recovery()))::text
    ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END,
    CASE WHEN r THEN coalesce(pg_last_wal_replay_lsn(), '0/0') ELSE pg_current_wal_lsn() END::text,
    current_setting('full_page_writes') = 'on',
    hashtextextended(pg_current_snapshot()::text, 0),
    CASE WHEN NOT r THEN (SELECT redo_lsn FROM pg_control_checkpoint()
      WHERE oldest_active_xid::text IN ('0', split_part(next_xid, ':', 2))
        AND split_part(next_xid, ':', 1)::numeric * 4294967296 + split_part(next_xid, ':', 2)::numeric
          = pg_snapshot_xmax(pg_current_snapshot())::text::numeric
        AND pg_snapshot_xmin(pg_current_snapshot()) = pg_snapshot_xmax(pg_current_snapshot())) END::text
  FROM (SELECT pg_is_in_recovery() AS r) AS recovery";

/// Where the server of a session stands.
pub(super) async fn position_on(session: &Session) -> Result<Position, ServerError> {
    let what = "tell its position";
    let row = ask(session, what, POSITION, &[]).await?;
    let role = if column(&row, 0, what)? { Role::Standby } else { Role::Primary };
    let text: String = column::<Option<String>>(&row, 1, what)?.unwrap_or_default();
    // Part of a file name on a primary, a number from a catalog view on a standby.
    let radix = if role == Role::Primary { 16 } else { 10 };
    let timeline = u32::from_str_radix(&text, radix).ok().and_then(Timeline::new);
    let timeline = timeline.ok_or(ServerError::Answer { what, got: text })?;
    let committed_to = match column::<Option<String>>(&row, 5, what)? {
        Some(_) => Some(lsn(&row, 5, what)?),
        None => None,
    };
    Ok(Position {
        role,
        timeline,
        lsn: lsn(&row, 2, what)?,
        full_page_writes: column(&row, 3, what)?,
        transactions: column(&row, 4, what)?,
        committed_to,
    })
}
