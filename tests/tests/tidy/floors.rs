//! Floors: a crate depends only on crates below it, and the top level holds what the plan of the house shows.

use crate::source::{File, Finding, Project};
use crate::{expect_none, source};

/// Every crate and what of ours it may depend on, also in tests.
const FLOORS: [(&str, &[&str]); 8] = [
    ("crates/postgres-format/Cargo.toml", &[]),
    ("crates/process/Cargo.toml", &[]),
    ("crates/repository/Cargo.toml", &["postgres-format"]),
    ("proto/Cargo.toml", &["postgres-format"]),
    ("agent/Cargo.toml", &["postgres-format", "process", "proto", "repository"]),
    ("coordinator/Cargo.toml", &["postgres-format", "process", "proto", "repository"]),
    ("crates/cli/Cargo.toml", &["agent", "postgres-format", "process", "proto", "repository"]),
    ("tests/Cargo.toml", &["agent", "cli", "coordinator", "postgres-format", "process", "proto", "repository"]),
];
const OURS: [&str; 8] = ["agent", "cli", "coordinator", "postgres-format", "process", "proto", "repository", "tests"];

/// The top level; tool settings are dotted and not listed.
const TOP: [&str; 11] = [
    "Cargo.toml",
    "Cargo.lock",
    "LICENSE",
    "Makefile",
    "README.md",
    "agent",
    "coordinator",
    "crates",
    "packaging",
    "proto",
    "tests",
];

fn dependencies_point_down(project: &Project) -> Vec<Finding> {
    let manifests = project.files.iter().filter(|file| file.path.ends_with("/Cargo.toml"));
    manifests.flat_map(check_manifest).collect()
}

fn check_manifest(manifest: &File) -> Vec<Finding> {
    let Some((_, allowed)) = FLOORS.iter().find(|(path, _)| *path == manifest.path) else {
        return vec![manifest.find(1, "a crate on no floor")];
    };
    let table: toml::Table = manifest.text.parse().unwrap();
    let targets = table.get("target").and_then(toml::Value::as_table).into_iter().flat_map(|targets| targets.values());
    let places = targets.filter_map(toml::Value::as_table).chain([&table]);
    let sections = ["dependencies", "dev-dependencies", "build-dependencies"];
    places
        .flat_map(|place| sections.iter().filter_map(|section| place.get(*section)?.as_table()))
        .flat_map(toml::Table::keys)
        .filter(|name| OURS.contains(&name.as_str()) && !allowed.contains(&name.as_str()))
        .map(|name| manifest.find(line_of(manifest, name), format!("depends on {name}, which is not below it")))
        .collect()
}

fn line_of(file: &File, name: &str) -> usize {
    file.text.lines().position(|line| line.starts_with(name)).map_or(1, |index| index + 1)
}

/// Versions are in the root manifest only.
fn versions_are_in_one_place(project: &Project) -> Vec<Finding> {
    let manifests = project.files.iter().filter(|file| file.path.ends_with("/Cargo.toml"));
    let mut findings = Vec::new();
    for manifest in manifests {
        let table: toml::Table = manifest.text.parse().unwrap();
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(section) = table.get(section).and_then(toml::Value::as_table) else { continue };
            let own = |value: &toml::Value| value.get("workspace").and_then(toml::Value::as_bool) != Some(true);
            let names = section.iter().filter(|(_, value)| own(value)).map(|(name, _)| name);
            findings.extend(
                names.map(|name| manifest.find(line_of(manifest, name), format!("{name} has a version of its own"))),
            );
        }
    }
    findings
}

fn top_level(names: &[String]) -> Vec<String> {
    names.iter().filter(|name| !name.starts_with('.') && !TOP.contains(&name.as_str())).cloned().collect()
}

#[test]
fn crates_depend_downwards_only() {
    let project = Project::whole();
    for (path, _) in FLOORS {
        assert!(project.files.iter().any(|file| file.path == path), "{path} is gone");
    }
    expect_none(dependencies_point_down(&project));
    expect_none(versions_are_in_one_place(&project));
}

#[test]
fn the_top_level_is_as_given() {
    assert_eq!(top_level(&source::Project::whole().top), [""; 0]);
}

#[test]
fn the_rules_bite() {
    let manifest = "[dependencies]\nserde.workspace = true\nproto.workspace = true\n[dev-dependencies]\nagent.workspace = true\nrand = \"0.9\"\n\
        [target.'cfg(unix)'.dependencies]\ncli.workspace = true\n";
    let repository = Project::of(&[("crates/repository/Cargo.toml", manifest)]);
    let mut lines: Vec<_> = dependencies_point_down(&repository).iter().map(|finding| finding.line).collect();
    lines.sort_unstable();
    assert_eq!(lines, [3, 5, 8]);
    assert_eq!(versions_are_in_one_place(&repository)[0].line, 6);
    assert_eq!(dependencies_point_down(&Project::of(&[("crates/new/Cargo.toml", "")])).len(), 1);
    assert_eq!(dependencies_point_down(&Project::of(&[("tests/Cargo.toml", manifest)])).len(), 0);
    let names = ["agent", ".ci", "utils", "docs"].map(str::to_owned);
    assert_eq!(top_level(&names), ["utils", "docs"]);
}
