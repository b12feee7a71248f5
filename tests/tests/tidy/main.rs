//! Style as a test: what the house rules say and a program can check.
//!
//! Each rule is a pure function from the project's files to findings. It is run over the project, where it must find nothing, and over a few
//! lines that break it, where it must find that: a rule that cannot bite is no rule. The lists of exceptions are part of the rules and get
//! shorter, not longer.

#![allow(clippy::unwrap_used)]

mod floors;
mod rooms;
mod samples;
mod shape;
mod source;
mod supply;
mod words;

use source::{Finding, Project};

/// Fails with every finding on a line of its own.
#[track_caller]
fn expect_none(findings: Vec<Finding>) {
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(findings.is_empty(), "{} findings:\n{}", lines.len(), lines.join("\n"));
}

/// Runs a rule over one made-up file and expects findings on exactly these lines.
#[track_caller]
fn expect_lines(rule: fn(&Project) -> Vec<Finding>, path: &str, text: &str, lines: &[usize]) {
    let project = Project::of(&[(path, text)]);
    let found: Vec<usize> = rule(&project).iter().map(|finding| finding.line).collect();
    assert_eq!(found, lines, "in {path}:\n{text}");
}
