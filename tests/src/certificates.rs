//! Certificates for one scenario: an authority of its own, and papers signed by it for servers and callers.
//!
//! Validity is always given: an authority's and papers' from last year to next year, or wholly in the past.

use std::path::PathBuf;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};

use crate::account::Scratch;

/// Files that one end of a TLS connection needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Papers {
    /// Certificate, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Who may have signed the other end's, PEM.
    pub authority: PathBuf,
}

impl Papers {
    /// Lines of a caller's `[coordinator]` table.
    pub fn caller_toml(&self) -> String {
        self.toml("ca")
    }

    /// A server's `[tls]` table.
    pub fn server_toml(&self) -> String {
        format!("[tls]\n{}\n", self.toml("client_ca"))
    }

    fn toml(&self, authority: &str) -> String {
        format!(
            "certificate = \"{}\"\nkey = \"{}\"\n{authority} = \"{}\"\n",
            self.certificate.display(),
            self.key.display(),
            self.authority.display()
        )
    }

    /// The same certificate, trusting another authority.
    pub fn trusting(&self, authority: &Authority) -> Self {
        Self { authority: authority.file.clone(), ..self.clone() }
    }
}

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// From last year to next year.
    Now,
    /// Until last year.
    Past,
}

/// An authority.
#[derive(Debug)]
pub struct Authority {
    name: String,
    file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority; `name` shows in its file and in its certificate.
    pub fn new(scratch: &Scratch, name: &str) -> Result<Self> {
        let mut wanted = parameters(name, Validity::Now, &[])?;
        wanted.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        wanted.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let file = scratch.write(&format!("{name}.pem"), wanted.self_signed(&key)?.pem())?;
        Ok(Self { name: name.to_owned(), file, issuer: Issuer::new(wanted, key) })
    }

    /// Its certificate's file.
    pub fn file(&self) -> &PathBuf {
        &self.file
    }

    /// Papers of a server on loopback: `127.0.0.1` and `localhost`.
    pub fn server(&self, scratch: &Scratch, name: &str) -> Result<Papers> {
        self.sign(scratch, name, Validity::Now, &["127.0.0.1", "localhost"], ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// Papers of a caller with this name.
    pub fn caller(&self, scratch: &Scratch, name: &str) -> Result<Papers> {
        self.sign(scratch, name, Validity::Now, &[name], ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// As [`Authority::caller`], valid at another time.
    pub fn caller_valid(&self, scratch: &Scratch, name: &str, validity: Validity) -> Result<Papers> {
        self.sign(scratch, name, validity, &[name], ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(
        &self,
        scratch: &Scratch,
        name: &str,
        validity: Validity,
        names: &[&str],
        purpose: ExtendedKeyUsagePurpose,
    ) -> Result<Papers> {
        let mut wanted = parameters(name, validity, names)?;
        wanted.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        wanted.extended_key_usages = vec![purpose];
        let key = KeyPair::generate()?;
        let certificate = wanted.signed_by(&key, &self.issuer)?;
        let file = |end: &str| format!("{}-{name}-{validity:?}.{end}", self.name);
        Ok(Papers {
            certificate: scratch.write(&file("pem"), certificate.pem())?,
            key: scratch.write(&file("key"), key.serialize_pem())?,
            authority: self.file.clone(),
        })
    }
}

fn parameters(name: &str, validity: Validity, names: &[&str]) -> Result<CertificateParams> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut wanted = CertificateParams::new(names)?;
    wanted.distinguished_name.push(DnType::CommonName, name);
    let this_year = i32::from(process::clock::now().to_zoned(jiff::tz::TimeZone::UTC).year());
    let (first, last) = match validity {
        Validity::Now => (this_year - 1, this_year + 1),
        Validity::Past => (this_year - 3, this_year - 2),
    };
    (wanted.not_before, wanted.not_after) = (date_time_ymd(first, 1, 1), date_time_ymd(last, 12, 31));
    Ok(wanted)
}
