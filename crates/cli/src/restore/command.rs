//! PURE but for this program's own path: the `restore_command` of a restored server, which fetches without an agent.

use std::path::{Path, PathBuf};

use process::exit::Exit;
use repository::name::ClusterName;

use crate::{config::Config, error::CliError, stores::Opened};

/// The command that reads the same stores as this restore, leaving out the same ones, and no other repository's.
pub(super) fn restore_command(config: &Config, cluster: &ClusterName, opened: &Opened) -> Result<String, CliError> {
    let program = program()?;
    let file = match &config.file {
        Some(path) => Some(std::path::absolute(path).map_err(|source| {
            CliError::new(Exit::Usage, format!("{} is not a usable path", path.display())).caused_by(source)
        })?),
        None => None,
    };
    let source = if config.stores.is_empty() {
        Source::Coordinator { file, address: config.coordinator.address.clone() }
    } else {
        Source::Stores(file.unwrap_or_default())
    };
    Ok(spell(&program, &source, cluster, opened))
}

/// This program, which the command runs.
pub(super) fn program() -> Result<PathBuf, CliError> {
    std::env::current_exe()
        .map_err(|source| CliError::new(Exit::Negative, "cannot tell where this program lies").caused_by(source))
}

enum Source {
    Stores(PathBuf),
    Coordinator { file: Option<PathBuf>, address: String },
}

fn spell(program: &Path, source: &Source, cluster: &ClusterName, opened: &Opened) -> String {
    let mut words = vec![quoted(program), "fetch".to_owned()];
    match source {
        Source::Stores(file) => words.extend(["--repository".to_owned(), quoted(file)]),
        Source::Coordinator { file, address } => {
            if let Some(file) = file {
                words.extend(["--config".to_owned(), quoted(file)]);
            }
            words.extend(["--coordinator".to_owned(), quoted(Path::new(address))]);
        }
    }
    words.extend(["--cluster".to_owned(), cluster.to_string()]);
    for store in &opened.left_out {
        words.extend(["--without-store".to_owned(), store.to_string()]);
    }
    if let Some(repository) = opened.repository {
        words.extend(["--expect-repository".to_owned(), repository.to_string()]);
    }
    words.extend(["%f".to_owned(), "\"%p\"".to_owned()]);
    words.join(" ")
}

/// A word for `sh`, in which PostgreSQL replaces no percent sign (`BuildRestoreCommand`).
fn quoted(path: &Path) -> String {
    let text = path.display().to_string().replace('%', "%%");
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:%@".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn commands_survive_sh_and_postgresql() {
        let cluster: ClusterName = "main".parse().unwrap();
        let stores = Source::Stores(PathBuf::from("/etc/pg convoy/it's.toml"));
        let (left_out, repository) = (vec!["repo1".parse().unwrap()], Some(Uuid::from_u128(7)));
        let opened = Opened { left_out, repository, ..Opened::default() };
        assert_eq!(
            spell(Path::new("/usr/bin/pgconvoy"), &stores, &cluster, &opened),
            r#"/usr/bin/pgconvoy fetch --repository '/etc/pg convoy/it'\''s.toml' --cluster main --without-store repo1 --expect-repository 00000000-0000-0000-0000-000000000007 %f "%p""#
        );
        let coordinator = Source::Coordinator { file: None, address: "http://127.0.0.1:8432".to_owned() };
        assert_eq!(
            spell(Path::new("/opt/100%/pgconvoy"), &coordinator, &cluster, &Opened::default()),
            r#"/opt/100%%/pgconvoy fetch --coordinator http://127.0.0.1:8432 --cluster main %f "%p""#
        );
    }
}
