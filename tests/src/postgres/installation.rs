//! Where PostgreSQL is installed: Debian's and PGDG's layouts, any major from 14 on, newest first.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Result, bail};

use crate::account::environment;

/// Oldest major version that we support.
const OLDEST_MAJOR: u32 = 14;
/// Chooses one major version among the installed ones.
const CHOICE: &str = "PGCONVOY_TEST_POSTGRES";

/// One installed PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// Major version.
    pub major: u32,
    /// Directory of its programs.
    pub bin: PathBuf,
}

impl Installation {
    /// Path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

/// Every installed server from major 14 on, newest first.
pub fn all(root: &Path) -> Vec<Installation> {
    let debian = versions(&root.join("usr/lib/postgresql"), "");
    let pgdg = versions(&root.join("usr"), "pgsql-");
    let mut found: Vec<Installation> = debian.into_iter().chain(pgdg).collect();
    found.retain(|one| one.major >= OLDEST_MAJOR && one.program("postgres").exists());
    found.sort_by_key(|one| std::cmp::Reverse(one.major));
    found
}

fn versions(parent: &Path, prefix: &str) -> Vec<Installation> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let major = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some(Installation { major, bin: entry.path().join("bin") })
        })
        .collect()
}

/// The newest installed server, or the major named by `PGCONVOY_TEST_POSTGRES`.
pub fn newest() -> Result<&'static Installation> {
    static NEWEST: OnceLock<Option<Installation>> = OnceLock::new();
    let choice = environment(CHOICE).and_then(|text| text.parse::<u32>().ok());
    let found = NEWEST
        .get_or_init(|| all(Path::new("/")).into_iter().find(|one| choice.is_none_or(|wanted| one.major == wanted)));
    match found {
        Some(found) => Ok(found),
        None => bail!("no PostgreSQL server from {OLDEST_MAJOR} on in /usr/lib/postgresql/N/bin or /usr/pgsql-N/bin"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_are_found_newest_first_and_old_ones_left_out() {
        let root = tempfile::tempdir().unwrap();
        for path in ["usr/lib/postgresql/15/bin", "usr/pgsql-17/bin", "usr/lib/postgresql/13/bin", "usr/pgsql-x/bin"] {
            let bin = root.path().join(path);
            fs::create_dir_all(&bin).unwrap();
            fs::write(bin.join("postgres"), "").unwrap();
        }
        fs::create_dir_all(root.path().join("usr/lib/postgresql/18/bin")).unwrap();
        let majors: Vec<u32> = all(root.path()).iter().map(|one| one.major).collect();
        assert_eq!(majors, [17, 15]);
    }
}
