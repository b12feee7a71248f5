//! Histories of files: a full backup and increments on it, each restored alone from what its manifest says.

use std::collections::BTreeSet;

use super::*;
use crate::backup::origin::BackupType;

const BLOCK: u32 = 64;
const NAMES: usize = 4;

/// What happens to one file between two backups.
#[derive(Debug, Clone)]
enum Step {
    Nothing,
    /// These pages are changed, as far as there are any.
    Change(Vec<u32>),
    /// Pages are changed, and the file grows by some pages and a bit.
    Grow(Vec<u32>, u32, usize),
    /// Cut to some pages.
    Cut(u32),
    /// Cut to some pages, and grown again.
    CutAndGrow(u32, u32),
    /// Read as a whole again.
    Anew(u32),
    Gone,
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop::collection::vec(0u32..40, 0..6);
    prop_oneof![
        Just(Step::Nothing),
        pages().prop_map(Step::Change),
        (pages(), 0u32..10, 0usize..64).prop_map(|(pages, grown, odd)| Step::Grow(pages, grown, odd)),
        (0u32..40).prop_map(Step::Cut),
        (0u32..40, 0u32..40).prop_map(|(to, grown)| Step::CutAndGrow(to, grown)),
        (0u32..40).prop_map(Step::Anew),
        Just(Step::Gone),
    ]
}

/// A backup with what its files held when it was made.
struct Made {
    head: Head,
    files: Vec<File>,
    packs: Vec<Pack>,
    entry: RootBackup,
    manifest: Vec<u8>,
    contents: BTreeMap<String, Vec<u8>>,
}

struct History {
    store: Arc<MemoryStore>,
    /// Clocks that go backwards must not matter.
    backwards: bool,
    contents: BTreeMap<String, Vec<u8>>,
    made: Vec<Made>,
    /// So that no two pages are alike.
    seed: u64,
}

impl History {
    fn new(backwards: bool) -> Self {
        let store = Arc::new(MemoryStore::new("repo1".parse().unwrap()));
        Self { store, backwards, contents: BTreeMap::new(), made: Vec::new(), seed: 0 }
    }

    fn id(&self, number: usize) -> BackupId {
        let second = if self.backwards { 30 - number } else { 10 + number };
        format!("20261123T0102{second:02}Z-00000001").parse().unwrap()
    }

    fn fresh(&mut self, bytes: usize) -> Vec<u8> {
        self.seed += 1;
        content(self.seed, bytes)
    }

    /// Changes a file and gives the pages to store; none: all of it is to be stored as one.
    fn change(&mut self, name: &str, step: &Step) -> Option<(BTreeSet<u32>, u64)> {
        let mut bytes = self.contents.get(name).cloned().unwrap_or_default();
        let block = BLOCK as usize;
        let (pages, cut, grown): (&[u32], usize, usize) = match step {
            Step::Nothing => (&[], bytes.len(), 0),
            Step::Change(pages) => (pages, bytes.len(), 0),
            Step::Grow(pages, grown, odd) => (pages, bytes.len(), *grown as usize * block + odd),
            Step::Cut(to) => (&[], *to as usize * block, 0),
            Step::CutAndGrow(to, grown) => (&[], *to as usize * block, *grown as usize * block),
            Step::Anew(to) => {
                let fresh = self.fresh(*to as usize * block);
                self.contents.insert(name.to_owned(), fresh);
                return None;
            }
            Step::Gone => {
                self.contents.remove(name);
                return Some((BTreeSet::new(), 0));
            }
        };
        bytes.truncate(cut);
        let whole = (bytes.len() / block) as u32;
        let changed: BTreeSet<u32> = pages.iter().copied().filter(|page| *page < whole).collect();
        for page in &changed {
            let fresh = self.fresh(block);
            bytes[*page as usize * block..][..block].copy_from_slice(&fresh);
        }
        // What lies behind the last whole page of before is stored as it is.
        let solid_from = if grown > 0 { u64::from(whole) * u64::from(BLOCK) } else { u64::MAX };
        let fresh = self.fresh(grown);
        bytes.extend(fresh);
        self.contents.insert(name.to_owned(), bytes);
        Some((changed, solid_from))
    }

    async fn back_up(&mut self, steps: &[Step]) {
        let id = self.id(self.made.len());
        let mut builder = PackBuilder::new(3, 700).unwrap();
        let (mut packs, mut files) = (Vec::new(), Vec::new());
        for (number, step) in steps.iter().enumerate() {
            let name = format!("base/5/{}", 16_384 + number);
            let known = self.contents.contains_key(&name);
            let stored = self.change(&name, step);
            let Some(bytes) = self.contents.get(&name).cloned() else { continue };
            // A number of its own in every backup.
            let number = FileNumber((files.len() * 3 + self.made.len()) as u32);
            let mut finish = |builder: &mut PackBuilder, last: bool| {
                if builder.is_full() || (last && !builder.has_no_frames()) {
                    packs.push(builder.finish(packs.len() as u32));
                }
            };
            let parent = self.made.last().and_then(|made| made.files.iter().find(|file| file.path == path(&name)));
            let solid_from = match (&stored, parent) {
                (Some((pages, from)), Some(_)) if known => {
                    let pages: Vec<u32> = pages.iter().copied().collect();
                    for blocks in pages.chunks(FRAME_LIMIT_PAGES) {
                        let block = BLOCK as usize;
                        let raw: Vec<u8> =
                            blocks.iter().flat_map(|page| bytes[*page as usize * block..][..block].to_vec()).collect();
                        builder.add_pages(number, blocks, &raw).unwrap();
                        finish(&mut builder, false);
                    }
                    usize::try_from(*from).unwrap().min(bytes.len())
                }
                _ => 0,
            };
            for (piece, chunk) in bytes[solid_from..].chunks(300).enumerate() {
                builder.add(number, (solid_from + piece * 300) as u64, chunk).unwrap();
                finish(&mut builder, false);
            }
            finish(&mut builder, true);
            let mut file = super::file(number.0, &name, &bytes, Vec::new());
            file.layers = parent.filter(|_| stored.is_some() && known).map_or_else(Vec::new, |parent| {
                let inherit = |layer: &Layer| Layer {
                    backup: layer.backup.or(self.made.last().map(|made| made.entry.backup)),
                    file: Some(parent.number_in(layer)).filter(|carried| *carried != number),
                    extents: layer.extents.clone(),
                };
                parent.layers.iter().map(inherit).collect()
            });
            files.push(file);
        }
        self.publish(id, packs, files).await;
    }

    async fn publish(&mut self, id: BackupId, packs: Vec<FinishedPack>, mut files: Vec<File>) {
        for pack in &packs {
            put(self.store.as_ref(), &key::pack(&cluster(), &id, pack.number), &pack.body, &pack.sha256).await.unwrap();
        }
        for file in &mut files {
            let own = packs.iter().flat_map(|pack| &pack.extents).filter(|(number, _)| *number == file.number);
            let mut extents: Vec<Extent> = own.map(|(_, extent)| *extent).collect();
            extents.sort_by_key(|extent| extent.from);
            if !extents.is_empty() {
                file.layers.insert(0, Layer { backup: None, file: None, extents });
            }
            file.drop_hidden();
            if file.layers.len() > 1 {
                file.crc32c = None;
            }
        }
        let used: BTreeSet<(BackupId, u32)> = files
            .iter()
            .flat_map(|file| &file.layers)
            .filter_map(|layer| Some((layer.backup?, layer)))
            .flat_map(|(backup, layer)| layer.extents.iter().map(move |extent| (backup, extent.pack)))
            .collect();
        let mut head = head();
        head.backup = id;
        head.block_size = BLOCK;
        let older = self.made.iter().map(|made| made.entry.backup);
        head.references = older.filter(|backup| used.iter().any(|(used, _)| used == backup)).collect();
        head.parent = self.made.last().map(|made| made.entry.backup);
        head.backup_type = if self.made.is_empty() { BackupType::Full } else { BackupType::Incr };
        if files.iter().any(File::is_layered) {
            head.critical = vec![LAYERS.to_owned()];
        }
        let mut lines: Vec<Pack> = packs
            .iter()
            .map(|pack| Pack { backup: None, number: pack.number, size: pack.size, sha256: pack.sha256 })
            .collect();
        for (backup, number) in used {
            let made = self.made.iter().find(|made| made.entry.backup == backup).unwrap();
            let pack = made.packs.iter().find(|pack| pack.backup.is_none() && pack.number == number).unwrap();
            lines.push(Pack { backup: Some(backup), ..pack.clone() });
        }
        let (manifest, summary) = write(&head, &lines, &files).unwrap();
        let entry = entry(&head, &summary);
        let body = Body::Memory(Bytes::from(manifest.clone()));
        put(self.store.as_ref(), &key::manifest(&cluster(), &id), &body, &entry.manifest_sha256).await.unwrap();
        let contents = self.contents.clone();
        self.made.push(Made { head, files, packs: lines, entry, manifest, contents });
    }
}

fn write(head: &Head, packs: &[Pack], files: &[File]) -> std::io::Result<(Vec<u8>, ManifestSummary)> {
    let mut writer = ManifestWriter::new(Vec::new(), head.clone())?;
    packs.iter().try_for_each(|pack| writer.add(&Line::Pack(pack.clone())))?;
    files.iter().try_for_each(|file| writer.add(&Line::File(file.clone())))?;
    writer.finish()
}

/// Applies a file's layers, oldest first, and cuts it to its size.
async fn apply(store: &dyn ObjectStore, backup: BackupId, file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    for layer in file.layers.iter().rev() {
        for extent in &layer.extents {
            let key = key::pack(&cluster(), &layer.backup.unwrap_or(backup), extent.pack);
            let mut held = 0;
            let mut sink = |frame: Frame<'_>| {
                assert_eq!((frame.file, frame.sparse), (file.number_in(layer), extent.pages.is_some()));
                let from = frame.offset as usize;
                bytes.resize(bytes.len().max(from + frame.bytes.len()), 0);
                bytes[from..][..frame.bytes.len()].copy_from_slice(frame.bytes);
                held += frame.bytes.len() as u64;
                Ok(())
            };
            read_frames(store, &key, extent.offset, extent.length, &mut sink).await.unwrap();
            assert_eq!(held, extent.held_bytes(BLOCK));
        }
    }
    bytes.truncate(file.size as usize);
    bytes
}

async fn check(history: &History, made: &Made) {
    let scratch = std::env::temp_dir();
    for depth in [VerifyDepth::Presence, VerifyDepth::Content] {
        let report = verify(history.store.as_ref(), &cluster(), &made.entry, depth, &scratch).await.unwrap();
        assert_eq!(report.packs, made.packs.len() as u64);
    }
    let reader = fetch_manifest(history.store.as_ref(), &cluster(), &made.entry, &scratch).await.unwrap();
    let mut found = BTreeMap::new();
    for line in reader {
        if let Line::File(file) = line.unwrap() {
            let bytes = apply(history.store.as_ref(), made.entry.backup, &file).await;
            if let Some(expected) = file.crc32c {
                assert_eq!(crc32c::crc32c(&bytes), expected);
            }
            found.insert(file.path.to_string(), bytes);
        }
    }
    assert!(found == made.contents, "{:?}", made.head.references);
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_increment_is_restored_alone(
        first in prop::collection::vec(0u32..40, NAMES),
        steps in prop::collection::vec(prop::collection::vec(step(), NAMES), 0..7),
        backwards in any::<bool>(),
    ) {
        run(async {
            let mut history = History::new(backwards);
            history.back_up(&first.into_iter().map(Step::Anew).collect::<Vec<_>>()).await;
            for steps in steps {
                history.back_up(&steps).await;
            }
            for made in &history.made {
                check(&history, made).await;
            }
        });
    }
}

/// A full backup, one with changed pages and one more on it.
async fn three() -> History {
    let mut history = History::new(false);
    history.back_up(&[Step::Anew(20), Step::Anew(5), Step::Anew(8)]).await;
    history.back_up(&[Step::Change(vec![1, 2, 17]), Step::Nothing, Step::Grow(vec![3], 4, 7)]).await;
    history.back_up(&[Step::Change(vec![2, 9]), Step::Change(vec![0]), Step::Nothing]).await;
    history
}

#[test]
fn what_is_inherited_is_counted_apart() {
    run(async {
        let history = three().await;
        let last = &history.made[2];
        let summary = write(&last.head, &last.packs, &last.files).unwrap().1;
        let own: Vec<&Pack> = last.packs.iter().filter(|pack| pack.backup.is_none()).collect();
        assert_eq!(summary.counts.packs, own.len() as u64);
        assert_eq!(summary.counts.pack_bytes, own.iter().map(|pack| pack.size).sum::<u64>());
        assert_eq!(summary.counts.inherited_packs, (last.packs.len() - own.len()) as u64);
        assert!(summary.counts.inherited_pack_bytes > summary.counts.pack_bytes);
        assert_eq!(last.entry.stored_bytes, summary.counts.pack_bytes + summary.size);
        assert_eq!((last.entry.backup_type, last.entry.parent), (BackupType::Incr, Some(history.id(1))));
        assert_eq!(last.head.references, [history.id(0), history.id(1)]);
        assert_eq!(last.files[0].layers.len(), 3);
        assert_eq!(last.files[0].crc32c, None);
    });
}

#[test]
fn a_backup_without_a_pack_of_an_older_one_is_not_whole() {
    run(async {
        let history = three().await;
        let last = &history.made[2];
        let scratch = std::env::temp_dir();
        let pack = last.packs.iter().find(|pack| pack.backup == Some(history.id(0))).unwrap();
        let victim = key::pack(&cluster(), &history.id(0), pack.number);
        let copy = async |bytes: Option<Vec<u8>>| {
            let store = MemoryStore::new("s3".parse().unwrap());
            for entry in history.store.list("c/", None, 1000).await.unwrap().objects {
                let whole = crate::store::read(history.store.as_ref(), &entry.key, u64::MAX).await.unwrap().unwrap();
                let bytes = if entry.key == victim { bytes.clone().map(Bytes::from) } else { Some(whole) };
                if let Some(bytes) = bytes {
                    let _ = store.put_new(&entry.key, bytes.into()).await.unwrap();
                }
            }
            let presence = verify(&store, &cluster(), &last.entry, VerifyDepth::Presence, &scratch).await;
            (presence, verify(&store, &cluster(), &last.entry, VerifyDepth::Content, &scratch).await)
        };
        let whole = crate::store::read(history.store.as_ref(), &victim, u64::MAX).await.unwrap().unwrap().to_vec();
        assert!(copy(Some(whole.clone())).await.1.is_ok());
        assert!(matches!(copy(None).await, (Err(BackupError::Store(_)), Err(BackupError::Store(_)))));
        let short = copy(Some(whole[..whole.len() - 1].to_vec())).await.0;
        assert!(matches!(short, Err(BackupError::Pack { damage: PackDamage::Size { .. }, .. })), "{short:?}");
        let mut flipped = whole.clone();
        flipped[60] ^= 1;
        let (presence, content) = copy(Some(flipped)).await;
        assert!(presence.is_ok() && matches!(content, Err(BackupError::Pack { .. })), "{content:?}");
    });
}

/// What the reader says about layered manifests that somebody damaged; the writer refuses to write them.
#[test]
fn layered_manifest_museum() {
    let history = run(three());
    let last = &history.made[2];
    let text = String::from_utf8(zstd::stream::decode_all(&last.manifest[8..]).unwrap()).unwrap();
    let (zero, one) = (history.id(0).to_string(), history.id(1).to_string());
    let mut diagnoses = String::new();
    let mut exhibit = |name: &str, from: &str, to: &str| {
        assert!(text.contains(from), "{name}: {from} is not in {text}");
        let diagnosis = match read_all(&manifest_of(&text.replacen(from, to, 1))) {
            Ok(_) => "WHOLE".to_owned(),
            Err(error) => error.to_string(),
        };
        diagnoses.push_str(&format!("{name}: {diagnosis}\n"));
    };
    let both = format!("\"references\":[\"{zero}\",\"{one}\"]");
    exhibit("untouched", "\"line\":\"head\"", "\"line\":\"head\"");
    exhibit("layers are not critical", "\"critical\":[\"layers\"],", "");
    exhibit("another critical name", "\"critical\":[\"layers\"]", "\"critical\":[\"layers\",\"moons\"]");
    exhibit("references the other way round", &both, &format!("\"references\":[\"{one}\",\"{zero}\"]"));
    exhibit("a reference missing", &both, &format!("\"references\":[\"{zero}\"]"));
    exhibit("a reference twice", &both, &format!("\"references\":[\"{zero}\",\"{one}\",\"{one}\"]"));
    exhibit(
        "an inherited pack missing from the list",
        &format!("\"backup\":\"{zero}\",\"number\":0"),
        &format!("\"backup\":\"{zero}\",\"number\":99"),
    );
    exhibit(
        "an inherited pack of another size",
        &format!("\"backup\":\"{zero}\",\"number\":0,\"size\":"),
        &format!("\"backup\":\"{zero}\",\"number\":0,\"size\":1,\"was\":"),
    );
    exhibit(
        "an inherited pack among the own",
        "\"line\":\"pack\",\"number\":0",
        &format!("\"line\":\"pack\",\"backup\":\"{one}\",\"number\":0"),
    );
    exhibit("layers in another order", &format!("{{\"backup\":\"{one}\""), &format!("{{\"backup\":\"{zero}\""));
    exhibit("a sparse extent that is said to be contiguous", ",\"pages\":2", "");
    exhibit("more pages than room", "\"pages\":2", "\"pages\":2000");
    exhibit("no pages", "\"pages\":2", "\"pages\":0");
    insta::assert_snapshot!(diagnoses);
}

#[test]
fn a_writer_refuses_what_a_reader_would() {
    let history = run(three());
    let last = &history.made[2];
    let refused = |head: &Head, packs: &[Pack], files: &[File]| {
        let error = write(head, packs, files).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
    };
    refused(&Head { critical: Vec::new(), ..last.head.clone() }, &last.packs, &last.files);
    refused(&Head { references: Vec::new(), ..last.head.clone() }, &last.packs, &last.files);
    refused(&last.head, &last.packs[1..], &last.files);
    let mut reversed = last.files.clone();
    reversed.reverse();
    refused(&last.head, &last.packs, &reversed);
    let mut torn = last.files.clone();
    torn[0].layers.pop();
    refused(&last.head, &last.packs, &torn);
}
