//! Whether the server that recovers will be able to run the `restore_command` it is given, when root restores for it.
//!
//! It would find out only while it recovers, asking again and again for a file that nobody gives it.

use std::path::{Path, PathBuf};

use agent::restore::{Access, Owner, Reader};
use process::exit::Exit;
use repository::{
    config::{SecretSource, StoreConfig, StoreKind},
    key,
};

use crate::{config::Config, error::CliError};

/// Refuses files that `restore_command` reads and the owner of the data directory may not.
///
/// # Errors
/// Names the first file, and what stands in its way.
pub(super) fn check(config: &Config, owner: Owner) -> Result<(), CliError> {
    let reader = Reader::of(owner);
    for (path, wanted) in read_by_command(config)? {
        // One that cannot be looked at has failed, or will, for everybody and with words of its own.
        let Ok(Some(obstacle)) = reader.obstacle(&path, wanted) else { continue };
        return Err(refusal(&path, &obstacle, owner));
    }
    Ok(())
}

fn refusal(path: &Path, obstacle: &Path, owner: Owner) -> CliError {
    let by = if obstacle == path { String::new() } else { format!(", because of {}", obstacle.display()) };
    let text = format!(
        "{} cannot be read by user {}, as whom PostgreSQL will run restore_command until recovery has ended{by}",
        path.display(),
        owner.user
    );
    CliError::new(Exit::Refused, text).hint(
        "let that user read it, for instance through its group; or name a configuration with --repository that it can read, \
         or a command of your own with --recovery-option restore_command=…",
    )
}

/// The program, the configuration it is given, and what that names.
fn read_by_command(config: &Config) -> Result<Vec<(PathBuf, Access)>, CliError> {
    let program = super::command::program()?;
    let files = config.file.iter().cloned().chain(match config.stores.is_empty() {
        true => {
            let tls = config.coordinator.tls.iter();
            tls.flat_map(|tls| [tls.certificate.clone(), tls.key.clone(), tls.ca.clone()]).collect::<Vec<_>>()
        }
        false => config.stores.iter().flat_map(files_of).collect(),
    });
    Ok(std::iter::once((program, Access::Run)).chain(files.map(|file| (file, Access::Read))).collect())
}

fn files_of(store: &StoreConfig) -> Vec<PathBuf> {
    match &store.kind {
        StoreKind::Directory(directory) => vec![directory.path.join(key::repository_identity().as_str())],
        StoreKind::S3(s3) => {
            let secret = match &s3.secret_access_key {
                SecretSource::File(file) => Some(file.clone()),
                SecretSource::Given(_) => None,
            };
            secret.into_iter().chain(s3.ca_file.clone()).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_and_what_bars_it_are_named() {
        let owner = Owner { user: 101, group: 104 };
        let own = refusal(Path::new("/a/b.toml"), Path::new("/a/b.toml"), owner);
        assert_eq!(own.exit(), Exit::Refused);
        assert!(own.to_string().starts_with("/a/b.toml cannot be read by user 101"), "{own}");
        let above = refusal(Path::new("/a/b.toml"), Path::new("/a"), owner);
        assert!(above.to_string().ends_with("because of /a"), "{above}");
    }

    #[test]
    fn stores_name_their_secrets() {
        let s3 = r#"{"name":"b","bucket":"x","region":"r","access_key_id":"i","secret_access_key_file":"/s","ca_file":"/c"}"#;
        let directory = r#"{"name":"r","path":"/srv/r"}"#;
        let files = |json: &str| files_of(&serde_json::from_str(json).unwrap());
        assert_eq!(files(s3), [PathBuf::from("/s"), PathBuf::from("/c")]);
        assert_eq!(files(directory), [PathBuf::from("/srv/r/repo.json")]);
    }
}
