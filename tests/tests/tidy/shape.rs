//! The shape of files: a head that says what the room is for, a length that can be read, a name that is a noun.

use crate::source::{Finding, Project};
use crate::{expect_lines, expect_none};

/// Longer files are looked at hard.
const MAX_LINES: usize = 600;

/// Files that are longer, with their length: they may only shrink, and leave the list below [`MAX_LINES`].
const LONG: [(&str, usize); 0] = [];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 10] =
    ["utils", "util", "common", "helpers", "helper", "types", "manager", "handler", "core", "misc"];

fn heads(project: &Project) -> Vec<Finding> {
    let headless = project.rust().filter(|file| !file.text.starts_with("//! "));
    headless.map(|file| file.find(1, "does not open with //! and what the file is for")).collect()
}

fn lengths(project: &Project, long: &[(&str, usize)]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in project.rust() {
        let lines = file.text.lines().count();
        match long.iter().find(|(path, _)| *path == file.path) {
            None if lines > MAX_LINES => {
                findings.push(file.find(MAX_LINES, format!("{lines} lines, more than {MAX_LINES}")))
            }
            Some((_, recorded)) if lines > *recorded => {
                findings.push(
                    file.find(lines, format!("grew from {recorded} lines to {lines}; long files may only shrink")),
                );
            }
            Some((_, recorded)) if lines < *recorded => {
                findings.push(
                    file.find(lines, format!("shrank from {recorded} lines to {lines}; write that into the list")),
                );
            }
            _ => {}
        }
    }
    let gone =
        long.iter().filter(|(path, lines)| *lines <= MAX_LINES || !project.rust().any(|file| file.path == *path));
    findings.extend(gone.map(|(path, _)| Finding {
        path: (*path).to_owned(),
        line: 1,
        what: "needs no exception any more; take it off the list".to_owned(),
    }));
    findings
}

fn file_names(project: &Project) -> Vec<Finding> {
    let empty = |path: &str| path.split('/').any(|name| EMPTY_NAMES.contains(&name.split('.').next().unwrap_or(name)));
    project.rust().filter(|file| empty(&file.path)).map(|file| file.find(1, "the name says nothing")).collect()
}

#[test]
fn every_file_has_a_head() {
    expect_none(heads(&Project::whole()));
    expect_lines(heads, "a.rs", "//! Good.\n", &[]);
    expect_lines(heads, "a.rs", "use std::fmt;\n", &[1]);
    expect_lines(heads, "a.rs", "// Not a head.\n", &[1]);
}

#[test]
fn files_are_short_and_long_ones_shrink() {
    expect_none(lengths(&Project::whole(), &LONG));
    let project = |lines: usize| Project::of(&[("a.rs", &*"\n".repeat(lines))]);
    assert_eq!(lengths(&project(600), &[]).len(), 0);
    assert_eq!(lengths(&project(601), &[]).len(), 1);
    assert_eq!(lengths(&project(700), &[("a.rs", 700)]).len(), 0);
    assert_eq!(lengths(&project(701), &[("a.rs", 700)]).len(), 1);
    assert_eq!(lengths(&project(699), &[("a.rs", 700)]).len(), 1);
    assert_eq!(lengths(&project(600), &[("a.rs", 600)]).len(), 1);
    assert_eq!(lengths(&project(1), &[("gone.rs", 700)]).len(), 1);
}

#[test]
fn names_are_nouns_with_a_meaning() {
    expect_none(file_names(&Project::whole()));
    expect_lines(file_names, "agent/src/road.rs", "", &[]);
    expect_lines(file_names, "agent/src/utils.rs", "", &[1]);
    expect_lines(file_names, "agent/src/common/road.rs", "", &[1]);
}
