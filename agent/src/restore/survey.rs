//! What a restore would read and how long that may take, without touching the place.
//!
//! The ranges are counted as the restore would ask for them. The time is an estimate, and the survey says of what: a short
//! read of the first ranges, with as many requests at the same time as the restore makes, from the store that is asked
//! first; and an assumed speed of writing, because a disk is not measured without writing to it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use process::clock::Monotonic;
use repository::key;
use repository::name::StoreName;
use repository::store::{ByteRange, StoreError};
use serde::Serialize;

use super::draft::Draft;
use super::groups::{Groups, PackSizes};
use super::layout::{self, PackRange};
use super::ranges;
use super::sources::{Patience, Sources};
use super::{Place, RestoreError, RestoreOptions, RestoreSource, check_existing, check_target};

/// Most bytes that are read to see how fast a store is.
const SAMPLE_BYTES: u64 = 32 << 20;
/// Longest such read.
const SAMPLE_TIME: Duration = Duration::from_secs(5);
/// Fewest bytes that say something about a store's speed.
const SAMPLE_BYTES_MIN: u64 = 64 << 10;
/// Speed of writing that is assumed, in bytes a second.
const WRITTEN_BYTES_PER_SECOND: u64 = 256 << 20;

/// What a restore would do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Survey {
    /// Files, those of databases that are left out included.
    pub files: u64,
    /// Bytes in them, without those that are left out.
    pub file_bytes: u64,
    /// The store that is asked first for every range.
    pub store: StoreName,
    /// Those that are asked if it fails or is slow, in this order.
    pub then: Vec<StoreName>,
    /// Requests for ranges of packs.
    pub requests: u64,
    /// Bytes that they ask for. Onto an existing directory this is the most: what is there as the backup has it is not read.
    pub read_bytes: u64,
    /// How fast that store was just now; none if there is too little to read, or if it failed.
    pub measured: Option<Measured>,
    /// The longer of reading at that speed and writing at [`Survey::assumed_bytes_per_second`]; the two overlap. None if the
    /// speed of the store is not known.
    pub estimated_seconds: Option<u64>,
    /// Speed of writing that the estimate takes for granted.
    pub assumed_bytes_per_second: u64,
    /// What deserves a look; one line each.
    pub notes: Vec<String>,
}

/// A short read of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Measured {
    /// Bytes that came.
    pub bytes: u64,
    /// In this time.
    pub milliseconds: u64,
    /// Requests at the same time.
    pub parallel: usize,
}

impl Measured {
    /// The speed, in bytes a second.
    pub fn bytes_per_second(&self) -> u64 {
        self.bytes.saturating_mul(1000) / self.milliseconds.max(1)
    }
}

/// Looks at everything that a restore would, reads the manifest and a few ranges, and refuses what the restore would refuse.
pub async fn survey(source: &RestoreSource, options: &RestoreOptions) -> Result<Survey, RestoreError> {
    match options.place {
        Place::Free => check_target(&options.target, options.owner.as_deref()).map(drop)?,
        Place::Existing => {
            check_existing(&options.target, source.backup.system_identifier, options.owner.as_deref()).map(drop)?;
        }
    }
    let sources = Sources::new(&source.stores, Patience::default())?;
    let Draft { manifest, outline, databases, notes, .. } = Draft::make(source, &sources, options).await?;
    let share = outline.share(databases.as_deref());
    let groups = Groups::of(&manifest, databases, PackSizes::LeftOut)?;
    let counted = super::blocking(move || count(groups)).await?;
    let order = sources.in_order();
    let names: Vec<StoreName> = order.iter().map(|index| sources.store(*index).name().clone()).collect();
    let parallel = ranges::parallel(options.parallel);
    let measured = measure(source, &sources, order[0], &counted.sample, parallel).await;
    let write_seconds = share.file_bytes / WRITTEN_BYTES_PER_SECOND;
    let most = if options.bytes_per_second == 0 { u64::MAX } else { options.bytes_per_second };
    let speed = |measured: Measured| measured.bytes_per_second().clamp(1, most);
    let seconds = |measured: Measured| (counted.bytes / speed(measured)).max(write_seconds);
    Ok(Survey {
        files: outline.files,
        file_bytes: share.file_bytes,
        store: names[0].clone(),
        then: names[1..].to_vec(),
        requests: counted.requests,
        read_bytes: counted.bytes,
        measured,
        estimated_seconds: measured.map(seconds),
        assumed_bytes_per_second: WRITTEN_BYTES_PER_SECOND,
        notes: sources.warnings().into_iter().chain(notes).collect(),
    })
}

/// All ranges of a restore, and the first of them.
#[derive(Debug, Default)]
struct Counted {
    requests: u64,
    bytes: u64,
    sample: Vec<PackRange>,
}

fn count(mut groups: Groups) -> Result<Counted, RestoreError> {
    let (mut counted, mut sampled) = (Counted::default(), 0);
    let ages = groups.ages();
    while let Some(group) = groups.next()? {
        let wanted = group.layout.wanted(&ages, 0..group.layout.files.len());
        for range in layout::passes(&ages, wanted).into_iter().flatten() {
            counted.requests += 1;
            counted.bytes = counted.bytes.saturating_add(range.length);
            if sampled < SAMPLE_BYTES {
                sampled += range.length;
                // What is wanted of it does not matter here.
                counted.sample.push(PackRange { wanted: Vec::new(), ..range });
            }
        }
    }
    Ok(counted)
}

/// Reads some ranges and throws them away. None if too little came to say anything.
async fn measure(
    source: &RestoreSource,
    sources: &Sources,
    index: usize,
    sample: &[PackRange],
    parallel: usize,
) -> Option<Measured> {
    let came = AtomicU64::new(0);
    let began = Monotonic::now();
    let read = async |range: &PackRange| -> Result<(), StoreError> {
        let key = key::pack(&source.cluster, &range.backup, range.pack);
        let wanted = ByteRange::Slice { offset: range.offset, length: range.length };
        let mut stream = sources.store(index).get(&key, wanted).await?;
        while let Some(piece) = stream.try_next().await? {
            came.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    };
    let reads = futures_util::stream::iter(sample.iter().map(read)).buffer_unordered(parallel);
    let read = tokio::time::timeout(SAMPLE_TIME, reads.try_collect::<()>()).await;
    let (bytes, took) = (came.load(Ordering::Relaxed), began.elapsed());
    // One that failed says nothing; one that was cut off says how far it came.
    let failed = matches!(read, Ok(Err(_)));
    let milliseconds = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    (!failed && bytes >= SAMPLE_BYTES_MIN).then_some(Measured { bytes, milliseconds, parallel })
}
