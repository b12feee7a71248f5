//! `pgconvoy.toml`: where the coordinator is, which stores can be read without it, where the local agent listens.
//!
//! The same schema serves `--repository FILE`. Everything is optional: without a file the coordinator is looked for on
//! this host.

use std::path::{Path, PathBuf};

use process::exit::Exit;
use process::{config as files, tls::ClientTls};
use repository::config::StoreConfig;
use serde::Deserialize;

use crate::{
    args::{DEFAULT_CONFIG, Global},
    error::CliError,
};

/// Where a coordinator on this host listens unless configured otherwise.
pub(crate) const DEFAULT_COORDINATOR: &str = "http://127.0.0.1:8432";

/// The file as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    coordinator: RawCoordinator,
    #[serde(default)]
    store: Vec<StoreConfig>,
    agent_socket: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCoordinator {
    address: Option<String>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
}

/// What the verbs need to know.
#[derive(Debug)]
pub(crate) struct Config {
    /// How to reach the coordinator.
    pub(crate) coordinator: Coordinator,
    /// Stores that can be read directly.
    pub(crate) stores: Vec<StoreConfig>,
    /// The file the stores were read from, for a restored server's `restore_command`; `None` without a file.
    pub(crate) file: Option<PathBuf>,
    /// The local agent's socket.
    pub(crate) agent_socket: PathBuf,
}

/// How to reach the coordinator.
#[derive(Debug, Clone)]
pub(crate) struct Coordinator {
    /// Its address.
    pub(crate) address: String,
    /// Whether somebody named it, rather than the default being tried.
    pub(crate) named: bool,
    /// What to show and trust; needed for https.
    pub(crate) tls: Option<ClientTls>,
}

/// Reads the configuration that the command line names, or the default one if it exists.
pub(crate) fn load(global: &Global) -> Result<Config, CliError> {
    let (path, raw) = match &global.config {
        Some(path) => (Some(path.clone()), files::load(path).map_err(CliError::from_config)?),
        None => match files::load::<Raw>(Path::new(DEFAULT_CONFIG)) {
            Ok(raw) => (Some(PathBuf::from(DEFAULT_CONFIG)), raw),
            Err(error) if error.is_absent() => (None, Raw::default()),
            Err(error) => return Err(CliError::from_config(error)),
        },
    };
    resolve(path, raw, global.coordinator.clone())
}

/// Reads the file that `--repository` names; it must list a store.
pub(crate) fn load_repository(path: &Path) -> Result<Config, CliError> {
    let raw: Raw = files::load(path).map_err(CliError::from_config)?;
    let config = resolve(Some(path.to_owned()), raw, None)?;
    if config.stores.is_empty() {
        let error = files::ConfigError::invalid(path, "lists no [[store]]");
        return Err(CliError::from_config(error));
    }
    Ok(config)
}

fn resolve(path: Option<PathBuf>, raw: Raw, address: Option<String>) -> Result<Config, CliError> {
    let shown = path.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG));
    let wrong = |detail: &str| CliError::from_config(files::ConfigError::invalid(&shown, detail));
    let tls = match (raw.coordinator.certificate, raw.coordinator.key, raw.coordinator.ca) {
        (None, None, None) => None,
        (Some(certificate), Some(key), Some(ca)) => Some(ClientTls { certificate, key, ca }),
        _ => return Err(wrong("[coordinator] needs certificate, key and ca together")),
    };
    let given = address.is_some();
    let named = address.or(raw.coordinator.address);
    if let Some(named) = &named {
        check_address(named, tls.is_some()).map_err(|detail| match given {
            true => CliError::new(Exit::Config, format!("--coordinator: {detail}")),
            false => wrong(&detail),
        })?;
    }
    Ok(Config {
        coordinator: Coordinator {
            named: named.is_some(),
            address: named.unwrap_or_else(|| DEFAULT_COORDINATOR.to_owned()),
            tls,
        },
        stores: raw.store,
        file: path,
        agent_socket: raw.agent_socket.unwrap_or_else(|| PathBuf::from(agent::local::DEFAULT_SOCKET)),
    })
}

/// As an agent has it: TLS, or this machine itself.
fn check_address(address: &str, has_tls: bool) -> Result<(), String> {
    let plain = address.strip_prefix("http://");
    match (address.strip_prefix("https://"), plain) {
        (Some(_), _) if has_tls => Ok(()),
        (Some(_), _) => Err("an https coordinator needs certificate, key and ca in [coordinator]".to_owned()),
        (_, Some(authority)) if agent::config::is_loopback(authority.trim_end_matches('/')) => Ok(()),
        (_, Some(_)) => Err(format!(
            "the coordinator's address \"{address}\" has no TLS, which is for loopback only; use https:// with certificate, key \
             and ca in [coordinator]"
        )),
        (None, None) => Err(format!(
            "the coordinator's address \"{address}\" must begin with https://, or with http:// on loopback, such as \
             {DEFAULT_COORDINATOR}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, CliError> {
        let path = Path::new("/etc/x.toml");
        resolve(Some(path.to_owned()), files::parse(path, text).map_err(CliError::from_config)?, None)
    }

    #[test]
    fn nothing_is_required() {
        let config = read("").unwrap();
        assert_eq!(config.coordinator.address, DEFAULT_COORDINATOR);
        assert!(!config.coordinator.named && config.stores.is_empty());
    }

    #[test]
    fn an_address_without_tls_is_of_this_machine() {
        for good in ["http://127.0.0.1:8432", "http://localhost:8432/", "http://[::1]:8432"] {
            assert!(check_address(good, false).is_ok(), "{good}");
        }
        for (bad, part) in
            [("127.0.0.1:8432", "must begin with"), ("http://10.1.1.1:8432", "loopback only"), ("", "must begin")]
        {
            assert!(check_address(bad, true).unwrap_err().contains(part), "{bad}");
        }
        assert!(check_address("https://repo1:8432", true).is_ok());
    }

    #[test]
    fn half_a_tls_setting_is_refused() {
        assert!(read("[coordinator]\naddress = \"https://repo1:8432\"\n").is_err());
        assert!(read("[coordinator]\ncertificate = \"/a\"\n").is_err());
        assert!(read("[coordinator]\nadress = \"x\"\n").unwrap_err().to_string().contains("did you mean `address`?"));
    }

    #[test]
    fn the_shipped_sample_is_accepted() {
        let sample = include_str!("../../../packaging/etc/pgconvoy.toml");
        read(sample).unwrap();
        // Every commented setting of the sample must be a real one.
        let uncommented: String =
            sample.lines().map(|line| format!("{}\n", line.strip_prefix("#:").unwrap_or(line))).collect();
        let config = read(&uncommented).unwrap();
        assert_eq!(config.stores.len(), 2);
        assert!(config.coordinator.named);
    }
}
