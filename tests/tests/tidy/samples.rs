//! Sample configurations are valid, and each is read by a test of the program it is for.
//!
//! What a sample means is checked where its settings are, with the program's own reader; here only that none is forgotten.

use crate::source::{Finding, Project, Rust};
use crate::{expect_lines, expect_none};

const SAMPLES: &str = "packaging/etc/";

fn samples_parse(project: &Project) -> Vec<Finding> {
    let samples =
        project.files.iter().filter(|file| file.path.starts_with("packaging/") && file.path.ends_with(".toml"));
    let mut findings = Vec::new();
    for sample in samples {
        if let Err(error) = sample.text.parse::<toml::Table>() {
            let before = error.span().map_or(0, |span| span.start);
            let line = sample.text[..before].matches('\n').count() + 1;
            findings.push(sample.find(line, error.message()));
        }
    }
    findings
}

fn samples_are_read_by_a_test(project: &Project) -> Vec<Finding> {
    let mut read = Vec::new();
    for file in project.rust() {
        let rust = Rust::read(&file.text);
        let tests = rust.literals.iter().filter(|(line, _)| file.is_test() || rust.is_test_line(*line));
        read.extend(tests.filter(|(_, text)| text.contains(SAMPLES)).map(|(_, text)| text.clone()));
    }
    let samples = project.files.iter().filter(|file| file.path.starts_with(SAMPLES));
    let forgotten = samples.filter(|sample| !read.iter().any(|text| text.ends_with(&sample.path)));
    forgotten.map(|sample| sample.find(1, "no test reads this sample")).collect()
}

#[test]
fn samples_are_valid_and_tested() {
    let project = Project::whole();
    let samples = project.files.iter().filter(|file| file.path.starts_with(SAMPLES)).count();
    assert!(samples >= 3, "only {samples} samples below {SAMPLES}");
    expect_none(samples_parse(&project));
    expect_none(samples_are_read_by_a_test(&project));
}

#[test]
fn the_rules_bite() {
    expect_lines(samples_parse, "packaging/etc/a.toml", "a = 1\nb = \n", &[2]);
    expect_lines(samples_parse, "packaging/etc/a.toml", "a = 1\n", &[]);
    let named = "#[cfg(test)]\nmod tests {\n    const A: &str = include_str!(\"../../packaging/etc/a.toml\");\n}\n";
    let other = named.replace("a.toml", "b.toml");
    fn with(text: &str) -> Project {
        Project::of(&[("packaging/etc/a.toml", ""), ("agent/src/config.rs", text)])
    }
    assert_eq!(samples_are_read_by_a_test(&with(named)).len(), 0);
    assert_eq!(samples_are_read_by_a_test(&with(&other)).len(), 1);
    assert_eq!(samples_are_read_by_a_test(&with("//! See packaging/etc/a.toml.\n")).len(), 1);
}
