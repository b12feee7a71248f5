//! Where PostgreSQL is: installed in Debian's or PGDG's layout, or fetched for tests by `tests/servers.sh`, which puts
//! each major into a root of its own with one of the same layouts. Any major from 14 on.
//!
//! What is played without a choice runs on what is installed, newest first; fetched servers are for scenarios that name
//! a major, and for runs that choose one with `PGCONVOY_TEST_POSTGRES`. A fetched server may come without client
//! programs: those of the next newer major that has them, or of the newest one, take their place.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::account::environment;

/// Oldest major version that we support.
const OLDEST_MAJOR: u32 = 14;
/// Chooses one major version for a whole run.
pub const CHOICE: &str = "PGCONVOY_TEST_POSTGRES";
/// Where `tests/servers.sh` put what it fetched.
const SERVERS: &str = "PGCONVOY_TEST_SERVERS";

/// One PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// Major version.
    pub major: u32,
    /// Directory of its own programs.
    pub bin: PathBuf,
    /// Directory of the client programs that suit it.
    pub clients: PathBuf,
}

impl Installation {
    /// Path of a program: its own, or the client program that suits it.
    pub fn program(&self, name: &str) -> PathBuf {
        let own = self.bin.join(name);
        if own.exists() { own } else { self.clients.join(name) }
    }
}

/// Every server from major 14 on in the usual places below `root`, newest first.
pub fn all(root: &Path) -> Vec<Installation> {
    let debian = versions(&root.join("usr/lib/postgresql"), "");
    let pgdg = versions(&root.join("usr"), "pgsql-");
    let mut found: Vec<Installation> = debian.into_iter().chain(pgdg).collect();
    found.retain(|one| one.major >= OLDEST_MAJOR && one.bin.join("postgres").exists());
    found.sort_by_key(|one| std::cmp::Reverse(one.major));
    found
}

fn versions(parent: &Path, prefix: &str) -> Vec<Installation> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let major = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            let bin = entry.path().join("bin");
            Some(Installation { major, clients: bin.clone(), bin })
        })
        .collect()
}

/// What is installed, then what was fetched, each newest first, with client programs.
fn found(root: &Path, fetched: Option<&Path>) -> Vec<Installation> {
    let mut found = all(root);
    let roots = fetched.and_then(|directory| fs::read_dir(directory).ok()).into_iter().flatten().flatten();
    // A tree is whole once it says where it came from.
    let roots = roots.map(|entry| entry.path()).filter(|root| root.join("source").exists());
    let mut more: Vec<Installation> = roots.flat_map(|root| all(&root)).collect();
    more.sort_by_key(|one| std::cmp::Reverse(one.major));
    found.append(&mut more);
    let able: Vec<(u32, PathBuf)> = found
        .iter()
        .filter(|one| one.bin.join("pg_basebackup").exists())
        .map(|one| (one.major, one.bin.clone()))
        .collect();
    for one in &mut found {
        // pg_basebackup copies from older servers, never from newer ones.
        let newer = able.iter().filter(|(major, _)| *major >= one.major).min_by_key(|(major, _)| *major);
        if let Some((_, bin)) = newer.or_else(|| able.iter().max_by_key(|(major, _)| *major)) {
            one.clients.clone_from(bin);
        }
    }
    found
}

/// As in `tests/servers.sh`.
fn fetched_directory() -> Option<PathBuf> {
    if let Some(named) = environment(SERVERS) {
        return Some(named.into());
    }
    if rustix::process::geteuid().is_root() {
        return Some("/var/cache/pgconvoy-test-servers".into());
    }
    let home = || environment("HOME").map(|home| Path::new(&home).join(".cache"));
    environment("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|cache| cache.join("pgconvoy-test-servers"))
}

fn known() -> &'static [Installation] {
    static KNOWN: OnceLock<Vec<Installation>> = OnceLock::new();
    KNOWN.get_or_init(|| found(Path::new("/"), fetched_directory().as_deref()))
}

/// The server of one major version, if there is one.
pub fn of_major(major: u32) -> Option<&'static Installation> {
    known().iter().find(|one| one.major == major)
}

/// The server that everything runs on that names none: the newest installed one, or the major that
/// `PGCONVOY_TEST_POSTGRES` names.
pub fn newest() -> Result<&'static Installation> {
    if let Some(choice) = environment(CHOICE) {
        let major = choice.parse().with_context(|| format!("{CHOICE}={choice}: expected a major version"))?;
        return of_major(major).with_context(|| {
            format!("{CHOICE}={major}: no such server in /usr/lib/postgresql, /usr/pgsql-N or {}", shown_directory())
        });
    }
    match known().first() {
        Some(found) => Ok(found),
        None => bail!("no PostgreSQL server from {OLDEST_MAJOR} on in /usr/lib/postgresql/N/bin or /usr/pgsql-N/bin"),
    }
}

fn shown_directory() -> String {
    fetched_directory().map_or_else(|| format!("${SERVERS}"), |directory| directory.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(bin: &Path, programs: &[&str]) {
        fs::create_dir_all(bin).unwrap();
        for program in programs {
            fs::write(bin.join(program), "").unwrap();
        }
    }

    #[test]
    fn both_layouts_are_found_newest_first_and_old_ones_left_out() {
        let root = tempfile::tempdir().unwrap();
        for path in ["usr/lib/postgresql/15/bin", "usr/pgsql-17/bin", "usr/lib/postgresql/13/bin", "usr/pgsql-x/bin"] {
            put(&root.path().join(path), &["postgres"]);
        }
        fs::create_dir_all(root.path().join("usr/lib/postgresql/18/bin")).unwrap();
        let majors: Vec<u32> = all(root.path()).iter().map(|one| one.major).collect();
        assert_eq!(majors, [17, 15]);
    }

    #[test]
    fn what_is_installed_comes_first_and_a_bare_server_gets_the_next_newer_clients() {
        let root = tempfile::tempdir().unwrap();
        let fetched = root.path().join("fetched");
        put(&root.path().join("usr/lib/postgresql/15/bin"), &["postgres", "pg_basebackup"]);
        for (major, programs) in [(14, &["postgres"][..]), (16, &["postgres"]), (18, &["postgres", "pg_basebackup"])] {
            put(&fetched.join(format!("{major}/usr/pgsql-{major}/bin")), programs);
            fs::write(fetched.join(format!("{major}/source")), "").unwrap();
        }
        // One that is still being unpacked.
        put(&fetched.join("17/usr/pgsql-17/bin"), &["postgres", "pg_basebackup"]);
        let found = found(root.path(), Some(&fetched));
        let seen: Vec<(u32, bool, bool)> = found
            .iter()
            .map(|one| {
                let clients = one.program("pg_basebackup");
                (one.major, clients.ends_with("15/bin/pg_basebackup"), clients.ends_with("pgsql-18/bin/pg_basebackup"))
            })
            .collect();
        assert_eq!(seen, [(15, true, false), (18, false, true), (16, false, true), (14, true, false)]);
        assert!(found[2].program("postgres").starts_with(&fetched));
    }
}
