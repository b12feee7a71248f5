//! Completions and manual pages, made from the command line's own description.

use std::{fs, path::Path};

use clap::CommandFactory;
use clap_complete::Shell;
use process::exit::Exit;

use crate::{args::Arguments, error::CliError, output};

/// Prints completions.
pub(crate) fn completions(shell: Shell) -> Result<Exit, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "pgconvoy", &mut script);
    output::text(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Ok)
}

/// Writes `pgconvoy.1` and one page a verb, those under other verbs included, into a directory, and the protos' descriptor set where it is wanted.
pub(crate) fn man(directory: &Path, descriptors: Option<&Path>) -> Result<Exit, CliError> {
    let mut command = Arguments::command();
    command.build();
    for (words, command) in commands(&["pgconvoy"], &command) {
        page(command, &words, directory)?;
    }
    if let Some(path) = descriptors {
        write(path, proto::DESCRIPTOR_SET)?;
    }
    Ok(Exit::Ok)
}

/// A command and all below it, by the words that call them.
fn commands<'a>(words: &[&'a str], command: &'a clap::Command) -> Vec<(Vec<&'a str>, &'a clap::Command)> {
    let below = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    let below = below.flat_map(|verb| commands(&[words, &[verb.get_name()]].concat(), verb));
    std::iter::once((words.to_vec(), command)).chain(below).collect()
}

fn page(command: &clap::Command, words: &[&str], directory: &Path) -> Result<(), CliError> {
    let name = words.join("-");
    let command = command.clone().display_name(name.clone()).bin_name(words.join(" "));
    let mut roff = Vec::new();
    clap_mangen::Man::new(command)
        .manual("pgconvoy manual")
        .source(concat!("pgconvoy ", env!("CARGO_PKG_VERSION")))
        .render(&mut roff)
        .map_err(|source| CliError::new(Exit::Negative, "cannot make the manual page").caused_by(source))?;
    write(&directory.join(format!("{name}.1")), &roff)
}

fn write(path: &Path, content: &[u8]) -> Result<(), CliError> {
    fs::write(path, content)
        .map_err(|source| CliError::new(Exit::Negative, format!("cannot write {}", path.display())).caused_by(source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shown_verb_has_a_page() {
        let directory = std::env::temp_dir().join(format!("pgconvoy-man-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        man(&directory, None).unwrap();
        let text = |verb: &str| fs::read_to_string(directory.join(format!("pgconvoy{verb}.1"))).unwrap();
        for verb in ["", "-backup", "-restore", "-info", "-fetch", "-check", "-cluster", "-man"] {
            assert!(text(verb).contains(".SH SYNOPSIS"), "{verb}");
        }
        for (verb, call) in [("-conflict-resolve", "conflict resolve"), ("-node-adopt", "node adopt")] {
            assert!(text(verb).replace("\\-", "-").contains(&format!("pgconvoy {call}")), "{}", text(verb));
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn every_page_is_in_both_packages() {
        let packages = include_str!("../Cargo.toml");
        let mut command = Arguments::command();
        command.build();
        for (words, _) in commands(&["pgconvoy"], &command) {
            let file = format!("files/man/{}.1.gz\"", words.join("-"));
            assert_eq!(packages.matches(&file).count(), 2, "{file} is not named for .deb and .rpm");
        }
    }
}
