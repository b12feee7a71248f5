//! PURE: what a dry run found out, as lines under the plan.

use std::fmt::Write;

use agent::restore::{Place, Survey};

use crate::progress::bytes_for_people;

/// Width of a line's name, as in the plan.
const NAME_WIDTH: usize = 15;
/// Seconds in a minute and in an hour.
const MINUTE_SECONDS: u64 = 60;
const HOUR_SECONDS: u64 = 60 * MINUTE_SECONDS;

/// The lines.
pub(super) fn text(survey: &Survey, place: Place) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<NAME_WIDTH$} {value}");
    };
    line("files", format!("{}, {}", survey.files, bytes_for_people(survey.file_bytes)));
    let most = if place == Place::Existing { "at most " } else { "" };
    let read = bytes_for_people(survey.read_bytes);
    line("reads", format!("{most}{read} in {} requests from {}", survey.requests, survey.store));
    if !survey.then.is_empty() {
        let then: Vec<&str> = survey.then.iter().map(AsRef::as_ref).collect();
        line("reads", format!("nothing from {}, unless {} fails or is slow", then.join(", "), survey.store));
    }
    line("takes", takes(survey, most));
    for note in &survey.notes {
        line("note", note.clone());
    }
    text
}

fn takes(survey: &Survey, most: &str) -> String {
    let (Some(measured), Some(seconds)) = (survey.measured, survey.estimated_seconds) else {
        return format!("an unknown time: {} could not be measured, or there is too little to read", survey.store);
    };
    format!(
        "{most}{}, the longer of reading (now {} came from {} in {:.1} s, {} requests at a time) and writing (if the disk takes {} a second)",
        span(seconds),
        bytes_for_people(measured.bytes),
        survey.store,
        measured.milliseconds as f64 / 1000.0,
        measured.parallel,
        bytes_for_people(survey.assumed_bytes_per_second),
    )
}

fn span(seconds: u64) -> String {
    match seconds {
        0..MINUTE_SECONDS => format!("about {} s", seconds.max(1)),
        MINUTE_SECONDS..HOUR_SECONDS => format!("about {} min", seconds.div_ceil(MINUTE_SECONDS)),
        _ => format!("about {} h {} min", seconds / HOUR_SECONDS, seconds % HOUR_SECONDS / MINUTE_SECONDS),
    }
}

#[cfg(test)]
mod tests {
    use agent::restore::Measured;

    use super::*;

    #[test]
    fn a_forecast_says_of_what_it_is_made() {
        let measured = Measured { bytes: 32 << 20, milliseconds: 2000, parallel: 4 };
        let mut survey = Survey {
            files: 1200,
            file_bytes: 64 << 30,
            store: "repo1".parse().unwrap(),
            then: vec!["bucket".parse().unwrap()],
            requests: 2500,
            read_bytes: 20 << 30,
            measured: Some(measured),
            estimated_seconds: Some(1280),
            assumed_bytes_per_second: 256 << 20,
            notes: vec!["pglog was a link".to_owned()],
        };
        assert_eq!(
            text(&survey, Place::Free),
            "files           1200, 64.00 GiB\n\
             reads           20.00 GiB in 2500 requests from repo1\n\
             reads           nothing from bucket, unless repo1 fails or is slow\n\
             takes           about 22 min, the longer of reading (now 32.00 MiB came from repo1 in 2.0 s, 4 requests at a time) \
             and writing (if the disk takes 256.00 MiB a second)\n\
             note            pglog was a link\n"
        );
        (survey.measured, survey.estimated_seconds) = (None, None);
        assert!(text(&survey, Place::Existing).contains("reads           at most 20.00 GiB"));
        assert!(text(&survey, Place::Free).contains("takes           an unknown time"));
    }

    #[test]
    fn spans_are_rounded_to_what_people_plan_with() {
        let check = |seconds, expected: &str| assert_eq!(span(seconds), expected);
        check(0, "about 1 s");
        check(59, "about 59 s");
        check(61, "about 2 min");
        check(3600 * 5 + 130, "about 5 h 2 min");
    }
}
