//! Verbs that show what they would do before they do it. `--confirm` does what is shown, `--confirm=PLAN` only what was shown
//! before under that name; the coordinator refuses what is another plan by now.
//!
//! What a plan is and how it reads is the verb's own affair.

use process::exit::Exit;
use serde::de::DeserializeOwned;

use crate::{args::Output, error::CliError, output};

/// How a verb's report is read.
pub(crate) struct Reading<'a, R> {
    /// The name of its plan.
    pub(crate) plan: fn(&R) -> &str,
    /// Whether there is anything to do.
    pub(crate) acts: fn(&R) -> bool,
    /// Whether nothing failed.
    pub(crate) is_complete: fn(&R) -> bool,
    /// As text.
    pub(crate) render: fn(&R) -> String,
    /// What it comes to, and what to do.
    pub(crate) next: &'a dyn Fn(&R) -> String,
}

/// A report, and the JSON that it came as: what this version does not know survives there.
type Shown<R> = (R, serde_json::Value);

/// Shows a plan, and has it carried out if that is confirmed. `ask` gets the plan to carry out, "" to be shown it, and gives the
/// report's JSON.
///
/// # Errors
/// Those of `ask`, and when a report cannot be read.
pub(crate) async fn shown_before_done<R: DeserializeOwned>(
    confirm: Option<&str>,
    output: Output,
    reading: &Reading<'_, R>,
    mut ask: impl AsyncFnMut(String) -> Result<String, CliError>,
) -> Result<Exit, CliError> {
    let named = confirm.unwrap_or_default();
    let shown = read(&ask(named.to_owned()).await?)?;
    let confirms_what_comes = confirm.is_some() && named.is_empty();
    if !confirms_what_comes || !(reading.acts)(&shown.0) {
        return conclude(&shown, output, reading);
    }
    // What is carried out is what stands here, or nothing.
    if output == Output::Text {
        output::text(&(reading.render)(&shown.0))?;
    }
    let done = read(&ask((reading.plan)(&shown.0).to_owned()).await?)?;
    conclude(&done, output, reading)
}

fn read<R: DeserializeOwned>(json: &str) -> Result<Shown<R>, CliError> {
    let unreadable = |source: serde_json::Error| {
        CliError::new(Exit::Refused, "the report that came is not one this version can read").caused_by(source)
    };
    Ok((serde_json::from_str(json).map_err(unreadable)?, serde_json::from_str(json).map_err(unreadable)?))
}

fn conclude<R>((report, json): &Shown<R>, output: Output, reading: &Reading<'_, R>) -> Result<Exit, CliError> {
    match output {
        Output::Json => output::json(json)?,
        Output::Text => {
            output::text(&(reading.render)(report))?;
            output::line(&(reading.next)(report))?;
        }
    }
    Ok(if (reading.is_complete)(report) { Exit::Ok } else { Exit::Partial })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was asked for, by what the operator says.
    async fn asked(confirm: Option<&str>, acts: bool) -> Vec<String> {
        let acts: fn(&String) -> bool = if acts { |_| true } else { |_| false };
        let next = |_: &String| String::new();
        let (plan, render) = (String::as_str as fn(&String) -> &str, String::clone as fn(&String) -> String);
        let reading = Reading { plan, acts, is_complete: |_| true, render, next: &next };
        let mut asked = Vec::new();
        let ask = async |plan: String| {
            asked.push(plan);
            Ok("\"0123\"".to_owned())
        };
        assert_eq!(shown_before_done(confirm, Output::Json, &reading, ask).await.unwrap(), Exit::Ok);
        asked
    }

    #[tokio::test]
    async fn nothing_is_carried_out_but_what_was_shown() {
        assert_eq!(asked(None, true).await, [""]);
        assert_eq!(asked(Some(""), true).await, ["", "0123"]);
        assert_eq!(asked(Some(""), false).await, [""]);
        assert_eq!(asked(Some("89ab"), true).await, ["89ab"]);
    }
}
