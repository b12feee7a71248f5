//! Which line a server recovers along, and what of the archive it must not be given for that.
//!
//! The rules are `repository::wal::line`'s. Here is where their facts come from: the server's own settings, because the command
//! line of `restore_command` does not tell what it follows, and the histories in the spool, which are looked for anew when
//! they are older than [`HISTORIES_FRESH`].

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{SegmentName, Timeline, auto_conf};
use repository::wal::line::{self, Following, PastFork};

use super::{Answer, Fetcher};
use crate::local::FetchMode;
use crate::node::NodeFacts;

/// Age at which histories are looked for again while segments are asked for.
pub(super) const HISTORIES_FRESH: Duration = Duration::from_secs(2);
/// How long a segment waits for that.
pub(super) const HISTORIES_WAIT: Duration = Duration::from_secs(1);
/// Largest configuration file that is read, in bytes.
const SETTINGS_BYTES_MAX: u64 = 1 << 20;

/// What the server on a data directory recovers along, where it is on `current` now. PostgreSQL 12 and newer
/// follow the latest timeline unless told otherwise. Settings on the command line and in included files are not seen.
pub fn following(data_directory: &Path, current: Timeline) -> Following {
    let files = [data_directory.join("postgresql.auto.conf"), main_file(data_directory)];
    let set = files.iter().find_map(|path| auto_conf::value(&text(path)?, "recovery_target_timeline"));
    let set = set.unwrap_or_default();
    match set.trim() {
        word if word.eq_ignore_ascii_case("current") => Following::Timeline(current),
        word => number(word).map_or(Following::Latest, Following::Timeline),
    }
}

/// As `strtoul` reads it with base 0.
fn number(word: &str) -> Option<Timeline> {
    let parsed = match (word.strip_prefix("0x").or(word.strip_prefix("0X")), word.strip_prefix('0')) {
        (Some(hex), _) => u32::from_str_radix(hex, 16),
        (None, Some(octal)) if !octal.is_empty() => u32::from_str_radix(octal, 8),
        _ => word.parse(),
    };
    parsed.ok().and_then(Timeline::new)
}

/// `postgresql.conf`, which Debian keeps elsewhere: a server notes the options it was started with.
fn main_file(data_directory: &Path) -> PathBuf {
    let options = text(&data_directory.join("postmaster.opts")).unwrap_or_default();
    let named = options.split('"').find_map(|word| {
        let word = word.trim_start_matches("--").trim_start_matches("-c");
        word.strip_prefix("config_file=").or(word.strip_prefix("config-file="))
    });
    named.map_or_else(|| data_directory.join("postgresql.conf"), PathBuf::from)
}

fn text(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(SETTINGS_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

impl Fetcher {
    /// Whether a segment must be held back from the server.
    pub(super) fn past_fork(&self, segment: SegmentName, facts: &NodeFacts) -> Option<PastFork> {
        // Only where a newer timeline forks off in this segment are the settings of interest.
        let histories: Vec<TimelineHistory> =
            self.spool.timelines().into_iter().filter_map(|on| self.history_of(on)).collect();
        let past =
            |history: &TimelineHistory, following| line::past_fork(segment, facts.segment_size, following, history);
        if !histories.iter().any(|history| past(history, Following::Latest).is_some()) {
            return None;
        }
        let following = following(self.data.path(), facts.timeline);
        match following {
            Following::Latest => past(histories.iter().max_by_key(|history| history.timeline())?, following),
            Following::Timeline(_) => histories.iter().find_map(|history| past(history, following)),
        }
    }

    fn history_of(&self, timeline: Timeline) -> Option<TimelineHistory> {
        TimelineHistory::parse(timeline, &self.spool.history(timeline)?).ok()
    }

    /// A "no" in archive recovery ends it: whether the archive ends there is looked at.
    pub(super) async fn is_end(&self, segment: SegmentName, facts: &NodeFacts) -> Answer {
        let asked = self.sources.ask_whom().await;
        if !asked.missing.is_empty() {
            return Answer::Unknown(asked.missing.join("; "));
        }
        let (cluster, system) = (&self.cluster, facts.system_identifier);
        let following = following(self.data.path(), facts.timeline);
        let size = facts.segment_size;
        match line::later_wal(&asked.stores, cluster, system, segment, size, following).await {
            Ok(None) => Answer::No(String::new()),
            Ok(Some(later)) => Answer::Unknown(line::absence(&asked.stores, cluster, system, segment, later).await),
            Err(reasons) => Answer::Unknown(reasons.join("; ")),
        }
    }
}

/// What is said of a segment that is held back. A standby asks again; a recovery that is to end must not end there.
pub(super) fn held_back(past: &PastFork, mode: FetchMode) -> Answer {
    match mode {
        FetchMode::Recovery => Answer::Refused(past.to_string()),
        FetchMode::Standby | FetchMode::Other => Answer::No(past.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_followed_is_read_as_the_server_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        let two = Timeline::new(2).unwrap();
        let read = || following(directory.path(), two);
        let on = |number| Following::Timeline(Timeline::new(number).unwrap());
        assert_eq!(read(), Following::Latest);
        write("postgresql.conf", "#recovery_target_timeline = '3'\nrecovery_target_timeline = '4'\n");
        assert_eq!(read(), on(4));
        write("postgresql.auto.conf", "recovery_target_timeline = 'current'\n");
        assert_eq!(read(), on(2));
        write("postgresql.auto.conf", "recovery_target_timeline = '0x1A'\n");
        assert_eq!(read(), on(26));
        write("postgresql.auto.conf", "recovery_target_timeline = ''\n");
        assert_eq!(read(), Following::Latest);
        write("postgresql.auto.conf", "");
        write("elsewhere.conf", "recovery_target_timeline = 7\n");
        let options = format!(
            "/bin/postgres \"-D\" \"/x\" \"-c\" \"config_file={}/elsewhere.conf\"\n",
            directory.path().display()
        );
        write("postmaster.opts", &options);
        assert_eq!(read(), on(7));
    }
}
