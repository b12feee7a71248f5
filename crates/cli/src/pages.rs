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

/// Writes `pgconvoy.1` and one page a verb into a directory, and the protos' descriptor set where it is wanted.
pub(crate) fn man(directory: &Path, descriptors: Option<&Path>) -> Result<Exit, CliError> {
    let mut command = Arguments::command();
    command.build();
    page(&command, "pgconvoy", directory)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        page(verb, &format!("pgconvoy-{}", verb.get_name()), directory)?;
    }
    if let Some(path) = descriptors {
        write(path, proto::DESCRIPTOR_SET)?;
    }
    Ok(Exit::Ok)
}

fn page(command: &clap::Command, name: &str, directory: &Path) -> Result<(), CliError> {
    let command = command.clone().display_name(name.to_owned()).bin_name(name.replacen('-', " ", 1));
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
        for verb in ["", "-backup", "-restore", "-info", "-fetch", "-check"] {
            let text = fs::read_to_string(directory.join(format!("pgconvoy{verb}.1"))).unwrap();
            assert!(text.contains(".SH SYNOPSIS"), "{verb}");
        }
        assert!(!directory.join("pgconvoy-man.1").exists());
        fs::remove_dir_all(&directory).unwrap();
    }
}
