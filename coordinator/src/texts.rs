//! The look into history files and backup history files that agents push: small, rare, and not to be replaced once stored.
//!
//! Agents look as well; this is for those of older versions, and for whoever speaks to the coordinator without one. A backup
//! history file that a power cut left blank is taken, because PostgreSQL hands it over all the same and archives nothing
//! behind it. What comes from a store is not looked into here: a file is worth copying as it is.

use futures_util::TryStreamExt;
use postgres_format::archived_text::{self, MAX_BYTES};
use repository::wal::{EncodedWal, WalDecoder};

use crate::refusal::Refusal;
use crate::stores::chain;

/// Longest object of such a file, in bytes: its text that does not compress, and a header.
const OBJECT_BYTES_MAX: u64 = 2 * MAX_BYTES as u64;

/// Refuses a text that is not what its name says. Objects of WAL pass unread.
///
/// # Errors
/// [`Refusal::TextInvalid`]; [`Refusal::BodyDamaged`] when it cannot be decoded.
pub async fn check(wal: &EncodedWal) -> Result<(), Refusal> {
    let name = wal.header.name;
    if name.holds_wal() {
        return Ok(());
    }
    let invalid = |problem: String| Refusal::TextInvalid { name, problem };
    if wal.header.size > MAX_BYTES as u64 || wal.body.len() > OBJECT_BYTES_MAX {
        return Err(invalid(format!("it is longer than {MAX_BYTES} bytes")));
    }
    match archived_text::check(name, &text(wal).await?) {
        Err(error) if !error.is_left_blank() => Err(invalid(error.to_string())),
        _ => Ok(()),
    }
}

async fn text(wal: &EncodedWal) -> Result<Vec<u8>, Refusal> {
    let damaged = |error| Refusal::BodyDamaged(chain(&error));
    let mut text = Vec::new();
    let mut decoder = WalDecoder::new(None).map_err(damaged)?;
    let mut chunks = wal.body.chunks();
    while let Some(chunk) = chunks.try_next().await.map_err(Refusal::StateDirectory)? {
        decoder.push(&chunk, &mut text).map_err(damaged)?;
    }
    decoder.finish().map_err(damaged)?;
    Ok(text)
}
