//! The peer: pgbackrest as Debian ships it, with a repository of its own, asynchronous, two processes, zst level 3, bundles
//! of small files and blocks of large ones.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::bucket::SharedBucket;
use super::calls::{Calls, Part};
use crate::account::{self, Scratch};
use crate::postgres::{PORT, Server};
use crate::program::{self, Said};

/// What pgbackrest calls the cluster.
const NAME: &str = "main";
/// Longest run of one command.
const PATIENCE: Duration = Duration::from_secs(300);

/// A configuration of pgbackrest.
#[derive(Debug, Clone)]
pub struct Pgbackrest {
    config: PathBuf,
}

/// Whether pgbackrest talks to the server while it makes its repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerState {
    /// It does.
    Running,
    /// It does not.
    Stopped,
}

/// Where its repository is.
#[derive(Debug, Clone, Copy)]
pub enum Repository<'a> {
    /// In a new directory.
    Directory,
    /// In a bucket, below a new prefix.
    Bucket(&'a SharedBucket),
}

impl Pgbackrest {
    /// Its repository for a data directory, made.
    pub fn set_up(
        scratch: &Scratch,
        name: &str,
        server: &Server,
        state: ServerState,
        repository: Repository<'_>,
    ) -> Result<Self> {
        let directory =
            |part: &str| Ok::<_, anyhow::Error>(scratch.directory(&format!("{name}-{part}"))?.display().to_string());
        let place = match repository {
            Repository::Directory => format!("repo1-path={}\n", directory("repo")?),
            Repository::Bucket(bucket) => bucket.pgbackrest_lines(),
        };
        let text = format!(
            "[global]\n{place}repo1-bundle=y\nbeta=y\nrepo1-block=y\nspool-path={}\nlock-path={}\nlog-path={}\nlog-level-console=warn\n\
             log-level-stderr=off\nlog-level-file=off\narchive-async=y\nprocess-max=2\ncompress-type=zst\n\
             compress-level=3\nstart-fast=y\n\n[{NAME}]\npg1-path={}\npg1-socket-path={}\npg1-port={PORT}\npg1-user=postgres\n",
            directory("spool")?,
            directory("lock")?,
            directory("log")?,
            server.data().display(),
            server.host().display(),
        );
        let made = Self { config: scratch.write(&format!("{name}.conf"), text)? };
        let mut create = made.command(&[]);
        if state == ServerState::Stopped {
            create.arg("--no-online");
        }
        create.arg("stanza-create");
        program::run(create, PATIENCE)?.ok().context("pgbackrest stanza-create")?;
        Ok(made)
    }

    /// One of its commands, to be run.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = account::command("pgbackrest");
        command.arg("--config").arg(&self.config).arg(format!("--stanza={NAME}")).args(arguments);
        command
    }

    /// Runs one of its commands.
    pub fn run(&self, arguments: &[&str]) -> Result<Said> {
        program::run(self.command(arguments), PATIENCE)
    }

    fn line(&self, rest: &str) -> String {
        format!("pgbackrest --config={} --stanza={NAME} {rest}", self.config.display())
    }

    /// `archive_command`.
    pub fn archive_command(&self) -> String {
        self.line("archive-push %p")
    }

    /// `restore_command` for another data directory of the cluster, with a spool and a lock of its own.
    pub fn restore_command(&self, scratch: &Scratch, name: &str, server: &Server) -> Result<String> {
        let (spool, lock) = (scratch.directory(&format!("{name}-spool"))?, scratch.directory(&format!("{name}-lock"))?);
        let places = format!("--spool-path={} --lock-path={}", spool.display(), lock.display());
        Ok(self.line(&format!("{places} --pg1-path={} archive-get %f %p", server.data().display())))
    }

    /// Archives all of these files in order.
    pub fn archive(&self, data: &Path, files: &[String]) -> Calls {
        Calls {
            directory: data.to_owned(),
            command: self.archive_command(),
            files: files.to_vec(),
            part: Part::Archiver,
            replay_ms: 0,
        }
    }
}

/// The first line a program says of its version.
pub fn version_line(program: &str, argument: &str) -> Result<String> {
    let mut command = account::command(program);
    command.arg(argument);
    let said = program::run(command, PATIENCE)?.ok().with_context(|| format!("{program} {argument}"))?;
    Ok(said.lines().next().unwrap_or_default().trim().to_owned())
}
