//! Where the server is and who we are to it, found the way libpq finds it: `agent.toml` first, then the connection
//! service file, then the environment, then defaults (PostgreSQL manual, "Environment Variables", "The Connection
//! Service File", "The Password File").
//!
//! Two deliberate differences from libpq: without a host we take the socket directory and port that the running server
//! wrote into its own `postmaster.pid`, and the database defaults to `postgres`. Lists of hosts are refused: an agent
//! belongs to one server. The only room of the agent that reads `PG*` variables; everything else is pure.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

/// Variables of libpq that are honoured.
const VARIABLES: [&str; 16] = [
    "PGHOST",
    "PGPORT",
    "PGUSER",
    "PGPASSWORD",
    "PGDATABASE",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGSYSCONFDIR",
    "PGPASSFILE",
    "PGSSLMODE",
    "PGSSLROOTCERT",
    "PGSSLCERT",
    "PGSSLKEY",
    "PGAPPNAME",
    "PGCONNECT_TIMEOUT",
    "PGOPTIONS",
];
/// Longest service or password file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Where Debian's and Red Hat's packages keep the socket when nothing says otherwise.
const SOCKET_DIRECTORY: &str = "/var/run/postgresql";
/// Where a packaged libpq looks for `pg_service.conf`.
const SYSCONF_DIRECTORY: &str = "/etc/postgresql-common";

/// Why no connection settings could be made.
#[derive(Debug, Error)]
pub enum LibpqError {
    /// A service was named that no service file defines.
    #[error("connection service {service:?} is defined neither in the user's nor in the system's service file")]
    ServiceUnknown {
        /// The name asked for.
        service: String,
    },
    /// A parameter has a value we cannot use.
    #[error("connection parameter {parameter} has the value {value:?}, expected {expected}")]
    Value {
        /// libpq's name of the parameter.
        parameter: &'static str,
        /// What it was set to.
        value: String,
        /// What would do.
        expected: &'static str,
    },
}

/// What `agent.toml` says under `[postgres]`; everything is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Host name, or an absolute path: the socket's directory.
    pub host: Option<String>,
    /// TCP port, also part of the socket's name.
    pub port: Option<u16>,
    /// Role.
    pub user: Option<String>,
    /// Database.
    pub dbname: Option<String>,
    /// Name in the connection service file.
    pub service: Option<String>,
    /// Password file instead of `~/.pgpass`.
    pub passfile: Option<PathBuf>,
}

/// What the process was given: variables, home directory, operating system user.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `PG*` variables that are set and not empty.
    pub variables: BTreeMap<&'static str, String>,
    /// The user's home directory.
    pub home: Option<PathBuf>,
    /// Operating system user name.
    pub user: Option<String>,
}

impl Environment {
    /// Reads the process's environment and `/etc/passwd`.
    #[expect(clippy::disallowed_methods, reason = "this is the configuration room for libpq's variables")]
    pub fn of_process() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let variables = VARIABLES.iter().filter_map(|name| Some((*name, set(name)?))).collect();
        let account = account_of(
            rustix::process::geteuid().as_raw(),
            &read_bounded(Path::new("/etc/passwd")).unwrap_or_default(),
        );
        Self {
            variables,
            home: set("HOME").map(PathBuf::from).or_else(|| account.as_ref().map(|(_, home)| home.clone())),
            user: account.map(|(user, _)| user).or_else(|| set("USER")),
        }
    }

    fn get(&self, name: &str) -> Option<String> {
        self.variables.get(name).cloned()
    }
}

/// A password; its Debug shows nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(pub(super) String);

impl fmt::Debug for Password {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("…")
    }
}

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// Directory of the Unix socket.
    Socket(PathBuf),
    /// Host name or address.
    Name(String),
}

/// How much of TLS is asked for, as `sslmode` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Never.
    Disable,
    /// If the server offers it (`allow` counts as this).
    Prefer,
    /// Always, whoever the server is; with a root certificate at hand as `verify-ca`.
    Require,
    /// Always, and the certificate must be signed by a known authority.
    VerifyCa,
    /// As before, and it must bear the host's name.
    VerifyFull,
}

/// Everything needed to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionSettings {
    /// Where.
    pub host: Host,
    /// TCP port, also part of the socket's name.
    pub port: u16,
    /// Role.
    pub user: String,
    /// Database.
    pub dbname: String,
    /// Password, when one was found.
    pub password: Option<Password>,
    /// TLS; [`SslMode::Disable`] on sockets.
    pub ssl_mode: SslMode,
    /// Authorities, when the file exists.
    pub ssl_root_certificate: Option<PathBuf>,
    /// Our own certificate.
    pub ssl_certificate: Option<PathBuf>,
    /// Key of our own certificate.
    pub ssl_key: Option<PathBuf>,
    /// Shown in `pg_stat_activity`.
    pub application_name: String,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Server options of the session.
    pub options: Option<String>,
}

/// Socket directory and port as the running server tells them in `postmaster.pid` (lines 4 and 5 of the file; see
/// `src/include/utils/pidfile.h`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerPlace {
    /// Port, when the line is there.
    pub port: Option<u16>,
    /// Directory of the first socket, when the server has one.
    pub socket_directory: Option<PathBuf>,
}

impl ServerPlace {
    /// Parses the text of `postmaster.pid`; lines that are missing stay unknown.
    pub fn parse(text: &str) -> Self {
        let mut lines = text.lines().skip(3);
        Self {
            port: lines.next().and_then(|line| line.trim().parse().ok()),
            socket_directory: lines.next().map(str::trim).filter(|line| line.starts_with('/')).map(PathBuf::from),
        }
    }

    /// Reads `postmaster.pid` of a data directory; unknown when there is none.
    pub fn of(data_directory: &Path) -> Self {
        Self::parse(&read_bounded(&data_directory.join("postmaster.pid")).unwrap_or_default())
    }
}

/// Puts settings together: `overrides`, then the service, then the environment, then what the server wrote about itself.
pub fn resolve(
    overrides: &Overrides,
    environment: &Environment,
    place: &ServerPlace,
) -> Result<ConnectionSettings, LibpqError> {
    let service = match overrides.service.clone().or_else(|| environment.get("PGSERVICE")) {
        Some(service) => read_service(&service, environment)?,
        None => BTreeMap::new(),
    };
    let found = |parameter: &str, variable: &str| service.get(parameter).cloned().or_else(|| environment.get(variable));
    let host = match overrides.host.clone().or_else(|| found("host", "PGHOST")) {
        Some(host) if host.contains(',') => return Err(value("host", host, "one host, the one this agent runs on")),
        Some(host) if host.starts_with('/') => Host::Socket(PathBuf::from(host)),
        Some(host) => Host::Name(host),
        None => Host::Socket(place.socket_directory.clone().unwrap_or_else(|| PathBuf::from(SOCKET_DIRECTORY))),
    };
    let port = match (overrides.port, found("port", "PGPORT")) {
        (Some(port), _) => port,
        (None, Some(text)) => text.parse().map_err(|_| value("port", text, "a number from 1 to 65535"))?,
        (None, None) => place.port.unwrap_or(5432),
    };
    let user = overrides.user.clone().or_else(|| found("user", "PGUSER")).or_else(|| environment.user.clone());
    let user = user.unwrap_or_else(|| "postgres".to_owned());
    let dbname =
        overrides.dbname.clone().or_else(|| found("dbname", "PGDATABASE")).unwrap_or_else(|| "postgres".to_owned());
    let password = match found("password", "PGPASSWORD") {
        Some(password) => Some(Password(password)),
        None => password_from_file(overrides, &service, environment, &host, port, &dbname, &user),
    };
    let home_file =
        |name: &str| Some(environment.home.as_ref()?.join(".postgresql").join(name)).filter(|path| path.is_file());
    let file = |parameter: &str, variable: &str, name: &str| {
        found(parameter, variable).map(PathBuf::from).or_else(|| home_file(name))
    };
    let seconds = found("connect_timeout", "PGCONNECT_TIMEOUT").unwrap_or_else(|| "10".to_owned());
    let seconds: u64 = seconds.parse().map_err(|_| value("connect_timeout", seconds, "whole seconds"))?;
    Ok(ConnectionSettings {
        ssl_mode: ssl_mode(&host, found("sslmode", "PGSSLMODE"))?,
        ssl_root_certificate: file("sslrootcert", "PGSSLROOTCERT", "root.crt"),
        ssl_certificate: file("sslcert", "PGSSLCERT", "postgresql.crt"),
        ssl_key: file("sslkey", "PGSSLKEY", "postgresql.key"),
        application_name: found("application_name", "PGAPPNAME").unwrap_or_else(|| "pgconvoy-agent".to_owned()),
        connect_timeout: Duration::from_secs(seconds.clamp(2, 60)),
        options: found("options", "PGOPTIONS"),
        host,
        port,
        user,
        dbname,
        password,
    })
}

fn value(parameter: &'static str, value: String, expected: &'static str) -> LibpqError {
    LibpqError::Value { parameter, value, expected }
}

fn ssl_mode(host: &Host, text: Option<String>) -> Result<SslMode, LibpqError> {
    let mode = match text.as_deref() {
        None | Some("prefer" | "allow") => SslMode::Prefer,
        Some("disable") => SslMode::Disable,
        Some("require") => SslMode::Require,
        Some("verify-ca") => SslMode::VerifyCa,
        Some("verify-full") => SslMode::VerifyFull,
        Some(other) => {
            return Err(value(
                "sslmode",
                other.to_owned(),
                "disable, allow, prefer, require, verify-ca or verify-full",
            ));
        }
    };
    Ok(if matches!(host, Host::Socket(_)) { SslMode::Disable } else { mode })
}

fn read_service(service: &str, environment: &Environment) -> Result<BTreeMap<String, String>, LibpqError> {
    let system = environment.get("PGSYSCONFDIR").unwrap_or_else(|| SYSCONF_DIRECTORY.to_owned());
    let files = match environment.get("PGSERVICEFILE") {
        Some(file) => vec![PathBuf::from(file)],
        None => environment.home.iter().map(|home| home.join(".pg_service.conf")).collect(),
    };
    let files = files.into_iter().chain([Path::new(&system).join("pg_service.conf")]);
    files
        .filter_map(|file| parse_service(service, &read_bounded(&file)?))
        .next()
        .ok_or_else(|| LibpqError::ServiceUnknown { service: service.to_owned() })
}

/// The parameters of one group of a service file; `None` when it has no such group.
fn parse_service(service: &str, text: &str) -> Option<BTreeMap<String, String>> {
    let mut parameters = None;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            if parameters.is_some() {
                break;
            }
            parameters = (name == service).then(BTreeMap::new);
        } else if let (Some(parameters), Some((key, value))) = (parameters.as_mut(), line.split_once('=')) {
            parameters.insert(key.trim().to_owned(), value.trim().to_owned());
        }
    }
    parameters
}

fn password_from_file(
    overrides: &Overrides,
    service: &BTreeMap<String, String>,
    environment: &Environment,
    host: &Host,
    port: u16,
    dbname: &str,
    user: &str,
) -> Option<Password> {
    let named = service.get("passfile").cloned().or_else(|| environment.get("PGPASSFILE")).map(PathBuf::from);
    let file = overrides.passfile.clone().or(named).or_else(|| Some(environment.home.as_ref()?.join(".pgpass")))?;
    let mode = std::fs::metadata(&file).ok()?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!(file = %file.display(), mode = format!("{:o}", mode & 0o777), "password file ignored: group or others may read it, set mode 0600");
        return None;
    }
    let host = match host {
        Host::Socket(_) => "localhost",
        Host::Name(name) => name,
    };
    find_password(&read_bounded(&file)?, &[host, &port.to_string(), dbname, user]).map(Password)
}

/// First matching line of `host:port:database:user:password`; `*` matches all, `\` takes the next character as it is.
fn find_password(text: &str, wanted: &[&str; 4]) -> Option<String> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = split_password_line(line);
        let matches =
            fields.len() == 5 && fields.iter().zip(wanted).all(|(field, wanted)| field == "*" || field == wanted);
        matches.then(|| fields[4].clone())
    })
}

fn split_password_line(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            ':' if fields.len() < 5 => fields.push(String::new()),
            '\\' => fields.last_mut().expect("starts with one field").extend(characters.next()),
            other => fields.last_mut().expect("starts with one field").push(other),
        }
    }
    fields
}

/// Name and home directory of a user in the text of `/etc/passwd`.
fn account_of(user_number: u32, passwd: &str) -> Option<(String, PathBuf)> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, number, _, _, home, ..] = fields[..] else { return None };
        (number.parse() == Ok(user_number)).then(|| (name.to_owned(), PathBuf::from(home)))
    })
}

fn read_bounded(path: &Path) -> Option<String> {
    let size = std::fs::metadata(path).ok()?.len();
    (size <= FILE_BYTES_MAX).then(|| std::fs::read_to_string(path).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&'static str, &str)]) -> Environment {
        let variables = pairs.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Environment { variables, home: None, user: Some("ann".to_owned()) }
    }

    fn place() -> ServerPlace {
        ServerPlace::parse("123\n/data\n1700000000\n5433\n/run/pg\n*\n  1 2\nready\n")
    }

    /// One line: overrides, environment → "host port user dbname".
    fn check(overrides: Overrides, pairs: &[(&'static str, &str)], expected: &str) {
        let got = resolve(&overrides, &environment(pairs), &place()).unwrap();
        let host = match &got.host {
            Host::Socket(path) => path.display().to_string(),
            Host::Name(name) => name.clone(),
        };
        assert_eq!(format!("{host} {} {} {}", got.port, got.user, got.dbname), expected);
    }

    #[test]
    fn precedence() {
        let none = Overrides::default;
        check(none(), &[], "/run/pg 5433 ann postgres");
        check(none(), &[("PGHOST", "/tmp"), ("PGPORT", "6000")], "/tmp 6000 ann postgres");
        check(none(), &[("PGUSER", "bob"), ("PGDATABASE", "shop")], "/run/pg 5433 bob shop");
        let told = Overrides { host: Some("db1".into()), port: Some(7), ..none() };
        check(told, &[("PGHOST", "/tmp"), ("PGPORT", "6000")], "db1 7 ann postgres");
    }

    #[test]
    fn service_beats_environment_and_unknown_service_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("services");
        std::fs::write(&file, "# c\n[a]\nhost=/a\n[b]\nhost = /b\nport=9\nuser=eve\n[c]\nport=1\n").unwrap();
        let file = file.to_str().unwrap().to_owned();
        check(
            Overrides { service: Some("b".into()), ..Overrides::default() },
            &[("PGSERVICEFILE", &file), ("PGPORT", "1")],
            "/b 9 eve postgres",
        );
        let unknown =
            resolve(&Overrides::default(), &environment(&[("PGSERVICE", "zz"), ("PGSERVICEFILE", &file)]), &place());
        assert!(matches!(unknown, Err(LibpqError::ServiceUnknown { .. })));
    }

    #[test]
    fn password_lines() {
        let find = |text: &str| find_password(text, &["localhost", "5432", "db", "u:1"]);
        assert_eq!(find("*:*:*:*:x").as_deref(), Some("x"));
        assert_eq!(find("localhost:5432:db:u\\:1:p:q\\\\r").as_deref(), Some("p:q\\r"));
        assert_eq!(find("#*:*:*:*:x\nother:*:*:*:y"), None);
        assert_eq!(find("short:line"), None);
        assert_eq!(find("localhost:*:other:*:a\nlocalhost:*:db:*:b").as_deref(), Some("b"));
    }

    #[test]
    fn readable_password_file_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pass");
        std::fs::write(&file, "*:*:*:*:secret\n").unwrap();
        let overrides = Overrides { passfile: Some(file.clone()), ..Overrides::default() };
        for (mode, found) in [(0o600, true), (0o640, false), (0o644, false)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            let got = resolve(&overrides, &environment(&[]), &place()).unwrap();
            assert_eq!(got.password.is_some(), found, "{mode:o}");
            assert!(!format!("{got:?}").contains("secret"));
        }
    }

    #[test]
    fn bad_values_and_modes() {
        for pair in [("PGPORT", "70000"), ("PGSSLMODE", "maybe"), ("PGCONNECT_TIMEOUT", "soon"), ("PGHOST", "a,b")] {
            assert!(matches!(
                resolve(&Overrides::default(), &environment(&[pair]), &place()),
                Err(LibpqError::Value { .. })
            ));
        }
        let over_tcp =
            resolve(&Overrides::default(), &environment(&[("PGHOST", "h"), ("PGSSLMODE", "verify-full")]), &place())
                .unwrap();
        assert_eq!(over_tcp.ssl_mode, SslMode::VerifyFull);
        let over_socket =
            resolve(&Overrides::default(), &environment(&[("PGSSLMODE", "verify-full")]), &place()).unwrap();
        assert_eq!(over_socket.ssl_mode, SslMode::Disable);
    }

    #[test]
    fn accounts() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\npostgres:x:101:104:,:/var/lib/postgresql:/bin/bash\nbad\n";
        assert_eq!(account_of(101, passwd), Some(("postgres".into(), "/var/lib/postgresql".into())));
        assert_eq!(account_of(7, passwd), None);
    }
}
