//! Words that are not used: other products' nouns, worn-out pairs, and marks of unfinished work.
//!
//! This room is the one place that spells them.

use crate::source::{Finding, Project, Rust};
use crate::{expect_lines, expect_none};

/// The files of these rules.
const HERE: &str = "tests/tests/tidy/";

/// Words in any text of ours, with the files that may use them and what to say instead.
const BANNED: [(&str, &[&str], &str); 4] = [
    (
        "stanza",
        &["README.md", "packaging/", "tests/src/bench/pgbackrest.rs", "crates/cli/src/pgbackrest"],
        "say cluster; pgBackRest's users alone are told what it is called there",
    ),
    ("slave", &[], "say standby"),
    ("tenant", &[], "say cluster or fleet"),
    ("fixme", &[], "do it, or say in the documentation what is missing"),
];

/// The first half of the worn-out pair has other meanings (a branch, a key), so only these are refused.
const BANNED_PAIR: [&str; 4] = ["master server", "master node", "master/", "the master "];

/// Code that is not there yet.
const UNFINISHED: [(&str, &str); 4] = [
    ("todo!", "write it or leave it out"),
    ("unimplemented!", "write it or leave it out"),
    ("#[ignore", "assert what is true today and say so"),
    ("dbg!", "use tracing"),
];

/// PostgreSQL's old word for WAL: in the names of its files and functions, but in none of ours.
const OLD_WORD: &str = "xlog";
/// What introduces a name of ours.
const INTRODUCTIONS: [&str; 12] =
    ["fn", "struct", "enum", "mod", "let", "const", "static", "type", "trait", "macro_rules!", "mut", "for"];

fn banned_words(project: &Project) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in project.files.iter().filter(|file| !file.path.starts_with(HERE) && file.path != "Cargo.lock") {
        for (line, text) in (1..).zip(file.text.lines()) {
            let text = text.to_lowercase();
            let banned = BANNED.iter().filter(|(word, allowed, _)| {
                contains_word(&text, word) && !allowed.iter().any(|place| file.path.starts_with(place))
            });
            findings.extend(banned.map(|(word, _, instead)| file.find(line, format!("{word}: {instead}"))));
            if BANNED_PAIR.iter().any(|words| text.contains(words)) {
                findings.push(file.find(line, "say primary"));
            }
        }
    }
    findings
}

/// Whether the word, or its plural, stands in the text with no letter around it.
fn contains_word(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].trim_start_matches('s').chars().next();
        !before.is_some_and(char::is_alphabetic) && !after.is_some_and(char::is_alphabetic)
    })
}

fn unfinished_code(project: &Project) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in project.rust() {
        let rust = Rust::read(&file.text);
        for (line, code) in rust.lines() {
            let unfinished = UNFINISHED.iter().filter(|(mark, _)| code.contains(mark));
            findings.extend(unfinished.map(|(mark, instead)| file.find(line, format!("{mark}: {instead}"))));
        }
    }
    findings
}

fn old_word_in_names(project: &Project) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in project.rust() {
        if file.path.to_lowercase().contains(OLD_WORD) {
            findings.push(file.find(1, "the old word for WAL in a file's name"));
        }
        let rust = Rust::read(&file.text);
        for (line, code) in rust.lines() {
            let mut words =
                code.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '!').filter(|word| !word.is_empty());
            let mut introduced = false;
            let named = words.any(|word| {
                let found = introduced && word.to_lowercase().contains(OLD_WORD);
                introduced = INTRODUCTIONS.contains(&word);
                found
            });
            if named {
                findings.push(file.find(line, "the old word for WAL in a name of ours"));
            }
        }
    }
    findings
}

#[test]
fn words_are_the_projects_own() {
    expect_none(banned_words(&Project::whole()));
    expect_lines(banned_words, "a.md", "a cluster\nA Stanza\nstanzas.\nsubstanzal\n", &[2, 3]);
    expect_lines(banned_words, "README.md", "what others call a stanza\n", &[]);
    expect_lines(
        banned_words,
        "agent/src/a.rs",
        "// multi-tenant\n// the tenants' keys\n// lieutenant\n// FIXME: x\n",
        &[1, 2, 4],
    );
    expect_lines(banned_words, "a.md", "master/slave\nthe main branch\nThe master server\n", &[1, 1, 3]);
}

#[test]
fn code_is_finished() {
    expect_none(unfinished_code(&Project::whole()));
    expect_lines(
        unfinished_code,
        "a.rs",
        "//! todo!()\nfn a() { todo!() }\n#[ignore = \"later\"]\nconst A: &str = \"dbg!\";\n",
        &[2, 3],
    );
    expect_lines(unfinished_code, "a.rs", "fn a() { unimplemented!() }\nfn b() { dbg!(1); }\n", &[1, 2]);
}

#[test]
fn the_log_is_called_wal() {
    expect_none(old_word_in_names(&Project::whole()));
    expect_lines(
        old_word_in_names,
        "a.rs",
        "// xlog.c\nlet a = \"xlogtemp\";\nfn read_xlog() {}\nstruct XLogPage;\nuse b::XLOG;\nlet mut my_xlog = 1;\n",
        &[3, 4, 6],
    );
    expect_lines(old_word_in_names, "agent/src/xlog.rs", "", &[1]);
}
