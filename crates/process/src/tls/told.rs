//! What a failed handshake means to whoever can mend it: which file, what was expected, what to do.

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError};

use super::ClientTls;

impl ClientTls {
    /// Explains why a connection to `address` failed, if TLS is why; `error` is looked through with all its causes.
    pub fn explain(&self, address: &str, error: &(dyn Error + 'static)) -> Option<String> {
        match rustls_error(error)? {
            rustls::Error::InvalidCertificate(wrong) => Some(self.of_their_certificate(address, wrong)),
            rustls::Error::AlertReceived(alert) => self.of_our_certificate(address, *alert),
            rustls::Error::InvalidMessage(_) => {
                Some(format!("what answers at {address} does not speak TLS; has the coordinator a [tls] table?"))
            }
            _ => None,
        }
    }

    fn of_their_certificate(&self, address: &str, wrong: &CertificateError) -> String {
        let ca = self.ca.display();
        match wrong {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => format!(
                "the certificate of {address} is not signed by an authority in {ca}; expected one that is, so put the \
                 authority that signed it into that file"
            ),
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => format!(
                "the certificate of {address} does not carry that host; write a host that it carries into address, or make \
                 it anew with the host as a subjectAltName"
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("the certificate of {address} has expired; renew it there, and look at this host's clock")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                format!("the certificate of {address} is not valid yet; look at the clocks of both hosts")
            }
            _ => format!(
                "the certificate of {address} cannot be used; expected an X.509 version 3 certificate for a server, signed \
                 by an authority in {ca}"
            ),
        }
    }

    fn of_our_certificate(&self, address: &str, alert: AlertDescription) -> Option<String> {
        let own = self.certificate.display();
        Some(match alert {
            AlertDescription::UnknownCA | AlertDescription::DecryptError => format!(
                "{address} does not trust {own}; expected one that an authority in the coordinator's client_ca has signed"
            ),
            AlertDescription::CertificateExpired => {
                format!("{address} says that {own} has expired; renew it, and look at the clocks of both hosts")
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied
            | AlertDescription::CertificateRequired => format!(
                "{address} refuses {own}; expected an X.509 version 3 certificate for a client, signed by an authority in \
                 the coordinator's client_ca"
            ),
            _ => return None,
        })
    }
}

/// The error of rustls among the causes; an I/O error hides what it wraps from `source`.
fn rustls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = wrapped.map(|wrapped| wrapped as &(dyn Error + 'static)).or_else(|| error.source());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_handshake_names_file_and_remedy() {
        let tls = ClientTls { certificate: "/t/db1.crt".into(), key: "/t/db1.key".into(), ca: "/t/ca.crt".into() };
        let check = |error: rustls::Error, parts: [&str; 2]| {
            let wrapped = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, error));
            let text = tls.explain("https://repo1:8432", &wrapped).unwrap();
            assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} in {text}");
        };
        check(CertificateError::UnknownIssuer.into(), ["/t/ca.crt", "https://repo1:8432"]);
        check(CertificateError::NotValidForName.into(), ["subjectAltName", "https://repo1:8432"]);
        check(CertificateError::Expired.into(), ["expired", "renew"]);
        check(rustls::Error::AlertReceived(AlertDescription::UnknownCA), ["/t/db1.crt", "client_ca"]);
        check(rustls::Error::AlertReceived(AlertDescription::CertificateExpired), ["/t/db1.crt", "renew"]);
        assert_eq!(tls.explain("https://repo1:8432", &io::Error::other("no route to host")), None);
    }
}
