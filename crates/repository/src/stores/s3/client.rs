//! Builds the client of an S3 service from its configuration and nothing else.
//!
//! The SDK's default chain is never loaded, so no environment variable, profile or metadata service takes part.

use std::error::Error;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
    StalledStreamProtectionConfig, retry::RetryConfig, timeout::TimeoutConfig,
};
use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::config::{Checksums, S3Config, SecretSource};
use crate::name::StoreName;
use crate::store::StoreError;

/// How long a connection may take to be made.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a body may stand still before its request fails.
const STALL_DEADLINE: Duration = Duration::from_secs(20);
/// How long an unused connection is kept.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Unused connections kept.
const IDLE_CONNECTIONS: usize = 32;

pub(super) fn build(store: &StoreName, config: &S3Config) -> Result<Client, StoreError> {
    let secret = secret(store, &config.secret_access_key)?;
    let credentials = Credentials::new(&config.access_key_id, secret, None, None, "pgconvoy configuration");
    let (request_checksums, response_checksums) = match checksums(config) {
        Checksums::Aws => (RequestChecksumCalculation::WhenSupported, ResponseChecksumValidation::WhenSupported),
        _ => (RequestChecksumCalculation::WhenRequired, ResponseChecksumValidation::WhenRequired),
    };
    let builder = aws_sdk_s3::config::Builder::new()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new(config.region.clone()))
        .credentials_provider(credentials)
        .force_path_style(config.path_style)
        .request_checksum_calculation(request_checksums)
        .response_checksum_validation(response_checksums)
        // One attempt: a repetition inside the SDK would hide that an earlier one may have happened.
        .retry_config(RetryConfig::disabled())
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT_DEADLINE).build())
        .stalled_stream_protection(StalledStreamProtectionConfig::enabled().grace_period(STALL_DEADLINE).build())
        .http_client(http_client(store, config)?);
    let builder = match &config.endpoint {
        Some(endpoint) => builder.endpoint_url(endpoint),
        None => builder,
    };
    Ok(Client::from_conf(builder.build()))
}

fn checksums(config: &S3Config) -> Checksums {
    match (config.checksums, &config.endpoint) {
        (Checksums::Auto, None) => Checksums::Aws,
        (Checksums::Auto, Some(_)) => Checksums::Compat,
        (chosen, _) => chosen,
    }
}

fn http_client(store: &StoreName, config: &S3Config) -> Result<SharedHttpClient, StoreError> {
    let builder = Builder::new().pool_idle_timeout(IDLE_LIMIT).pool_max_idle_per_host(IDLE_CONNECTIONS);
    if config.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://")) {
        return Ok(builder.build_http());
    }
    let trust = match &config.ca_file {
        Some(file) => TrustStore::empty().with_pem_certificate(authorities(store, file)?),
        None => TrustStore::default(),
    };
    let context = TlsContext::builder().with_trust_store(trust).build();
    let context = context.map_err(|error| refused(store, "TLS cannot be set up", &error))?;
    Ok(builder.tls_provider(Provider::Rustls(CryptoMode::Ring)).tls_context(context).build_https())
}

/// The PEM file, known to hold nothing that the TLS library would stumble over.
fn authorities(store: &StoreName, file: &Path) -> Result<Vec<u8>, StoreError> {
    let what = format!("ca_file {} holds no usable certificates", file.display());
    let text = fs::read(file).map_err(|error| refused(store, &what, &error))?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|error| refused(store, &what, &error))?;
        roots.add(certificate).map_err(|error| refused(store, &what, &error))?;
    }
    if roots.is_empty() {
        return Err(StoreError::Refused { store: store.clone(), reason: what });
    }
    Ok(text)
}

/// The mode bit of a file that anybody may read.
const READABLE_FOR_EVERYONE: u32 = 0o004;

fn secret(store: &StoreName, source: &SecretSource) -> Result<String, StoreError> {
    match source {
        SecretSource::Given(secret) => Ok(secret.expose().to_owned()),
        SecretSource::File(file) => {
            let what = format!("secret_access_key_file {} cannot be read", file.display());
            let unreadable = |error: std::io::Error| refused(store, &what, &error);
            let mode = fs::metadata(file).map_err(unreadable)?.mode();
            if mode & READABLE_FOR_EVERYONE != 0 {
                let reason = format!(
                    "secret_access_key_file {} is readable for everyone; run chmod o= on it, and make a new key if others \
                     use this host",
                    file.display()
                );
                return Err(StoreError::Refused { store: store.clone(), reason });
            }
            let text = fs::read_to_string(file).map_err(unreadable)?;
            Ok(text.trim().to_owned())
        }
    }
}

/// A refusal has no source, so the reason carries what the library said.
fn refused(store: &StoreName, what: &str, error: &dyn Error) -> StoreError {
    StoreError::Refused { store: store.clone(), reason: format!("{what}: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    fn config(ca_file: Option<&Path>) -> S3Config {
        S3Config {
            endpoint: Some("https://127.0.0.1:1".to_owned()),
            region: "us-east-1".to_owned(),
            bucket: "bucket".to_owned(),
            prefix: String::new(),
            path_style: true,
            access_key_id: "id".to_owned(),
            secret_access_key: SecretSource::Given(Secret::new("secret")),
            ca_file: ca_file.map(Path::to_owned),
            checksums: Checksums::Auto,
        }
    }

    #[test]
    fn unusable_files_are_refused_before_the_tls_library_sees_them() {
        let store = "bucket".parse().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.pem");
        let check = |content: &str| {
            std::fs::write(&file, content).unwrap();
            let error = build(&store, &config(Some(&file))).unwrap_err();
            assert!(matches!(&error, StoreError::Refused { reason, .. } if reason.contains("ca.pem")), "{error}");
        };
        check("");
        check("nothing of the kind");
        check("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        check("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n");
        let missing = SecretSource::File(directory.path().join("none"));
        let config = S3Config { secret_access_key: missing, ..config(None) };
        assert!(matches!(build(&store, &config), Err(StoreError::Refused { .. })));
    }

    #[test]
    fn a_secret_that_everyone_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;

        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("s3.secret");
        std::fs::write(&file, "hush\n").unwrap();
        let read = |mode| {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            secret(&"bucket".parse().unwrap(), &SecretSource::File(file.clone())).map_err(|error| error.to_string())
        };
        assert_eq!((read(0o600), read(0o640)), (Ok("hush".to_owned()), Ok("hush".to_owned())));
        let error = read(0o644).unwrap_err();
        assert!(error.contains("s3.secret") && error.contains("chmod o="), "{error}");
    }

    #[test]
    fn checksums_follow_the_endpoint_unless_told() {
        let aws = S3Config { endpoint: None, ..config(None) };
        assert_eq!(checksums(&aws), Checksums::Aws);
        assert_eq!(checksums(&config(None)), Checksums::Compat);
        assert_eq!(checksums(&S3Config { checksums: Checksums::Aws, ..config(None) }), Checksums::Aws);
        assert_eq!(checksums(&S3Config { checksums: Checksums::Compat, ..aws }), Checksums::Compat);
    }
}
