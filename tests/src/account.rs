//! The account that servers and programs run as, scratch directories it owns, and programs staged where it can run
//! them.
//!
//! PostgreSQL refuses to run as root, so as root everything runs as `postgres`, or `nobody` where that does not exist;
//! otherwise as whoever runs the tests.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// Variables handed on to started programs; everything else is dropped, so that no `PG*` of the tester's leaks in.
const ENVIRONMENT_KEPT: [&str; 3] = ["PATH", "TMPDIR", "RUST_BACKTRACE"];

/// An unprivileged account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// The account to drop to; `None` when the tests do not run as root.
pub fn account() -> Option<&'static Account> {
    static ACCOUNT: OnceLock<Option<Account>> = OnceLock::new();
    ACCOUNT
        .get_or_init(|| {
            if !rustix::process::geteuid().is_root() {
                return None;
            }
            let passwd = fs::read_to_string("/etc/passwd").ok()?;
            ["postgres", "nobody"].iter().find_map(|name| find_in_passwd(&passwd, name))
        })
        .as_ref()
}

fn find_in_passwd(passwd: &str, name: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields.as_slice() {
            [login, _, uid, gid, ..] if *login == name => {
                Some(Account { name: name.to_owned(), uid: uid.parse().ok()?, gid: gid.parse().ok()? })
            }
            _ => None,
        }
    })
}

/// Login name of the account that everything runs as.
pub fn user_name() -> String {
    if let Some(account) = account() {
        return account.name.clone();
    }
    let uid = rustix::process::getuid().as_raw();
    fs::read_to_string("/etc/passwd")
        .ok()
        .and_then(|passwd| {
            passwd.lines().find_map(|line| {
                let fields: Vec<&str> = line.split(':').collect();
                (fields.get(2) == Some(&uid.to_string().as_str())).then(|| fields[0].to_owned())
            })
        })
        .unwrap_or_else(|| "postgres".to_owned())
}

/// A command that runs as the account, in its own process group, with a clean environment.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    for name in ENVIRONMENT_KEPT {
        if let Some(value) = environment(name) {
            command.env(name, value);
        }
    }
    command.env("LC_ALL", "C").env("HOME", "/nonexistent").current_dir("/").process_group(0);
    if let Some(account) = account() {
        command.uid(account.uid).gid(account.gid);
    }
    command
}

/// Reads one variable of the tester's environment.
pub fn environment(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "the one place where the harness reads its environment")]
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A directory owned by the account, removed on drop unless `KEEP=1`.
#[derive(Debug)]
pub struct Scratch {
    directory: Option<TempDir>,
    path: PathBuf,
}

impl Scratch {
    /// A new empty directory; `name` shows in its path, which stays short enough for sockets.
    pub fn new(name: &str) -> Result<Self> {
        let short: String = name.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        let directory = tempfile::Builder::new().prefix(&format!("pgconvoy-{short}-")).tempdir()?;
        let path = directory.path().canonicalize()?;
        give(&path)?;
        Ok(Self { directory: Some(directory), path })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a directory in it that belongs to the account, mode 0700.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        give(&path)?;
        Ok(path)
    }

    /// Writes a file that belongs to the account, mode 0600.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.path.join(name);
        write_owned(&path, content)?;
        Ok(path)
    }

    /// Keeps the directory after drop.
    pub fn keep(&mut self) {
        if let Some(directory) = self.directory.take() {
            let _ = directory.keep();
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if environment("KEEP").is_some() {
            self.keep();
        }
    }
}

/// Writes a file that belongs to the account, mode 0600.
pub fn write_owned(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    give(path)
}

/// Makes the account the owner of one path.
pub fn give(path: &Path) -> Result<()> {
    if let Some(account) = account() {
        chown(path, Some(account.uid), Some(account.gid))
            .with_context(|| format!("cannot give {} to {}", path.display(), account.name))?;
    }
    Ok(())
}

/// Programs of ours that scenarios start, under the names they are installed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The agent.
    Agent,
    /// The coordinator.
    Coordinator,
    /// The operator's command.
    Pgconvoy,
    /// The tiny command.
    Wal,
}

impl Program {
    const ALL: [Self; 4] = [Self::Agent, Self::Coordinator, Self::Pgconvoy, Self::Wal];

    /// Name it is installed by.
    pub fn installed_name(self) -> &'static str {
        match self {
            Self::Agent => "pgconvoy-agent",
            Self::Coordinator => "pgconvoy-coordinator",
            Self::Pgconvoy => "pgconvoy",
            Self::Wal => "pgconvoy-wal",
        }
    }

    /// Name of the build of it that knows crash points.
    fn built_name(self) -> &'static str {
        match self {
            Self::Agent => "tests-agent",
            Self::Coordinator => "tests-coordinator",
            Self::Pgconvoy => "tests-pgconvoy",
            Self::Wal => "tests-wal",
        }
    }

    /// Where it lies for the account to run.
    pub fn path(self) -> Result<PathBuf> {
        Ok(staged()?.join(self.installed_name()))
    }

    fn find_built(self) -> Result<PathBuf> {
        let running = std::env::current_exe()?;
        let name = match BUILD.get() {
            Some(Build::Installed) => self.installed_name(),
            Some(Build::WithCrashPoints) | None => self.built_name(),
        };
        let found =
            running.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.is_file());
        found.with_context(|| format!("{name} is not built beside {}", running.display()))
    }
}

/// Which build of our programs is staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// The one of this crate, which knows crash points.
    WithCrashPoints,
    /// The one that is installed.
    Installed,
}

static BUILD: OnceLock<Build> = OnceLock::new();

/// Chooses the build before anything is staged; without it, the one with crash points.
pub fn choose_build(build: Build) {
    let _ = BUILD.set(build);
}

/// Directory holding our programs under their installed names, made once a process.
pub fn staged() -> Result<&'static Path> {
    static STAGED: OnceLock<Result<Scratch, String>> = OnceLock::new();
    match STAGED.get_or_init(|| stage().map_err(|error| format!("{error:#}"))) {
        Ok(scratch) => Ok(scratch.path()),
        Err(error) => bail!("programs cannot be staged: {error}"),
    }
}

fn stage() -> Result<Scratch> {
    // A static is never dropped, so stages of test runs that are gone are swept by the next one.
    sweep_stale_stages();
    let scratch = Scratch::new(&format!("bin{}", std::process::id()))?;
    for program in Program::ALL {
        let built = program.find_built()?;
        let staged = scratch.path().join(program.installed_name());
        // A hard link costs nothing; across file systems, or where the kernel protects links, copy.
        if fs::hard_link(&built, &staged).is_err() {
            fs::copy(&built, &staged).with_context(|| format!("cannot stage {}", built.display()))?;
        }
        fs::set_permissions(&staged, fs::Permissions::from_mode(0o755))?;
    }
    Ok(scratch)
}

fn sweep_stale_stages() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("pgconvoy-bin").and_then(|rest| rest.split('-').next()).map(str::to_owned);
        if let Some(pid) = pid.filter(|pid| pid.parse::<u32>().is_ok())
            && !Path::new("/proc").join(&pid).exists()
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwd_lines_are_read_by_name() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\npostgres:x:101:104:PostgreSQL:/var/lib/postgresql:/bin/bash\n";
        let found = find_in_passwd(passwd, "postgres").unwrap();
        assert_eq!((found.uid, found.gid), (101, 104));
        assert_eq!(find_in_passwd(passwd, "nobody"), None);
    }

    #[test]
    fn scratch_is_removed_on_drop() {
        let scratch = Scratch::new("removed-on-drop").unwrap();
        let path = scratch.path().to_owned();
        scratch.write("a", "b").unwrap();
        drop(scratch);
        assert!(environment("KEEP").is_some() || !path.exists());
    }
}
