//! What no tool can be much faster than: a pipe of tar and zstd instead of a backup, and a durable copy of the same bytes
//! instead of a restore.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::stopwatch::{Lap, lap};
use crate::account::{self, Scratch};

/// The files of a data directory one behind the other, without its WAL.
#[derive(Debug)]
pub struct Plain {
    data: PathBuf,
    archive: PathBuf,
    copy: PathBuf,
}

impl Plain {
    /// Of the data directory of a server, as it is now. Files that change meanwhile are no matter: nobody starts this.
    pub fn of(scratch: &Scratch, data: &Path) -> Result<Self> {
        let home = scratch.directory("plain")?;
        let made = Self { data: data.to_owned(), archive: home.join("data.tar"), copy: home.join("copy") };
        made.tar("cat", &made.archive)?;
        Ok(made)
    }

    /// `tar | zstd -3 -T2`, which makes nothing durable.
    pub fn packed(&self) -> Result<Lap> {
        let packed = self.tar("zstd -q -3 -T2", &self.copy)?;
        fs::remove_file(&self.copy).context("what was packed")?;
        Ok(packed)
    }

    fn tar(&self, filter: &str, to: &Path) -> Result<Lap> {
        let (data, to) = (self.data.display(), to.display());
        lap(shell(&format!("tar -C {data} --exclude ./pg_wal -cf - . | {filter} >{to}")))
    }

    /// `dd conv=fsync`.
    pub fn copied(&self) -> Result<Lap> {
        let (from, to) = (self.archive.display(), self.copy.display());
        let copied = lap(shell(&format!("dd if={from} of={to} bs=1M conv=fsync status=none")))?;
        fs::remove_file(&self.copy).context("the copy")?;
        Ok(copied)
    }
}

fn shell(line: &str) -> Command {
    let mut command = account::command("/bin/sh");
    command.args(["-c", line]);
    command
}
