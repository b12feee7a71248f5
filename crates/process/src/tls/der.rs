//! Just enough DER to read the names in an X.509 certificate (RFC 5280, 4.1): subject common name and DNS names.
//!
//! It checks no signature and no validity; the TLS handshake has done that. Every step is bounded by its input, and
//! anything unexpected ends in `None`.

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const OCTET_STRING: u8 = 0x04;
const BOOLEAN: u8 = 0x01;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;
const DNS_NAME: u8 = 0x82;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;

/// 2.5.4.3, `id-at-commonName`.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// 2.5.29.17, `id-ce-subjectAltName`.
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];

/// The values of one constructed value, one after the other.
struct Values<'a>(&'a [u8]);

impl<'a> Values<'a> {
    /// The next value with its tag; `None` at the end and for anything malformed.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = if first < 0x80 {
            (usize::from(first), rest)
        } else {
            let count = usize::from(first & 0x7f);
            if count == 0 || count > 4 {
                return None;
            }
            let (digits, rest) = rest.split_at_checked(count)?;
            (digits.iter().fold(0_usize, |length, digit| (length << 8) | usize::from(*digit)), rest)
        };
        let (value, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, value))
    }

    fn expect(&mut self, wanted: u8) -> Option<&'a [u8]> {
        self.next().and_then(|(tag, value)| (tag == wanted).then_some(value))
    }
}

/// DNS names of a certificate, or its common name when it has none; `None` when the bytes are no certificate.
pub(super) fn names(der: &[u8]) -> Option<Vec<String>> {
    let certificate = Values(der).expect(SEQUENCE)?;
    let mut fields = Values(Values(certificate).expect(SEQUENCE)?);
    let (first, _) = fields.next()?;
    if first == VERSION {
        fields.next()?; // serial number
    }
    fields.expect(SEQUENCE)?; // signature algorithm
    fields.expect(SEQUENCE)?; // issuer
    fields.expect(SEQUENCE)?; // validity
    let subject = fields.expect(SEQUENCE)?;
    fields.expect(SEQUENCE)?; // public key
    let mut dns = Vec::new();
    while let Some((tag, value)) = fields.next() {
        if tag == EXTENSIONS {
            dns = dns_names(value)?;
        }
    }
    if dns.is_empty() { Some(common_name(subject)?.into_iter().collect()) } else { Some(dns) }
}

fn dns_names(extensions: &[u8]) -> Option<Vec<String>> {
    let mut list = Values(Values(extensions).expect(SEQUENCE)?);
    while let Some((SEQUENCE, extension)) = list.next() {
        let mut parts = Values(extension);
        if parts.expect(OBJECT_IDENTIFIER)? != SUBJECT_ALT_NAME {
            continue;
        }
        let value = match parts.next()? {
            (BOOLEAN, _) => parts.expect(OCTET_STRING)?,
            (OCTET_STRING, value) => value,
            _ => return None,
        };
        let mut general_names = Values(Values(value).expect(SEQUENCE)?);
        let mut names = Vec::new();
        while let Some((tag, name)) = general_names.next() {
            if tag == DNS_NAME {
                names.push(std::str::from_utf8(name).ok()?.to_owned());
            }
        }
        return Some(names);
    }
    Some(Vec::new())
}

fn common_name(subject: &[u8]) -> Option<Option<String>> {
    let mut relative_names = Values(subject);
    while let Some((SET, set)) = relative_names.next() {
        let mut parts = Values(Values(set).expect(SEQUENCE)?);
        if parts.expect(OBJECT_IDENTIFIER)? != COMMON_NAME {
            continue;
        }
        let (tag, value) = parts.next()?;
        if !matches!(tag, UTF8_STRING | PRINTABLE_STRING | IA5_STRING) {
            return None;
        }
        return Some(Some(std::str::from_utf8(value).ok()?.to_owned()));
    }
    Some(None)
}
