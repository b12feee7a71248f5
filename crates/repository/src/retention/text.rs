//! A plan as text for people.

use std::fmt::Write;

use super::{Plan, Verdict};

/// One line for everything a plan is about, with its reason.
pub fn render(plan: &Plan) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "store {}, cluster {}, as of {}", plan.store, plan.cluster, plan.as_of);
    if let Some(frozen) = &plan.frozen {
        let _ = writeln!(text, "  NOTHING IS REMOVED: {frozen}");
    }
    for line in &plan.backups {
        let _ = writeln!(text, "  {} backup {}: {}", word(line.verdict), line.backup, line.reasons.join("; "));
    }
    for line in &plan.leftovers {
        let _ = writeln!(text, "  {} objects of {}: {}", word(line.verdict), line.backup, line.reason);
    }
    if let Some(reason) = &plan.packs_kept {
        let _ = writeln!(text, "  keep   packs: {reason}");
    }
    for line in &plan.wal {
        let (timeline, from) = (line.kept.timeline(), line.kept.from);
        let _ = match line.removed_segments {
            0 => writeln!(text, "  keep   WAL of timeline {timeline} from {from} on: {}", line.reason),
            count => {
                writeln!(text, "  remove {count} WAL segments of timeline {timeline} before {from}: {}", line.reason)
            }
        };
        for span in &line.kept.also {
            let _ =
                writeln!(text, "  keep   WAL {} to {}: an older backup is consistent with it", span.first, span.last);
        }
    }
    text
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Keep => "keep  ",
        Verdict::Remove => "remove",
    }
}
