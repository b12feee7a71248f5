//! The alert rules that the packages ship: Prometheus' own tool takes them and plays them, every metric in them and in README
//! is one that our daemons export, and what tells an age has a twin that tells when nothing is told.
//!
//! That the daemons export what METRICS.md tells, no more and no less, is tested where the metrics are.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use process::telemetry::exposition::documented;

const RULES: &str = include_str!("../../packaging/prometheus/pgconvoy.rules.yml");
const CASES: &str = include_str!("../alerts/pgconvoy.rules.test.yml");
const PAGE: &str = include_str!("../../packaging/prometheus/METRICS.md");
const README: &str = include_str!("../../README.md");

/// Every alert with its expression.
fn alerts() -> Vec<(String, String)> {
    let field = |line: &str, name: &str| line.trim_start_matches([' ', '-']).strip_prefix(name).map(str::to_owned);
    let mut found: Vec<(String, String)> = Vec::new();
    for line in RULES.lines() {
        if let Some(name) = field(line, "alert: ") {
            found.push((name, String::new()));
        } else if let Some(expression) = field(line, "expr: ") {
            found.last_mut().unwrap().1 = expression;
        }
    }
    found
}

/// The names of ours in a text. A histogram's samples are known by its family.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let ours = words.filter(|word| word.starts_with("pgconvoy_") && !word.ends_with('_'));
    ours.map(|word| word.strip_suffix("_bucket").unwrap_or(word).to_owned()).collect()
}

#[test]
fn every_metric_that_is_named_exists() {
    let mut exported = documented(PAGE, "## Agent");
    exported.extend(documented(PAGE, "## Coordinator"));
    assert!(exported.len() > 50, "only {} metrics are told", exported.len());
    let watched = README.split("\n## ").find(|part| part.starts_with("Watch it")).unwrap();
    for (place, text) in [("the rules", RULES), ("their cases", CASES), ("README", watched)] {
        let unknown: Vec<String> = metrics_in(text).difference(&exported).cloned().collect();
        assert!(unknown.is_empty(), "{place} names {unknown:?}, which no daemon exports");
    }
}

#[test]
fn what_tells_an_age_has_a_twin_for_when_nothing_is_told() {
    let alerts = alerts();
    assert!(alerts.len() > 30, "only {} alerts", alerts.len());
    let all: String = alerts.iter().map(|(_, expression)| expression.as_str()).collect();
    for (name, expression) in &alerts {
        if expression.contains("time() -") || name == "PgconvoyRpoTooLarge" {
            for metric in metrics_in(expression) {
                assert!(all.contains(&format!("absent({metric})")), "{name} has no twin with absent({metric})");
            }
        }
    }
    for job in ["agent", "coordinator"] {
        assert!(all.contains(&format!("up{{job=~\"pgconvoy-{job}.*\"}} == 0")), "nothing tells that the {job} is gone");
    }
}

#[test]
fn every_alert_is_played() {
    let absent_ones_are_counted = CASES.contains("alertname=~\".*Absent\"");
    let silent: Vec<String> = alerts()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !(CASES.contains(&format!("\"{name}\"")) || CASES.contains(&format!("alertname: {name}\n"))))
        .filter(|name| !(absent_ones_are_counted && name.ends_with("Absent")))
        .collect();
    assert!(silent.is_empty(), "no case plays {silent:?}");
}

/// Left out where promtool cannot be had, but for continuous integration.
#[test]
fn promtool_takes_the_rules_and_plays_the_cases() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = Command::new(here.join("promtool.sh")).output().unwrap();
    if !found.status.success() {
        let why = String::from_utf8_lossy(&found.stderr);
        assert!(std::env::var_os("CI").is_none(), "{why}");
        eprintln!("left out: {why}");
        return;
    }
    let promtool = String::from_utf8(found.stdout).unwrap();
    for arguments in [
        ["check", "rules", "../packaging/prometheus/pgconvoy.rules.yml"],
        ["test", "rules", "alerts/pgconvoy.rules.test.yml"],
    ] {
        let said = Command::new(promtool.trim()).args(arguments).current_dir(here).output().unwrap();
        let told = [said.stdout, said.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(said.status.success(), "{arguments:?}: {told}");
    }
}
