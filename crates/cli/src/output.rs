//! Standard output and standard error. A reader that has seen enough (`| head`) ends the process quietly.

use std::io::{self, Write};

use process::exit::Exit;
use serde::Serialize;

use crate::error::CliError;

/// Prints text as it is.
pub(crate) fn text(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    finish(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// Prints one line.
pub(crate) fn line(line: &str) -> Result<(), CliError> {
    text(&format!("{line}\n"))
}

/// Prints a value as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<(), CliError> {
    let body = serde_json::to_string_pretty(value)
        .map_err(|source| CliError::new(Exit::Negative, "cannot print the answer as JSON").caused_by(source))?;
    line(&body)
}

/// Prints to standard error; nobody is left to tell when that fails.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

fn finish(written: io::Result<()>) -> Result<(), CliError> {
    match written {
        Ok(()) => Ok(()),
        // The reader closed the pipe: it has what it wanted.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(Exit::Ok.code().into()),
        Err(error) => Err(CliError::new(Exit::Negative, "cannot write the answer").caused_by(error)),
    }
}

/// A table with columns padded to their widest cell; the first row is the heading.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect();
        assert_eq!(table(&[row(&["A", "B"]), row(&["long", "x"])]), "A     B\nlong  x\n");
        assert_eq!(table(&[]), "");
    }
}
