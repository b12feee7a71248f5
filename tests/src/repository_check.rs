//! The judge: says what a store holds by reading nothing but the store.
//!
//! It spells keys and decodes objects by itself, from the format's description and not with the product's code, so that
//! a mistake in the product is not repeated here. It asks a store only to list and to read.
//!
//! What it can say: every acknowledged file is there with the bytes PostgreSQL had; no segment is missing between the
//! first and the last of a timeline; nothing is there twice; no object changed since an earlier look; every published
//! backup has its manifest, its packs and the WAL from its start to its stop.

mod object;
mod shelf;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use self::object::WalObject;
pub use self::shelf::Shelf;
use crate::fleet::Store;

/// Everything one store holds of one cluster.
#[derive(Debug)]
pub struct Holdings {
    /// Name of the store, for messages.
    pub store: String,
    /// The store itself.
    pub shelf: Shelf,
    cluster: String,
    /// SHA-256 of every object by key.
    pub objects: BTreeMap<String, [u8; 32]>,
    /// Every WAL object that could be decoded, by file name; several when a name has several contents.
    pub wal: BTreeMap<String, Vec<WalObject>>,
    /// Every history file by name.
    pub histories: BTreeMap<String, Vec<u8>>,
    /// What could not be read as it should.
    pub damaged: Vec<String>,
}

/// A backup as the newest root commit names it.
#[derive(Debug, Clone)]
pub struct PublishedBackup {
    /// Its identifier.
    pub backup: String,
    /// The root entry.
    pub entry: Value,
}

/// Reads everything a store holds of a cluster, and verifies each object by itself.
pub fn look(store: &Store, cluster: &str) -> Result<Holdings> {
    let shelf = Shelf::open(store)?;
    let mut holdings = Holdings {
        store: store.name.clone(),
        cluster: cluster.to_owned(),
        objects: BTreeMap::new(),
        wal: BTreeMap::new(),
        histories: BTreeMap::new(),
        damaged: Vec::new(),
        shelf,
    };
    for key in holdings.shelf.list("")? {
        let bytes = holdings.shelf.read(&key)?;
        holdings.objects.insert(key.clone(), Sha256::digest(&bytes).into());
        if let Err(error) = holdings.take_in(&key, &bytes) {
            holdings.damaged.push(format!("{key}: {error:#}"));
        }
    }
    Ok(holdings)
}

impl Holdings {
    fn take_in(&mut self, key: &str, bytes: &[u8]) -> Result<()> {
        let parts: Vec<&str> = key.split('/').collect();
        match parts.as_slice() {
            ["repo.json"] | ["coord", "probe", _] => Ok(()),
            ["c", cluster, rest @ ..] if *cluster == self.cluster => self.take_in_cluster(rest, bytes),
            ["c", ..] => Ok(()),
            _ => bail!("no such key in the format"),
        }
    }

    fn take_in_cluster(&mut self, rest: &[&str], bytes: &[u8]) -> Result<()> {
        match rest {
            ["root", generation] => {
                ensure!(is_hex(generation, 16), "odd generation");
                root_commit(bytes).map(|_| ()).context("root commit")
            }
            ["b", _, "manifest"] => {
                ensure!(bytes.starts_with(b"PGCVMAN1"), "not a manifest");
                Ok(())
            }
            ["b", _, "n", _] => {
                ensure!(bytes.starts_with(b"PGCVNOT1"), "not a note");
                Ok(())
            }
            ["b", _, "p", _] => {
                ensure!(bytes.starts_with(b"PGCVPAK1"), "not a pack");
                Ok(())
            }
            [_, "wal", timeline, log, object] => {
                let (file, fingerprint) = object.rsplit_once('.').context("no fingerprint")?;
                ensure!(file.starts_with(&format!("{timeline}{log}")), "lies in another file's directory");
                let wal = WalObject::decode(file, fingerprint, bytes)?;
                self.wal.entry(file.to_owned()).or_default().push(wal);
                Ok(())
            }
            [_, "history", file] => {
                let wal = WalObject::decode(file, "", bytes)?;
                self.histories.insert((*file).to_owned(), wal.plain);
                Ok(())
            }
            [_, "conflict" | "decision" | "writer", ..] => Ok(()),
            _ => bail!("no such key in the format"),
        }
    }

    /// Fails when any object could not be read as it should.
    pub fn undamaged(&self) -> Result<&Self> {
        ensure!(self.damaged.is_empty(), "{}: damaged or odd objects:\n{}", self.store, self.damaged.join("\n"));
        Ok(self)
    }

    /// Fails when a name has more than one content, except those named in `announced`.
    pub fn nothing_twice(&self, announced: &[&str]) -> Result<&Self> {
        for (name, contents) in &self.wal {
            let mut seen = BTreeSet::new();
            for object in contents {
                ensure!(seen.insert(object.plain_sha256), "{}: {name} is stored twice with one content", self.store);
            }
            let legal = name.ends_with(".partial") || announced.contains(&name.as_str());
            ensure!(legal || contents.len() == 1, "{}: {name} has {} contents", self.store, contents.len());
        }
        Ok(self)
    }

    /// Fails when a file that PostgreSQL had acknowledged (copies of them lie in `witness`) is absent or differs.
    /// Gives the number of files compared. Only for a server that archives nothing meanwhile.
    pub fn every_acknowledged(&self, witness: &Path) -> Result<usize> {
        self.acknowledged(witness, &acknowledged_in(witness)?)
    }

    /// As [`Holdings::every_acknowledged`], for names taken down before the store was looked into.
    pub fn acknowledged(&self, witness: &Path, names: &[String]) -> Result<usize> {
        for name in names {
            let wanted = fs::read(witness.join(name))?;
            let digest: [u8; 32] = Sha256::digest(&wanted).into();
            let there = if name.ends_with(".history") {
                self.histories.get(name).is_some_and(|stored| *stored == wanted)
            } else {
                self.wal.get(name).is_some_and(|contents| contents.iter().any(|one| one.plain_sha256 == digest))
            };
            ensure!(there, "{}: {name} was acknowledged but is not stored with those bytes", self.store);
        }
        ensure!(!names.is_empty(), "nothing was acknowledged");
        Ok(names.len())
    }

    /// Names of complete segments of a timeline, in order.
    pub fn segments(&self, timeline: u32) -> Vec<String> {
        let prefix = format!("{timeline:08X}");
        self.wal.keys().filter(|name| name.len() == 24 && name.starts_with(&prefix)).cloned().collect()
    }

    /// Names of segments missing between the first and the last one stored of a timeline.
    pub fn gaps(&self, timeline: u32, segment_bytes: u64) -> Result<Vec<String>> {
        let names = self.segments(timeline);
        let (Some(first), Some(last)) = (names.first(), names.last()) else { return Ok(Vec::new()) };
        let stored: BTreeSet<&String> = names.iter().collect();
        let (first, last) = (segment_number(first, segment_bytes)?, segment_number(last, segment_bytes)?);
        let wanted = (first..=last).map(|number| segment_name(timeline, number, segment_bytes));
        Ok(wanted.filter(|name| !stored.contains(name)).collect())
    }

    /// Fails when a segment is missing inside a timeline.
    pub fn no_gap(&self, timeline: u32, segment_bytes: u64) -> Result<&Self> {
        let gaps = self.gaps(timeline, segment_bytes)?;
        ensure!(gaps.is_empty(), "{}: missing on timeline {timeline}: {}", self.store, gaps.join(" "));
        Ok(self)
    }

    /// Fails when an object of an earlier look is gone or has other bytes.
    pub fn unchanged_since(&self, earlier: &Self) -> Result<&Self> {
        for (key, digest) in &earlier.objects {
            match self.objects.get(key) {
                None => bail!("{}: {key} is gone", self.store),
                Some(now) => ensure!(now == digest, "{}: {key} has other bytes than before", self.store),
            }
        }
        Ok(self)
    }

    /// Fails when another store does not hold the same WAL (names and contents).
    pub fn same_wal_as(&self, other: &Self) -> Result<&Self> {
        let list = |holdings: &Self| -> BTreeSet<String> {
            let wal = holdings.wal.iter().flat_map(|(name, contents)| {
                contents.iter().map(move |one| format!("{name} {}", hex(&one.plain_sha256)))
            });
            wal.chain(holdings.histories.keys().cloned()).collect()
        };
        let (ours, theirs) = (list(self), list(other));
        let differing: Vec<&String> = ours.symmetric_difference(&theirs).collect();
        ensure!(differing.is_empty(), "{} and {} differ in {differing:?}", self.store, other.store);
        Ok(self)
    }

    /// The newest root commit.
    pub fn root(&self) -> Result<Option<Value>> {
        let prefix = format!("c/{}/root/", self.cluster);
        let newest = self.objects.keys().filter(|key| key.starts_with(&prefix)).max();
        newest.map(|key| root_commit(&self.shelf.read(key)?).with_context(|| key.clone())).transpose()
    }

    /// Backups that the newest root commit names, each checked: the manifest has the digest of the entry, packs are
    /// there, and the WAL from start to stop is stored without a gap.
    pub fn backups(&self, segment_bytes: u64) -> Result<Vec<PublishedBackup>> {
        let Some(root) = self.root()? else { return Ok(Vec::new()) };
        let entries = root.get("backups").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut backups = Vec::new();
        for entry in entries {
            let backup = entry.get("backup").and_then(Value::as_str).context("a backup without identifier")?.to_owned();
            self.check_backup(&backup, &entry, segment_bytes).with_context(|| format!("backup {backup}"))?;
            backups.push(PublishedBackup { backup, entry });
        }
        Ok(backups)
    }

    fn check_backup(&self, backup: &str, entry: &Value, segment_bytes: u64) -> Result<()> {
        let prefix = format!("c/{}/b/{backup}/", self.cluster);
        let manifest = self.objects.get(&format!("{prefix}manifest")).context("its manifest is not there")?;
        let text = |name: &str| entry.get(name).and_then(Value::as_str).with_context(|| format!("no {name}"));
        ensure!(text("manifest_sha256")? == hex(manifest), "its manifest has another digest");
        let packs = self.objects.keys().filter(|key| key.starts_with(&format!("{prefix}p/"))).count();
        let wanted = entry.get("packs").and_then(Value::as_u64).context("no packs")?;
        ensure!(packs as u64 == wanted && packs > 0, "it has {packs} packs of {wanted}");
        let timeline = entry.get("start_timeline").and_then(Value::as_u64).context("no start_timeline")?;
        let (start, stop) = (lsn(text("start_lsn")?)?, lsn(text("stop_lsn")?)?);
        for number in start / segment_bytes..=(stop - 1) / segment_bytes {
            let name = segment_name(u32::try_from(timeline)?, number, segment_bytes);
            ensure!(self.wal.contains_key(&name), "it needs {name}");
        }
        Ok(())
    }
}

/// Reads `{"root":R,"sha256":"<digest of the bytes of R>"}` and a line end.
fn root_commit(bytes: &[u8]) -> Result<Value> {
    let text = std::str::from_utf8(bytes)?;
    let inner = text.strip_prefix("{\"root\":").context("does not begin as a root")?;
    let (root, end) = inner.rsplit_once(",\"sha256\":\"").context("has no digest")?;
    let wanted = end.strip_suffix("\"}\n").context("does not end as a root")?;
    ensure!(hex(&digest(root.as_bytes())) == wanted, "its digest is wrong");
    Ok(serde_json::from_str(root)?)
}

/// Keys of a cluster's WAL, histories and backups, without reading any; roots and probes are each store's own.
pub fn wal_and_backup_keys(store: &Store, cluster: &str) -> Result<Vec<String>> {
    let (all, roots) = (format!("c/{cluster}/"), format!("c/{cluster}/root/"));
    let keys = Shelf::open(store)?.list(&all)?;
    Ok(keys.into_iter().filter(|key| !key.starts_with(&roots)).collect())
}

/// Identifiers of the backups that a store's newest root names; nothing else is read.
pub fn published(store: &Store, cluster: &str) -> Result<Vec<String>> {
    let shelf = Shelf::open(store)?;
    let Some(newest) = shelf.list(&format!("c/{cluster}/root/"))?.pop() else { return Ok(Vec::new()) };
    let root = root_commit(&shelf.read(&newest)?)?;
    let entries = root["backups"].as_array().cloned().unwrap_or_default();
    Ok(entries.iter().filter_map(|entry| entry["backup"].as_str().map(str::to_owned)).collect())
}

/// Names of the files that PostgreSQL was told are archived, in order; not of one that is still being copied.
pub fn acknowledged_in(witness: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(witness)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    Ok(names)
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Lower-case hexadecimal digits of some bytes.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of some bytes.
pub fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Fingerprint by which keys and commands name a content.
pub fn fingerprint(bytes: &[u8]) -> String {
    format!("s{}", &hex(&digest(bytes))[..32])
}

/// An LSN's text as a number.
pub fn lsn(text: &str) -> Result<u64> {
    let (high, low) = text.split_once('/').with_context(|| format!("{text:?} is not an LSN"))?;
    Ok(u64::from_str_radix(high, 16)? << 32 | u64::from_str_radix(low, 16)?)
}

/// Number of a segment from its name.
pub fn segment_number(name: &str, segment_bytes: u64) -> Result<u64> {
    ensure!(is_hex(name, 24), "{name:?} is not a segment");
    let (log, segment) = (u64::from_str_radix(&name[8..16], 16)?, u64::from_str_radix(&name[16..24], 16)?);
    Ok(log * ((1 << 32) / segment_bytes) + segment)
}

/// Name of a segment from its number.
pub fn segment_name(timeline: u32, number: u64, segment_bytes: u64) -> String {
    let per_log = (1 << 32) / segment_bytes;
    format!("{timeline:08X}{:08X}{:08X}", number / per_log, number % per_log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_inverse() {
        for (name, bytes) in [("00000001000000000000002A", 16 << 20), ("0000000200000003000000FF", 16 << 20)] {
            let number = segment_number(name, bytes).unwrap();
            assert_eq!(segment_name(u32::from_str_radix(&name[..8], 16).unwrap(), number, bytes), name);
        }
        assert_eq!(segment_name(1, 4096, 1 << 20), "000000010000000100000000");
        assert_eq!(lsn("1/0A").unwrap(), (1 << 32) + 10);
    }
}
