//! One line and an exit code as monitoring plugins give them: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN, and numbers behind a bar.
//!
//! Pure. The codes are the plugins' own and mean something else than those of [`Exit`]'s table.

use process::exit::Exit;
use proto::operator::{CheckLine, CheckState};

use super::services::Figure;

/// The state of a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Ok,
    Warning,
    Critical,
    Unknown,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        }
    }

    /// The exit whose number is this state's.
    pub(crate) fn exit(self) -> Exit {
        match self {
            Self::Ok => Exit::Ok,
            Self::Warning => Exit::Negative,
            Self::Critical => Exit::Usage,
            Self::Unknown => Exit::Config,
        }
    }
}

/// The worst of all lines; a check without a line knows nothing.
pub(crate) fn state(lines: &[CheckLine]) -> State {
    let any = |state: CheckState| lines.iter().any(|line| line.state() == state);
    match () {
        () if any(CheckState::Failed) => State::Critical,
        () if lines.is_empty() || any(CheckState::Unspecified) => State::Unknown,
        () if any(CheckState::Warning) => State::Warning,
        () => State::Ok,
    }
}

/// The line of a check that was made.
pub(crate) fn line(cluster: &str, lines: &[CheckLine], figures: &[Figure]) -> String {
    let of = |state: CheckState| lines.iter().filter(move |line| line.state() == state);
    let worst: Vec<String> = of(CheckState::Failed)
        .chain(of(CheckState::Unspecified))
        .chain(of(CheckState::Warning))
        .map(|line| format!("{}: {}", line.rule, line.text))
        .collect();
    let said = match worst.is_empty() {
        true => format!("{cluster}: {} rules hold", lines.len()),
        false => format!("{cluster}: {}", worst.join("; ")),
    };
    let (failed, warning) = (of(CheckState::Failed).count(), of(CheckState::Warning).count());
    let mut numbers = format!("rules={};;;0 warnings={warning};0;;0 failures={failed};;0;0", lines.len());
    for figure in figures {
        numbers.push_str(&format!(" {}={}{};;{};0", figure.name, figure.value, figure.unit, figure.limit));
    }
    format!("PGCONVOY {} - {} | {numbers}", state(lines).word(), plain(&said))
}

/// The line of a check that could not be made.
pub(crate) fn unknown(why: &str) -> String {
    format!("PGCONVOY {} - {}", State::Unknown.word(), plain(why))
}

/// One line without the bar that begins the numbers.
fn plain(text: &str) -> String {
    text.replace('|', "/").split_whitespace().collect::<Vec<&str>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(rule: &str, state: CheckState) -> CheckLine {
        CheckLine { rule: rule.to_owned(), state: state.into(), text: "a | b\nc".to_owned() }
    }

    #[test]
    fn codes_are_those_of_plugins() {
        let codes = [State::Ok, State::Warning, State::Critical, State::Unknown].map(|state| state.exit().code());
        assert_eq!(codes, [0, 1, 2, 3]);
    }

    #[test]
    fn the_worst_rule_decides() {
        let (ok, warning) = (rule("a", CheckState::Ok), rule("b", CheckState::Warning));
        let failed = rule("c", CheckState::Failed);
        assert_eq!(state(&[]), State::Unknown);
        assert_eq!(state(std::slice::from_ref(&ok)), State::Ok);
        assert_eq!(state(&[ok.clone(), warning.clone()]), State::Warning);
        assert_eq!(state(&[ok.clone(), warning.clone(), failed.clone()]), State::Critical);
        assert_eq!(state(&[ok, rule("d", CheckState::Unspecified)]), State::Unknown);
    }

    #[test]
    fn the_line_is_one_line_with_one_bar() {
        let figures = [Figure { name: "backup_age", value: 60, unit: "s", limit: "3600".to_owned() }];
        let lines = [rule("agent", CheckState::Ok), rule("store s3", CheckState::Warning)];
        assert_eq!(
            line("main", &lines, &figures),
            "PGCONVOY WARNING - main: store s3: a / b c | rules=2;;;0 warnings=1;0;;0 failures=0;;0;0 \
             backup_age=60s;;3600;0"
        );
        assert!(line("main", &lines[..1], &[]).starts_with("PGCONVOY OK - main: 1 rules hold | rules=1"));
        assert_eq!(unknown("no | answer\nat all"), "PGCONVOY UNKNOWN - no / answer at all");
    }
}
