//! A report for people. What needs attention stands in capitals.

use std::fmt::Write;

use super::finding::{BackupVerdict, Depth, Finding, Report, Severity};
use crate::restore_plan::size;

/// Writing to a string cannot fail.
macro_rules! line {
    ($text:expr, $($format:tt)*) => {
        let _ = writeln!($text, $($format)*);
    };
}

/// The report as text.
pub fn render_text(report: &Report) -> String {
    let mut text = String::new();
    let depth = match report.depth {
        Depth::Digests => "digests and WAL coverage",
        Depth::Full => "digests, WAL coverage, and all content decoded",
    };
    line!(text, "cluster {}: {}", report.cluster, report.summary());
    let share = report.share.map(|share| format!(", part {} of {}", share.part + 1, share.of)).unwrap_or_default();
    line!(text, "  looked at   {depth}{share}");
    for store in &report.stores {
        line!(text, "  store       {}: {} objects, {}", store.store, store.objects, size(store.bytes));
        if let Some(reason) = &store.failed {
            line!(text, "              NOT LOOKED AT TO THE END: {reason}");
        }
    }
    report.backups.iter().for_each(|backup| render_backup(&mut text, backup));
    report.findings.iter().for_each(|finding| render_finding(&mut text, finding));
    let left_out: u64 = report.stores.iter().map(|store| store.left_out).sum();
    if left_out > 0 {
        line!(text, "  and {left_out} more findings");
    }
    text
}

fn render_backup(text: &mut String, backup: &BackupVerdict) {
    if !backup.restorable {
        line!(text, "  backup      {}: NOT RESTORABLE", backup.backup);
        backup.reasons.iter().for_each(|reason| {
            line!(text, "              {reason}");
        });
        return;
    }
    let whole: Vec<&str> = backup.stores.iter().filter(|store| store.whole).map(|store| store.store.as_str()).collect();
    let from = if whole.is_empty() { "several stores together".to_owned() } else { whole.join(" or ") };
    let reaches = backup.reaches.zip(backup.timeline);
    let reaches = reaches.map(|(reach, on)| format!(", and on to {reach} of timeline {on}")).unwrap_or_default();
    line!(text, "  backup      {}: can be restored from {from}{reaches}", backup.backup);
    let broken: Vec<&str> =
        backup.stores.iter().filter(|store| !store.whole).map(|store| store.store.as_str()).collect();
    if !broken.is_empty() {
        line!(text, "              NOT WHOLE in {}", broken.join(", "));
    }
}

fn render_finding(text: &mut String, finding: &Finding) {
    let word = match finding.severity {
        Severity::NotRestorable => "NOT RESTORABLE",
        Severity::Lost => "LOST",
        Severity::Damaged => "DAMAGED",
    };
    let place = match (&finding.store, &finding.object) {
        (Some(store), Some(object)) => format!("store {store}: {object}"),
        (Some(store), None) => format!("store {store}: {}", finding.found),
        (None, _) => format!("all stores: {}", finding.found),
    };
    line!(text, "  {word:<14}  {place}");
    if finding.object.is_some() {
        line!(text, "    found         {}", finding.found);
    }
    line!(text, "    expected      {}", finding.expected);
    if !finding.backups.is_empty() {
        let backups: Vec<String> = finding.backups.iter().map(ToString::to_string).collect();
        line!(text, "    needed by     {}", backups.join(", "));
    }
    if let Some(moments) = &finding.moments {
        line!(text, "    costs         {moments}");
    }
    if !finding.sound_in.is_empty() {
        let stores: Vec<&str> = finding.sound_in.iter().map(AsRef::as_ref).collect();
        line!(text, "    sound in      {}", stores.join(", "));
    }
    if !finding.remedy.is_empty() {
        line!(text, "    what to do    {}", finding.remedy);
    }
}
