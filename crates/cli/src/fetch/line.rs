//! What a file that is there, or absent, means for the server that asked: `repository::wal::line`'s rules, with the end that
//! a restore's plan fixed.
//!
//! The plan writes its end into `restore_command`. A segment before it that is absent was lost since, and its absence is not
//! the end of the archive; neither is that of any segment while later WAL of the server's line is there, unless the plan
//! says that recovery stops. Rules are not applied to servers newer than known, whose segments cannot be placed.

use std::{path::Path, sync::Arc};

use agent::{fetch::line::following, local::FetchMode};
use clap::Args;
use postgres_format::{
    Lsn, SegmentName, SegmentSize, SystemIdentifier, Timeline, WalFileName, control_file::ControlFile,
    timeline_history::TimelineHistory,
};
use repository::{
    name::ClusterName,
    store::ObjectStore,
    wal::line::{self, Following},
};

use super::Outcome;

/// Where a plan said that WAL ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Args)]
pub(crate) struct EndArgs {
    /// WAL reached up to here when the restore was planned: in recovery, what is absent before it is not the archive's end.
    #[arg(long, value_name = "LSN")]
    pub(crate) until: Option<Lsn>,
    /// Recovery stops there: what is not to be had from there on is the archive's end.
    #[arg(long, requires = "until")]
    pub(crate) stop_there: bool,
}

/// Of which cluster a file was asked for, and where.
pub(super) struct Asked<'a> {
    pub(super) stores: &'a [Arc<dyn ObjectStore>],
    pub(super) cluster: &'a ClusterName,
    pub(super) system: SystemIdentifier,
    pub(super) name: &'a WalFileName,
    pub(super) target: &'a Path,
}

/// What an answer about one file becomes for the server in the working directory.
pub(super) async fn judge(outcome: Outcome, asked: Asked<'_>, mode: FetchMode, end: EndArgs) -> Outcome {
    let WalFileName::Segment(segment) = *asked.name else { return outcome };
    let Some((size, current)) = control_file() else { return outcome };
    let Ok(number) = segment.number(size) else { return outcome };
    match (outcome, mode) {
        (Outcome::Written, FetchMode::Recovery | FetchMode::Standby) => on_line(segment, size, current, asked).await,
        (Outcome::Absent | Outcome::Unknown(_), FetchMode::Recovery) if end.stops_at(number.start(size)) => {
            Outcome::Absent
        }
        (Outcome::Absent, FetchMode::Recovery) => match end.until.filter(|until| number.start(size) < *until) {
            Some(until) => Outcome::Unknown(lost(segment, until)),
            None => at_end(segment, size, current, asked).await,
        },
        (outcome, _) => outcome,
    }
}

impl EndArgs {
    fn stops_at(&self, start: Lsn) -> bool {
        self.stop_there && self.until.is_some_and(|until| until <= start)
    }
}

fn lost(segment: SegmentName, until: Lsn) -> String {
    format!(
        "{segment} is in no store any more, and the restore was planned with WAL up to {until}; `pgconvoy restore` plans anew \
         with what is left"
    )
}

async fn on_line(segment: SegmentName, size: SegmentSize, current: Timeline, asked: Asked<'_>) -> Outcome {
    let following = following(Path::new("."), current);
    let (history, reasons) = line::followed_history(asked.stores, asked.cluster, asked.system, following).await;
    let outcome = given(segment, size, following, history, reasons);
    if !matches!(outcome, Outcome::Written) {
        // The answer already says that it is not to be used.
        let _ = std::fs::remove_file(asked.target);
    }
    outcome
}

/// PURE: whether a segment that is there is given, after what the stores said of the line to follow.
fn given(
    segment: SegmentName,
    size: SegmentSize,
    following: Following,
    history: Option<TimelineHistory>,
    reasons: Vec<String>,
) -> Outcome {
    match history {
        Some(history) => match line::past_fork(segment, size, following, &history) {
            None => Outcome::Written,
            Some(past) => Outcome::Refused(past.to_string()),
        },
        None if reasons.is_empty() => Outcome::Written,
        // Who did not answer may know a newer timeline that left this one here.
        None => Outcome::Unknown(reasons.join("; ")),
    }
}

async fn at_end(segment: SegmentName, size: SegmentSize, current: Timeline, asked: Asked<'_>) -> Outcome {
    let following = following(Path::new("."), current);
    match line::later_wal(asked.stores, asked.cluster, asked.system, segment, size, following).await {
        Ok(None) => Outcome::Absent,
        Ok(Some(later)) => {
            Outcome::Unknown(line::absence(asked.stores, asked.cluster, asked.system, segment, later).await)
        }
        Err(reasons) => Outcome::Unknown(reasons.join("; ")),
    }
}

/// Segment size and timeline of the server in the working directory.
fn control_file() -> Option<(SegmentSize, Timeline)> {
    let control = ControlFile::parse(&std::fs::read(super::CONTROL_FILE).ok()?).ok()?;
    Some((control.wal_segment_size, control.checkpoint_timeline))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_given_only_when_no_newer_timeline_can_have_left_it_there() {
        let name = |text: &str| text.parse::<SegmentName>().unwrap();
        let given = |segment: &str, history: Option<&str>, reasons: &[&str]| {
            let parse = |text: &str| TimelineHistory::parse(Timeline::new(2).unwrap(), text.as_bytes()).unwrap();
            let reasons = reasons.iter().map(|reason| (*reason).to_owned()).collect();
            match given(name(segment), SegmentSize::DEFAULT, Following::Latest, history.map(parse), reasons) {
                Outcome::Written => "given".to_owned(),
                Outcome::Absent => "absent".to_owned(),
                Outcome::Unknown(reason) => format!("unknown: {reason}"),
                Outcome::Refused(reason) => format!("refused: {reason}"),
            }
        };
        let (fork, before) = ("000000010000000000000005", "000000010000000000000004");
        let history = Some("1\t0/5000028\tx\n");
        assert_eq!(given(fork, None, &[]), "given");
        assert_eq!(given(fork, None, &["store s3 is away"]), "unknown: store s3 is away");
        assert_eq!(given(before, history, &[]), "given");
        // One that knows more than the rest is enough.
        assert_eq!(given(before, history, &["store s3 is away"]), "given");
        assert!(given(fork, history, &[]).starts_with("refused: 000000010000000000000005 is not given"));
    }

    #[test]
    fn recovery_stops_where_the_plan_said_so_and_only_there() {
        let at = |text: &str| text.parse::<Lsn>().unwrap();
        let end = EndArgs { until: Some(at("0/5000000")), stop_there: true };
        assert!(end.stops_at(at("0/5000000")) && end.stops_at(at("0/6000000")) && !end.stops_at(at("0/4000000")));
        assert!(!EndArgs { stop_there: false, ..end }.stops_at(at("0/6000000")));
    }
}
