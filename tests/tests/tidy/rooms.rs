//! Things that live in one room: object keys, SQL, exit codes, the environment. And paths that the project may not know.

use crate::source::{File, Finding, Project, Rust};
use crate::{expect_lines, expect_none};

/// A kind of string literal or code that belongs in some files only. Tests are free to spell it again: a second spelling proves the first.
struct Room {
    /// Path beginnings where it belongs.
    at: &'static [&'static str],
    what: &'static str,
}

const KEYS: Room = Room {
    at: &["crates/repository/src/key.rs", "crates/repository/src/conformance.rs"],
    what: "an object key is spelled outside crates/repository/src/key.rs",
};
const SQL: Room = Room {
    // The second is SQL for PostgreSQL, not for the catalog.
    at: &["coordinator/src/catalog", "agent/src/postgres"],
    what: "SQL outside the catalog",
};
const SQLITE: Room = Room { at: &["coordinator/src/catalog"], what: "SQLite outside the catalog" };
const EXIT_CODES: Room = Room {
    // The second ends a program by the shell's rule for a second signal, 128 and its number.
    at: &["crates/process/src/exit.rs", "crates/process/src/shutdown.rs"],
    what: "an exit code as a number, use process::exit::Exit",
};
const DELETING: Room = Room {
    // The others are how stores do it, and how they are tested.
    at: &[
        "crates/repository/src/sweep",
        "crates/repository/src/verify/repair.rs",
        "crates/repository/src/stores/",
        "crates/repository/src/conformance.rs",
    ],
    what: "an object is removed outside of the sweep and of repairs",
};
const ENVIRONMENT: Room = Room {
    at: &[
        "agent/src/config.rs",
        "agent/src/postgres/libpq.rs",
        "agent/src/bin/pgconvoy-wal.rs",
        "coordinator/src/config.rs",
        "crates/cli/src/args.rs",
        "crates/cli/src/config.rs",
        "crates/process/src/clock.rs",
        "crates/process/src/config.rs",
        "crates/process/src/crash.rs",
        "crates/process/src/notify.rs",
        "crates/process/src/patience.rs",
        "crates/process/src/telemetry.rs",
        "proto/build.rs",
    ],
    what: "the environment is read outside a configuration room",
};

impl Room {
    fn holds(&self, file: &File) -> bool {
        file.is_test() || self.at.iter().any(|place| file.path.starts_with(place))
    }
}

/// Findings in the literals of product code outside a room.
fn literals(project: &Project, room: &Room, wrong: fn(&str) -> bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in project.rust().filter(|file| !room.holds(file)) {
        let rust = Rust::read(&file.text);
        let found = rust.literals.iter().filter(|(line, text)| !rust.is_test_line(*line) && wrong(text));
        findings.extend(found.map(|(line, text)| file.find(*line, format!("{}: {text:?}", room.what))));
    }
    findings
}

/// Findings in the product code outside a room.
fn code(project: &Project, room: &Room, wrong: fn(&str) -> bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in project.rust().filter(|file| !room.holds(file)) {
        let rust = Rust::read(&file.text);
        let found = rust.lines().filter(|(line, code)| !rust.is_test_line(*line) && wrong(code));
        findings.extend(found.map(|(line, _)| file.find(line, room.what)));
    }
    findings
}

fn keys(project: &Project) -> Vec<Finding> {
    literals(project, &KEYS, |text| {
        let within = ["/wal/", "/root/", "/history/", "/conflict/", "/decision/", "/writer/"];
        let path = text.starts_with('/') || text.contains(' ') || text.contains("://");
        text.starts_with("c/") || text.starts_with("coord/") || (!path && within.iter().any(|part| text.contains(part)))
    })
}

fn sql(project: &Project) -> Vec<Finding> {
    let statements = literals(project, &SQL, |text| {
        let words: Vec<&str> = text.split_whitespace().take(2).collect();
        matches!(
            words[..],
            ["SELECT", _]
                | ["INSERT", "INTO" | "OR"]
                | ["UPDATE", _]
                | ["DELETE", "FROM"]
                | ["CREATE" | "ALTER" | "DROP", "TABLE" | "INDEX"]
                | ["PRAGMA", _]
        )
    });
    let library = code(project, &SQLITE, |code| code.contains("rusqlite"));
    statements.into_iter().chain(library).collect()
}

fn exit_codes(project: &Project) -> Vec<Finding> {
    code(project, &EXIT_CODES, |code| {
        ["process::exit(", "ExitCode::from("].iter().any(|call| {
            code.match_indices(call)
                .any(|(at, _)| code[at + call.len()..].trim_start().starts_with(|c: char| c.is_ascii_digit()))
        })
    })
}

fn deleting(project: &Project) -> Vec<Finding> {
    code(project, &DELETING, |code| code.contains(".delete("))
}

fn environment(project: &Project) -> Vec<Finding> {
    code(project, &ENVIRONMENT, |code| {
        ["env::var(", "env::var_os(", "env::vars(", "env::vars_os(", "env::set_var("]
            .iter()
            .any(|call| code.contains(call))
    })
}

/// The project is whole in itself: it names no directory around it, and no place of whoever works on it.
fn paths_outside(project: &Project) -> Vec<Finding> {
    let outside = [concat!("/wo", "rk/"), concat!("../sha", "red"), concat!("/ho", "me/"), concat!("/ro", "ot/.")];
    let mut findings = Vec::new();
    for file in &project.files {
        let lines = (1..).zip(file.text.lines());
        let found = lines.filter(|(_, text)| outside.iter().any(|path| names_path(text, path)));
        findings.extend(found.map(|(line, _)| file.find(line, "names a path outside the project")));
    }
    findings
}

/// Whether the text names the path itself, not a longer one that ends like it.
fn names_path(text: &str, path: &str) -> bool {
    text.match_indices(path).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        !before.is_some_and(|last| last.is_alphanumeric() || matches!(last, '_' | '-' | '.' | '}' | '$'))
    })
}

#[test]
fn keys_are_spelled_in_one_file() {
    expect_none(keys(&Project::whole()));
    expect_lines(
        keys,
        "agent/src/a.rs",
        "let a = format!(\"c/{cluster}/x\");\nlet b = \"coord/probe\";\nlet c = \"{x}/wal/{y}\";\n",
        &[1, 2, 3],
    );
    expect_lines(
        keys,
        "agent/src/a.rs",
        "let a = \"/var/wal/x\"; // \"c/\"\nlet b = \"a message with /root/ in it\";\n",
        &[],
    );
    expect_lines(keys, "agent/src/a.rs", "#[cfg(test)]\nmod tests {\n    const A: &str = \"c/\";\n}\n", &[]);
    expect_lines(keys, "crates/repository/src/key.rs", "let a = \"c/\";\n", &[]);
}

#[test]
fn sql_is_in_the_catalog() {
    expect_none(sql(&Project::whole()));
    expect_lines(
        sql,
        "coordinator/src/fleet.rs",
        "let a = \"SELECT 1\";\nlet b = \"INSERT  INTO t\";\nlet c = \"select a road\";\nuse rusqlite::Error;\n",
        &[1, 2, 4],
    );
    expect_lines(sql, "coordinator/src/catalog/wal.rs", "let a = \"SELECT 1\";\n", &[]);
    expect_lines(sql, "agent/src/postgres/live.rs", "let a = \"SELECT 1\";\nuse rusqlite::Error;\n", &[2]);
}

#[test]
fn exit_codes_have_one_table() {
    expect_none(exit_codes(&Project::whole()));
    expect_lines(
        exit_codes,
        "agent/src/a.rs",
        "std::process::exit(3);\nExitCode::from(1)\nExitCode::from(Exit::Ok)\nprocess::exit(code)\n",
        &[1, 2],
    );
}

#[test]
fn objects_are_removed_by_the_sweep() {
    expect_none(deleting(&Project::whole()));
    expect_lines(deleting, "agent/src/road.rs", "store.delete(&key).await?;\n// store.delete(\n", &[1]);
    expect_lines(deleting, "crates/repository/src/sweep.rs", "store.delete(&key).await?;\n", &[]);
}

#[test]
fn the_environment_is_read_in_configuration_rooms() {
    expect_none(environment(&Project::whole()));
    expect_lines(
        environment,
        "agent/src/road.rs",
        "let a = env::var(\"A\");\nlet b = std::env::var_os(\"B\");\nlet c = env!(\"C\");\nlet d = env::args();\n",
        &[1, 2],
    );
    expect_lines(environment, "agent/src/config.rs", "let a = env::var(\"A\");\n", &[]);
}

#[test]
fn nothing_names_a_path_outside() {
    expect_none(paths_outside(&Project::whole()));
    let text = ["see /WO/x", "cp ../SHA/y", "a/WO/b", "$dir/WO/"]
        .map(|line| line.replace("/WO/", concat!("/wo", "rk/")).replace("../SHA", concat!("../sha", "red")));
    expect_lines(paths_outside, "a.sh", &text.join("\n"), &[1, 2]);
}
