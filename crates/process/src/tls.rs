//! TLS from PEM files, for both ends of gRPC, and the node name in a client certificate.
//!
//! One crypto provider (ring) serves the process; [`install_provider`] must run before the first connection and is
//! harmless to repeat. Both ends show a certificate and trust exactly the given authority; there is no "insecure"
//! switch. Files are read once, at start.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

mod der;
mod papers;
mod told;

use papers::Pem;

/// Largest PEM file read, in bytes.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// Files of the calling side. All three are needed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientTls {
    /// Certificate chain shown to the server, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM; must not be readable for everyone.
    pub key: PathBuf,
    /// Authorities that may have signed the server's certificate, PEM.
    pub ca: PathBuf,
}

/// Files of the serving side.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerTls {
    /// Certificate chain shown to callers, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM; must not be readable for everyone.
    pub key: PathBuf,
    /// Authorities that may have signed a caller's certificate, PEM. Callers without one are refused.
    pub client_ca: PathBuf,
}

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("cannot read {what} {}", path.display())]
    Unreadable {
        /// What the file should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} holds no {what} in PEM form", path.display())]
    NotPem {
        /// What the file should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Everyone may read the private key.
    #[error("private key {} is readable for everyone; run chmod o= on it", path.display())]
    OpenKey {
        /// The file.
        path: PathBuf,
    },
    /// The key is of another certificate.
    #[error(
        "private key {} does not belong to certificate {}; name the key that the certificate was requested with, or make \
         the certificate anew",
        key.display(), certificate.display()
    )]
    OtherKey {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The key cannot be used.
    #[error(
        "private key {} cannot be used; expected an RSA key of 2048 bits or more, an ECDSA key of P-256 or P-384, or an \
         Ed25519 key, without a passphrase",
        path.display()
    )]
    UnusableKey {
        /// The file.
        path: PathBuf,
    },
    /// The certificate cannot be used.
    #[error(
        "certificate {} cannot be used; expected X.509 version 3, which openssl makes only when it is given extensions",
        path.display()
    )]
    UnusableCertificate {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
    /// A certificate has no name that could be a node's.
    #[error("the client certificate names neither a DNS name nor a common name")]
    Nameless,
    /// A certificate could not be read.
    #[error("the client certificate is not a readable X.509 certificate")]
    Malformed,
}

/// Makes ring the process's crypto provider. Repeating it changes nothing.
pub fn install_provider() {
    // An error means that a provider is installed already, which is all that is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

impl ClientTls {
    /// Reads the files. `server_name` overrides the name expected in the server's certificate.
    ///
    /// # Errors
    /// When a file cannot be read, is not PEM, or the key is open to everyone or not the certificate's.
    pub fn load(&self, server_name: Option<&str>) -> Result<ClientTlsConfig, TlsError> {
        install_provider();
        let config = ClientTlsConfig::new()
            .ca_certificate(certificates("certificate authority", &self.ca)?)
            .identity(identity(&self.certificate, &self.key)?);
        Ok(match server_name {
            Some(name) => config.domain_name(name),
            None => config,
        })
    }
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// When a file cannot be read, is not PEM, or the key is open to everyone or not the certificate's.
    pub fn load(&self) -> Result<ServerTlsConfig, TlsError> {
        install_provider();
        Ok(ServerTlsConfig::new()
            .identity(identity(&self.certificate, &self.key)?)
            .client_ca_root(certificates("certificate authority", &self.client_ca)?)
            .client_auth_optional(false))
    }
}

impl ClientTls {
    /// The names that the certificate carries, by which the other end knows us; see [`names_in_certificate`].
    ///
    /// # Errors
    /// When the file cannot be read or its certificate has no name.
    pub fn names(&self) -> Result<Vec<String>, TlsError> {
        let text = pem("certificate", "CERTIFICATE-----", &self.certificate)?;
        let chain = papers::certificates(Pem { path: &self.certificate, text: &text })?;
        names_in_certificate(chain.first().ok_or(TlsError::Malformed)?)
    }
}

/// Names a client certificate carries: its DNS names, or its common name when it has none (RFC 6125, 6.4.4).
///
/// `der` is the first of `Request::peer_certs()`, already verified by the TLS handshake.
///
/// # Errors
/// [`TlsError::Malformed`] and [`TlsError::Nameless`].
pub fn names_in_certificate(der: &[u8]) -> Result<Vec<String>, TlsError> {
    let names = der::names(der).ok_or(TlsError::Malformed)?;
    if names.is_empty() { Err(TlsError::Nameless) } else { Ok(names) }
}

fn identity(certificate: &Path, key: &Path) -> Result<Identity, TlsError> {
    let chain = pem("certificate", "CERTIFICATE-----", certificate)?;
    let secret = pem("private key", "PRIVATE KEY-----", key)?;
    papers::check_pair(Pem { path: certificate, text: &chain }, Pem { path: key, text: &secret })?;
    Ok(Identity::from_pem(chain, secret))
}

fn certificates(what: &'static str, path: &Path) -> Result<Certificate, TlsError> {
    let text = pem(what, "CERTIFICATE-----", path)?;
    papers::check_authorities(Pem { path, text: &text })?;
    Ok(Certificate::from_pem(text))
}

fn pem(what: &'static str, marker: &str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |source| TlsError::Unreadable { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.mode();
    if marker.starts_with("PRIVATE") && mode & 0o004 != 0 {
        return Err(TlsError::OpenKey { path: path.to_owned() });
    }
    let mut text = Vec::new();
    file.take(PEM_BYTES_MAX).read_to_end(&mut text).map_err(unreadable)?;
    let found = text.windows(marker.len()).any(|window| window == marker.as_bytes());
    if found { Ok(text) } else { Err(TlsError::NotPem { what, path: path.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn self_signed(common_name: &str, dns: &[&str]) -> (rcgen::Certificate, rcgen::KeyPair) {
        let names: Vec<String> = dns.iter().map(|name| (*name).to_owned()).collect();
        let mut parameters = rcgen::CertificateParams::new(names).unwrap();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        if !common_name.is_empty() {
            parameters.distinguished_name.push(rcgen::DnType::CommonName, common_name);
        }
        let key = rcgen::KeyPair::generate().unwrap();
        (parameters.self_signed(&key).unwrap(), key)
    }

    #[test]
    fn names_come_from_dns_names_first() {
        let check = |common_name: &str, dns: &[&str], expected: &[&str]| {
            let (certificate, _) = self_signed(common_name, dns);
            assert_eq!(names_in_certificate(certificate.der()).unwrap(), expected);
        };
        check("db1", &[], &["db1"]);
        check("ignored", &["db1", "db1.example.org"], &["db1", "db1.example.org"]);
        let (nameless, _) = self_signed("", &[]);
        assert!(matches!(names_in_certificate(nameless.der()), Err(TlsError::Nameless)));
    }

    #[test]
    fn damaged_certificates_never_panic() {
        let (certificate, _) = self_signed("db1", &["db1"]);
        let der = certificate.der().to_vec();
        for end in 0..der.len() {
            let _ = names_in_certificate(&der[..end]);
        }
        for position in 0..der.len() {
            for bit in [0x01, 0x80, 0xff] {
                let mut mutated = der.clone();
                mutated[position] ^= bit;
                let _ = names_in_certificate(&mutated);
            }
        }
    }

    #[test]
    fn files_are_checked_before_use() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = self_signed("db1", &["localhost"]);
        let files = ["c.pem", "k.pem", "a.pem"].map(|name| directory.path().join(name));
        std::fs::write(&files[0], certificate.pem()).unwrap();
        std::fs::write(&files[1], key.serialize_pem()).unwrap();
        std::fs::write(&files[2], certificate.pem()).unwrap();
        let set_mode = |mode| std::fs::set_permissions(&files[1], std::fs::Permissions::from_mode(mode)).unwrap();
        let client = ClientTls { certificate: files[0].clone(), key: files[1].clone(), ca: files[2].clone() };
        set_mode(0o644);
        assert!(matches!(client.load(None), Err(TlsError::OpenKey { .. })));
        set_mode(0o640);
        client.load(Some("localhost")).unwrap();
        let server = ServerTls { certificate: files[0].clone(), key: files[1].clone(), client_ca: files[2].clone() };
        server.load().unwrap();
        let swapped = ClientTls { certificate: files[1].clone(), ..client };
        assert!(matches!(swapped.load(None), Err(TlsError::NotPem { .. })));
    }

    #[test]
    fn a_key_of_another_certificate_is_refused_by_both_names() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, _) = self_signed("db1", &["db1"]);
        let (_, other_key) = self_signed("db2", &["db2"]);
        let file = |name: &str, text: String| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            path
        };
        let own = file("c.pem", certificate.pem());
        let server =
            ServerTls { certificate: own.clone(), key: file("k.pem", other_key.serialize_pem()), client_ca: own };
        let error = server.load().unwrap_err();
        assert!(matches!(error, TlsError::OtherKey { .. }), "{error:?}");
        assert!(error.to_string().contains("k.pem") && error.to_string().contains("c.pem"), "{error}");
        let empty = file("e.pem", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n".to_owned());
        let unusable = ServerTls { key: empty, ..server.clone() }.load();
        assert!(matches!(unusable, Err(TlsError::UnusableKey { .. })), "{unusable:?}");
        let client = ClientTls { certificate: server.certificate, key: server.key, ca: server.client_ca };
        assert_eq!(client.names().unwrap(), ["db1"]);
    }
}
