//! Who calls: the names in the verified client certificate, or anybody on loopback.

use process::tls::names_in_certificate;
use repository::name::NodeName;
use tonic::Request;

use crate::refusal::Refusal;

/// The caller of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// No TLS: the listener takes loopback connections only, and whoever is on this host is trusted.
    Loopback,
    /// The names in the certificate that the TLS handshake verified.
    Certified(Vec<String>),
}

impl Peer {
    /// Reads the caller off a request.
    ///
    /// # Errors
    /// When the certificate carries no name.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Refusal> {
        let Some(certificates) = request.peer_certs() else { return Ok(Self::Loopback) };
        let Some(own) = certificates.first() else { return Ok(Self::Certified(Vec::new())) };
        names_in_certificate(own).map(Self::Certified).map_err(|error| Refusal::Stream(error.to_string()))
    }

    /// Checks that the caller may speak for a node.
    ///
    /// # Errors
    /// [`Refusal::NodeMismatch`].
    pub fn expect(&self, node: &NodeName) -> Result<(), Refusal> {
        match self {
            Self::Loopback => Ok(()),
            Self::Certified(names) if names.iter().any(|name| name == node.as_str()) => Ok(()),
            Self::Certified(names) => Err(Refusal::NodeMismatch { node: node.clone(), named: names.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_speaks_for_its_own_names() {
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let peer = Peer::Certified(vec!["a".to_owned()]);
        peer.expect(&a).unwrap();
        assert_eq!(peer.expect(&b).unwrap_err().reason(), "NODE_MISMATCH");
        Peer::Loopback.expect(&b).unwrap();
        Peer::Certified(Vec::new()).expect(&a).unwrap_err();
    }
}
