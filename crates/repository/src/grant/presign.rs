//! Slots of an S3 store, signed beforehand: AWS Signature Version 4 in the query of the URL.
//!
//! The length of the body and `if-none-match: *` are signed headers, so whoever holds a slot can create one object of one
//! length under one key, and needs neither a key of the store nor a clock. All slots of one [`SlotSigner`] are equal but
//! for their key, their length and 32 bytes of signature, so a node keeps one [`Template`] and those bytes.
//!
//! The date of a signature is the store's own, less [`BACKDATED`]; the clocks of our hosts do not matter.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::config::{S3Config, Secret};
use crate::digest::{sha256, to_hex};
use crate::key::ObjectKey;

/// How long a slot can be used, counted from the date of its signature: the longest that S3 allows.
pub const LIFE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How far before the store's time a signature is dated, for a store whose hosts disagree about the time.
pub const BACKDATED: Duration = Duration::from_secs(5 * 60);

/// The headers of a slot's request that are signed, as the query names them; a request may have no other length or condition.
const SIGNED_HEADERS: &str = "content-length;host;if-none-match";

/// How many bytes the body of a slot's object has: a larger content goes into several, a smaller one is padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SizeClass {
    /// 256 KiB.
    Tiny,
    /// 1 MiB.
    Small,
    /// 4 MiB.
    Middle,
    /// 16 MiB.
    Large,
    /// 64 MiB.
    Huge,
}

impl SizeClass {
    /// All of them, the smallest first.
    pub const ALL: [Self; 5] = [Self::Tiny, Self::Small, Self::Middle, Self::Large, Self::Huge];

    /// The length of a body, in bytes.
    pub fn bytes(self) -> u64 {
        (256 << 10) << (2 * self as u32)
    }

    /// The smallest class that a content of `bytes` fits; `None` above 64 MiB.
    pub fn holding(bytes: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|class| bytes <= class.bytes())
    }
}

/// What all slots of one signer have in common. It holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// `https` or `http`.
    scheme: String,
    /// The value of the header `host`: with a port only where it is not the one of the scheme.
    host: String,
    /// What stands before the key: the bucket where the store wants it in the path, and the prefix of the store.
    before_key: String,
    /// The query up to the signature.
    query: String,
}

impl Template {
    /// The URL under which the object of one slot is created. `key` is the key in the store.
    pub fn url(&self, key: &ObjectKey, signature: &[u8; 32]) -> String {
        let Self { scheme, host, before_key, query } = self;
        format!("{scheme}://{host}{before_key}{}?{query}&X-Amz-Signature={}", key.as_str(), to_hex(signature))
    }

    /// The headers that the request must have beside `host`, which every client sends.
    pub fn headers(class: SizeClass) -> [(&'static str, String); 2] {
        [("content-length", class.bytes().to_string()), ("if-none-match", "*".to_owned())]
    }
}

/// Signs slots with a credential of a store, all as of one moment.
pub struct SlotSigner {
    template: Template,
    key: DayKey,
    not_after: Timestamp,
}

/// It prints no key.
impl fmt::Debug for SlotSigner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("SlotSigner").field("template", &self.template).finish_non_exhaustive()
    }
}

impl SlotSigner {
    /// A signer for the store at `store_time`, which is what the store gives as the time (header `Date`).
    ///
    /// `secret` belongs to the `access_key_id` of `store`. `None` for a time at the end of what can be told, and for an
    /// endpoint that is more than a scheme, a host and a port.
    pub fn new(store: &S3Config, secret: &Secret, store_time: Timestamp) -> Option<Self> {
        let dated = store_time.checked_sub(BACKDATED).ok()?;
        let not_after = dated.checked_add(LIFE).ok()?;
        let key = DayKey::new(secret, dated, &store.region);
        let endpoint = match &store.endpoint {
            Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
            None => format!("https://s3.{}.amazonaws.com", store.region),
        };
        let (scheme, host) = endpoint.split_once("://")?;
        let usual_port = if scheme == "https" { ":443" } else { ":80" };
        let host = host.strip_suffix(usual_port).unwrap_or(host);
        if host.contains('/') {
            return None;
        }
        let (host, bucket) = match store.path_style {
            true => (host.to_owned(), format!("/{}", store.bucket)),
            false => (format!("{}.{host}", store.bucket), String::new()),
        };
        let prefix = if store.prefix.is_empty() { String::new() } else { format!("/{}", store.prefix) };
        let query = query(&store.access_key_id, &key, LIFE, SIGNED_HEADERS);
        let template = Template { scheme: scheme.to_owned(), host, before_key: format!("{bucket}{prefix}/"), query };
        Some(Self { template, key, not_after })
    }

    /// What the slots have in common.
    pub fn template(&self) -> &Template {
        &self.template
    }

    /// When the last of the slots can be used, by the store's time.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// The signature under which one object can be created: `key` with the length of `class`.
    pub fn sign(&self, key: &ObjectKey, class: SizeClass) -> [u8; 32] {
        let Template { host, before_key, query, .. } = &self.template;
        let (path, length) = (format!("{before_key}{}", key.as_str()), class.bytes());
        let headers = format!("content-length:{length}\nhost:{host}\nif-none-match:*\n");
        self.key.sign(&format!("PUT\n{path}\n{query}\n{headers}\n{SIGNED_HEADERS}\nUNSIGNED-PAYLOAD"))
    }
}

/// The query of a signed request up to the signature, its parts in the order in which they are signed.
fn query(access_key_id: &str, key: &DayKey, life: Duration, signed_headers: &str) -> String {
    let credential = encoded(&format!("{access_key_id}/{}", key.scope));
    format!(
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={credential}&X-Amz-Date={}&X-Amz-Expires={}\
         &X-Amz-SignedHeaders={}",
        key.dated,
        life.as_secs(),
        encoded(signed_headers)
    )
}

/// The key that signs for one day, region and service, and the words that go with it.
struct DayKey {
    key: [u8; 32],
    dated: String,
    scope: String,
}

impl DayKey {
    fn new(secret: &Secret, dated: Timestamp, region: &str) -> Self {
        let dated = dated.strftime("%Y%m%dT%H%M%SZ").to_string();
        let day = &dated[..8];
        let first = format!("AWS4{}", secret.expose());
        let key = [region, "s3", "aws4_request"]
            .iter()
            .fold(hmac(first.as_bytes(), day.as_bytes()), |key, word| hmac(&key, word.as_bytes()));
        Self { key, scope: format!("{day}/{region}/s3/aws4_request"), dated }
    }

    fn sign(&self, canonical_request: &str) -> [u8; 32] {
        let digest = to_hex(&sha256(canonical_request.as_bytes()));
        let text = format!("AWS4-HMAC-SHA256\n{}\n{}\n{digest}", self.dated, self.scope);
        hmac(&self.key, text.as_bytes())
    }
}

/// HMAC-SHA256 (RFC 2104).
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    const BLOCK_BYTES: usize = 64;
    let mut block = [0; BLOCK_BYTES];
    match key.len() > BLOCK_BYTES {
        true => block[..32].copy_from_slice(&sha256(key)),
        false => block[..key.len()].copy_from_slice(key),
    }
    let inner = Sha256::new().chain_update(block.map(|byte| byte ^ 0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(block.map(|byte| byte ^ 0x5c)).chain_update(inner).finalize().into()
}

/// Percent-encodes all but what RFC 3986 calls unreserved.
fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests;
