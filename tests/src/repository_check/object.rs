//! Decoding of a WAL object, written from the format's description.
//!
//! ```text
//! PGCVWAL1 | u32 LE header length | header JSON | u32 LE CRC-32C of all before | zstd frames
//! ```

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::hex;

const MAGIC: &[u8] = b"PGCVWAL1";
/// Bytes of magic and header length.
const HEAD_BYTES: usize = 12;

/// One stored WAL file.
#[derive(Debug, Clone)]
pub struct WalObject {
    /// File name in pg_wal.
    pub name: String,
    /// The header as stored.
    pub header: Value,
    /// The file's bytes.
    pub plain: Vec<u8>,
    /// Their SHA-256.
    pub plain_sha256: [u8; 32],
}

impl WalObject {
    /// Decodes and verifies an object; an empty fingerprint is not compared (history files have none).
    pub fn decode(name: &str, fingerprint: &str, bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.starts_with(MAGIC) && bytes.len() > HEAD_BYTES, "not a WAL object");
        let length = usize::try_from(u32::from_le_bytes(bytes[8..HEAD_BYTES].try_into()?))?;
        let header_end = HEAD_BYTES + length;
        ensure!(bytes.len() >= header_end + 4, "shorter than its header");
        let crc = u32::from_le_bytes(bytes[header_end..header_end + 4].try_into()?);
        ensure!(crc == crc32c(&bytes[..header_end]), "the header's checksum is wrong");
        let header: Value = serde_json::from_slice(&bytes[HEAD_BYTES..header_end]).context("header")?;
        let plain = zstd::decode_all(&bytes[header_end + 4..]).context("body")?;
        let plain_sha256: [u8; 32] = Sha256::digest(&plain).into();
        ensure!(header["name"] == *name, "its header names {}", header["name"]);
        ensure!(header["size"] == plain.len(), "its header says {} bytes", header["size"]);
        if !fingerprint.is_empty() {
            let wanted = format!("s{}", &hex(&plain_sha256)[..32]);
            ensure!(fingerprint == wanted, "content has fingerprint {wanted}");
        }
        Ok(Self { name: name.to_owned(), header, plain, plain_sha256 })
    }
}

/// CRC-32C, bit by bit: headers are short.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnoli() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let plain = vec![7; 4096];
        let digest = hex(&Sha256::digest(&plain));
        let header = format!("{{\"name\":\"00000002.history\",\"size\":{}}}", plain.len());
        let mut object = MAGIC.to_vec();
        object.extend(u32::try_from(header.len()).unwrap().to_le_bytes());
        object.extend(header.as_bytes());
        object.extend(crc32c(&object).to_le_bytes());
        object.extend(zstd::encode_all(plain.as_slice(), 3).unwrap());
        let fingerprint = format!("s{}", &digest[..32]);
        assert!(WalObject::decode("00000002.history", &fingerprint, &object).is_ok());
        object[20] ^= 1;
        assert!(WalObject::decode("00000002.history", &fingerprint, &object).is_err());
    }
}
