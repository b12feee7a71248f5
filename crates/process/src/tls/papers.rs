//! Whether the PEM files of one end fit together, before anybody is spoken to: what rustls would say of them only in a
//! handshake, or to the other end.

use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys, RootCertStore};

use super::TlsError;

/// A PEM file that was read.
#[derive(Clone, Copy)]
pub(super) struct Pem<'a> {
    pub(super) path: &'a Path,
    pub(super) text: &'a [u8],
}

/// Checks that a key is one and belongs to the first certificate of a chain. Validity and signature are for the other end.
pub(super) fn check_pair(certificate: Pem<'_>, key: Pem<'_>) -> Result<(), TlsError> {
    let chain = certificates(certificate)?;
    let secret = PrivateKeyDer::from_pem_slice(key.text).ok();
    let provider = rustls::crypto::ring::default_provider();
    let signer = secret.and_then(|secret| provider.key_provider.load_private_key(secret).ok());
    let Some(signer) = signer else { return Err(TlsError::UnusableKey { path: key.path.to_owned() }) };
    match CertifiedKey::new(chain, signer).keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(()),
        Err(Error::InconsistentKeys(_)) => {
            Err(TlsError::OtherKey { key: key.path.to_owned(), certificate: certificate.path.to_owned() })
        }
        Err(source) => Err(TlsError::UnusableCertificate { path: certificate.path.to_owned(), source }),
    }
}

/// Checks that every certificate of a file can be trusted as an authority.
pub(super) fn check_authorities(authorities: Pem<'_>) -> Result<(), TlsError> {
    let mut trusted = RootCertStore::empty();
    for certificate in certificates(authorities)? {
        trusted
            .add(certificate)
            .map_err(|source| TlsError::UnusableCertificate { path: authorities.path.to_owned(), source })?;
    }
    Ok(())
}

/// The certificates of a file, at least one.
pub(super) fn certificates(file: Pem<'_>) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let not_pem = || TlsError::NotPem { what: "certificate", path: file.path.to_owned() };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(file.text).collect();
    found.ok().filter(|certificates| !certificates.is_empty()).ok_or_else(not_pem)
}
