//! Looking at one store: its roots, the manifests of its backups, their packs, its WAL objects. Gives facts; what they mean is
//! judged elsewhere.
//!
//! An object that is wrong is a fact. A store that does not serve any more ends the walk through it, and that is a fact too.

mod wal;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::content::{self, Fault};
use super::extents::{self, PackName, Span, Table, Tables};
use super::facts::{Broken, Stop, StoreFacts, about_object};
use super::finding::{Depth, Proof, What};
use super::listed::Listed;
use super::pages::Files;
use super::watch::Watch;
use super::{BROKEN_MAX, Request, VerifyError};
use crate::backup::manifest::{File, Line, ManifestReader};
use crate::backup::{fetch_manifest, fetch_table};
use crate::key::{self, ParsedKey};
use crate::name::{BackupId, ClusterName};
use crate::observe::chain;
use crate::root::{self, RootBackup, RootError};
use crate::store::{LONG_LIST_LIMIT, ObjectEntry, ObjectStore, StoreError};

/// Objects that are read at the same time, if no rate is to be kept.
const AT_ONCE: usize = 4;
/// Extents of a layer whose tables are fetched together.
const EXTENTS_TOGETHER: usize = 64;
/// Packs that are decoded at the same time: each is in memory as a whole.
const DECODED_AT_ONCE: usize = 2;
/// Packs of which it is known at one time what they must be.
const PACKS_AT_A_TIME: usize = 1024;
/// Lines of a manifest after which others may go on.
const LINES_AT_ONCE: u32 = 256;
/// Extents of one backup that are told to differ from tables; more are left out.
const EXTENTS_TOLD_MAX: usize = 20;

/// Looks at one of several stores; the others are asked for manifests that it does not have whole, so that it is known what
/// else it lacks.
pub(super) async fn look(
    stores: &[Arc<dyn ObjectStore>],
    store: &Arc<dyn ObjectStore>,
    cluster: &ClusterName,
    request: &Request,
    watch: &Watch,
    scratch: &Path,
) -> Result<StoreFacts, VerifyError> {
    let facts = StoreFacts::of(store.name().clone());
    let mut looking = Looking {
        stores,
        store,
        cluster,
        request,
        watch,
        scratch,
        facts,
        packs: Listed::create_in(scratch).map_err(VerifyError::Scratch)?,
        tables: Tables::default(),
    };
    match looking.run().await {
        Ok(()) => {}
        Err(Stop::Away(reason)) => looking.facts.failed = Some(reason),
        Err(Stop::Local(error)) => return Err(error),
    }
    Ok(looking.facts)
}

/// A manifest that begins to be read, and has the digest that the root tells.
type Manifest = ManifestReader<std::fs::File>;

/// How many pages have wrong checksums; pack, and block in its relation, of the first.
type WrongPages = (u64, Option<(u32, u32)>);

struct Looking<'a> {
    stores: &'a [Arc<dyn ObjectStore>],
    store: &'a Arc<dyn ObjectStore>,
    cluster: &'a ClusterName,
    request: &'a Request,
    watch: &'a Watch,
    scratch: &'a Path,
    facts: StoreFacts,
    packs: Listed,
    tables: Tables,
}

impl Looking<'_> {
    async fn run(&mut self) -> Result<(), Stop> {
        self.roots().await?;
        let backups: Vec<RootBackup> = self.facts.root.iter().flat_map(|root| root.backups.clone()).collect();
        let wanted: Vec<RootBackup> =
            backups.into_iter().filter(|backup| self.request.backup.is_none_or(|only| only == backup.backup)).collect();
        for backup in &wanted {
            self.watch.step(format!("manifest of {} in {}", backup.backup, self.facts.store));
            self.manifest(backup).await?;
        }
        self.list_packs().await?;
        self.read_packs(&wanted).await?;
        self.settle_coverage().await?;
        self.find_users(&wanted).await?;
        self.forget_what_went().await?;
        self.wal(&wanted).await
    }

    fn note(&mut self, broken: Broken) {
        if self.facts.broken.len() < BROKEN_MAX {
            self.facts.broken.push(broken);
        } else {
            self.facts.left_out += 1;
        }
    }

    fn count(&mut self, bytes: u64) {
        self.facts.objects += 1;
        self.facts.bytes += bytes;
    }

    async fn roots(&mut self) -> Result<(), Stop> {
        self.watch.step(format!("roots of {}", self.facts.store));
        let newest = root::newest(&**self.store, self.cluster).await;
        match newest {
            Ok(newest) => self.facts.root = newest,
            Err(error) => {
                let broken = self.broken_root(error, What::NewestRoot)?;
                self.note(broken);
                return Ok(());
            }
        }
        let prefix = key::root_prefix(self.cluster);
        if self.request.backup.is_some() || !self.request.share.is_none_or(|share| share.takes(&prefix)) {
            return Ok(());
        }
        match root::verify_history(&**self.store, self.cluster).await {
            Ok(newest) => self.facts.objects += newest.map_or(0, |newest| newest.get()),
            Err(error) => {
                let broken = self.broken_root(error, What::OlderRoot)?;
                self.note(broken);
            }
        }
        Ok(())
    }

    fn broken_root(&self, error: RootError, what: What) -> Result<Broken, Stop> {
        let expected = "the root that was committed, which holds the digest of the one before it";
        match error {
            RootError::Damaged { key, reason, .. } => Ok(Broken::new(key, what, reason, expected)),
            RootError::Newer { key, reason, .. } => {
                let found = format!("it was written by a newer pgconvoy ({reason})");
                Ok(Broken::new(key, what, found, "a root that this version understands"))
            }
            RootError::Store(StoreError::NotFound { key, .. }) => {
                Ok(Broken::new(key, what, "it is not there", expected))
            }
            error => Err(Stop::Away(chain(&error))),
        }
    }

    /// Reads a manifest: what it lists of packs, and whether its extents are what the packs' tables say.
    async fn manifest(&mut self, backup: &RootBackup) -> Result<(), Stop> {
        let key = key::manifest(self.cluster, &backup.backup);
        let against_tables = self.request.takes(&key);
        let opened = about_object(fetch_manifest(&**self.store, self.cluster, backup, self.scratch).await)?;
        let found = match opened {
            Ok(manifest) => self.read_manifest(backup, manifest, against_tables).await?.err(),
            Err(found) => {
                if let Some(manifest) = self.manifest_elsewhere(backup).await {
                    // It has the digest that this store's root tells, so it is the same.
                    let _ = self.read_manifest(backup, manifest, against_tables).await?;
                }
                Some(found)
            }
        };
        self.watch.took(backup.manifest_size).await;
        self.count(backup.manifest_size);
        if let Some(found) = found {
            let expected = format!("the {} bytes whose SHA-256 the root tells", backup.manifest_size);
            let proof = Proof { size: backup.manifest_size, sha256: backup.manifest_sha256 };
            let broken = Broken::new(key, What::Manifest, found, expected);
            self.note(Broken { backups: vec![backup.backup], proof: Some(proof), ..broken });
        }
        Ok(())
    }

    async fn manifest_elsewhere(&self, backup: &RootBackup) -> Option<Manifest> {
        for other in self.stores.iter().filter(|other| other.name() != self.store.name()) {
            if let Ok(manifest) = fetch_manifest(&**other, self.cluster, backup, self.scratch).await {
                return Some(manifest);
            }
        }
        None
    }

    /// A manifest that was looked at before, once more.
    async fn manifest_again(&self, backup: &RootBackup) -> Result<Option<Manifest>, Stop> {
        let opened = about_object(fetch_manifest(&**self.store, self.cluster, backup, self.scratch).await)?;
        match opened {
            Ok(manifest) => Ok(Some(manifest)),
            Err(_) => Ok(self.manifest_elsewhere(backup).await),
        }
    }

    async fn read_manifest(
        &mut self,
        backup: &RootBackup,
        manifest: Manifest,
        against_tables: bool,
    ) -> Result<Result<(), String>, Stop> {
        let (block_size, mut differing, mut lines) = (manifest.head().block_size, 0, 0);
        for line in manifest {
            match line {
                Err(damage) => return Ok(Err(damage.to_string())),
                Ok(Line::Pack(pack)) => {
                    let proof = Proof { size: pack.size, sha256: pack.sha256 };
                    self.list(backup, (pack.backup.unwrap_or(backup.backup), pack.number), proof)?;
                }
                Ok(Line::File(file)) if against_tables => {
                    self.compare_file(backup, &file, block_size, &mut differing).await?;
                }
                Ok(_) => {}
            }
            lines += 1;
            if lines % LINES_AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
        Ok(Ok(()))
    }

    /// Notes a pack of a manifest.
    fn list(&mut self, backup: &RootBackup, (owner, number): PackName, proof: Proof) -> Result<(), Stop> {
        if self.packs.list((owner, number), proof)? != proof {
            let key = key::pack(self.cluster, &owner, number);
            let found = format!("manifest {} lists it with another size or digest than an older one", backup.backup);
            let broken = Broken::new(key, What::Coverage, found, "one content in all manifests");
            self.note(Broken { backups: vec![backup.backup], ..broken });
        }
        Ok(())
    }

    async fn compare_file(
        &mut self,
        backup: &RootBackup,
        file: &File,
        block_size: u32,
        differing: &mut usize,
    ) -> Result<(), Stop> {
        for layer in &file.layers {
            let owner = layer.backup.unwrap_or(backup.backup);
            for extents in layer.extents.chunks(EXTENTS_TOGETHER) {
                self.fetch_tables(extents.iter().map(|extent| (owner, extent.pack)).collect()).await?;
                for extent in extents {
                    let Some(table) = self.table((owner, extent.pack)).await? else { continue };
                    let Err(found) = extents::check(file, layer, extent, &table, block_size) else { continue };
                    *differing += 1;
                    if *differing > EXTENTS_TOLD_MAX {
                        self.facts.left_out += 1;
                        continue;
                    }
                    let (from, to) = (extent.offset, extent.end());
                    let expected = format!(
                        "its bytes {from} to {to} hold bytes {} to {} of {}",
                        extent.from, extent.to, file.path
                    );
                    let key = key::pack(self.cluster, &owner, extent.pack);
                    let broken = Broken::new(key, What::Coverage, found, expected);
                    self.note(Broken { backups: vec![backup.backup], ..broken });
                }
            }
        }
        Ok(())
    }

    /// The table of a listed pack; `None`, and a fact, if it cannot be read.
    async fn table(&mut self, pack: PackName) -> Result<Option<Table>, Stop> {
        if let Some(kept) = self.tables.get(&pack) {
            return Ok(kept);
        }
        self.fetch_tables(BTreeSet::from([pack])).await?;
        Ok(self.tables.get(&pack).flatten())
    }

    /// Keeps tables of listed packs that are not kept, for a while. One that cannot be read is a fact.
    async fn fetch_tables(&mut self, packs: BTreeSet<PackName>) -> Result<(), Stop> {
        let mut wanted: Vec<(PackName, Proof)> = Vec::new();
        for pack in packs {
            if self.tables.get(&pack).is_none() {
                wanted.extend(self.packs.proof(pack)?.map(|proof| (pack, proof)));
            }
        }
        let (store, cluster) = (self.store, self.cluster);
        let fetches = stream::iter(wanted).map(|(pack, proof)| async move {
            let fetched = fetch_table(&**store, &key::pack(cluster, &pack.0, pack.1), proof.size).await;
            (pack, fetched.map(|frames| frames.iter().map(Span::from).collect::<Table>()))
        });
        let mut fetches = fetches.buffered(if self.watch.is_paced() { 1 } else { AT_ONCE });
        while let Some((pack, fetched)) = fetches.next().await {
            let table = match about_object(fetched)? {
                Ok(table) => Some(table),
                Err(found) => {
                    self.tell_pack(pack, found)?;
                    None
                }
            };
            self.tables.keep(pack, table);
        }
        Ok(())
    }

    /// Notes once that a pack is wrong.
    fn tell_pack(&mut self, pack: PackName, found: String) -> Result<(), Stop> {
        if !self.packs.tell(pack) {
            return Ok(());
        }
        let Some(proof) = self.packs.proof(pack)? else { return Ok(()) };
        let key = key::pack(self.cluster, &pack.0, pack.1);
        let expected = format!("the {} bytes whose SHA-256 the manifest tells", proof.size);
        self.note(Broken { proof: Some(proof), ..Broken::new(key, What::Pack, found, expected) });
        Ok(())
    }

    /// Whether listed packs are there, with their sizes.
    async fn list_packs(&mut self) -> Result<(), Stop> {
        for owner in self.packs.owners() {
            let prefix = key::backup_prefix(self.cluster, &owner);
            let mut after: Option<String> = None;
            loop {
                let page = self.store.list(&prefix, after.as_deref(), LONG_LIST_LIMIT).await?;
                after = page.objects.last().map(|entry| entry.key.to_string());
                page.objects.iter().for_each(|entry| self.see_pack(owner, entry));
                if !page.more {
                    break;
                }
            }
            for number in self.packs.absent(&owner) {
                self.tell_pack((owner, number), "it is not there".to_owned())?;
            }
        }
        Ok(())
    }

    fn see_pack(&mut self, owner: BackupId, entry: &ObjectEntry) {
        if let Ok(ParsedKey::Pack { number, .. }) = entry.key.parsed() {
            self.packs.see((owner, number));
        }
    }

    /// Reads the packs of the share, backup after backup.
    async fn read_packs(&mut self, backups: &[RootBackup]) -> Result<(), Stop> {
        for owner in self.packs.owners() {
            let known = backups.iter().find(|backup| backup.backup == owner);
            let files = match known.filter(|_| self.request.depth == Depth::Full) {
                Some(backup) => self.files_of(backup).await?.map(Arc::new),
                None => None,
            };
            self.watch.step(format!("packs of {owner} in {}", self.facts.store));
            let (mut after, mut wrong_pages) = (None, WrongPages::default());
            loop {
                let numbers = self.packs.present_after(&owner, after, PACKS_AT_A_TIME);
                let Some(last) = numbers.last() else { break };
                after = Some(*last);
                self.read_some(owner, numbers, files.as_ref(), &mut wrong_pages).await?;
            }
            self.tell_pages(owner, wrong_pages, files.as_ref().map_or(0, |files| files.told));
        }
        Ok(())
    }

    /// Reads some packs of one backup.
    async fn read_some(
        &mut self,
        owner: BackupId,
        numbers: Vec<u32>,
        files: Option<&Arc<Files>>,
        wrong_pages: &mut WrongPages,
    ) -> Result<(), Stop> {
        let mut due: Vec<(u32, Proof)> = Vec::new();
        for number in numbers {
            if self.request.takes(&key::pack(self.cluster, &owner, number)) {
                due.extend(self.packs.proof((owner, number))?.map(|proof| (number, proof)));
            }
        }
        let (store, cluster, watch, depth) = (self.store, self.cluster, self.watch, self.request.depth);
        let checks = stream::iter(due).map(|(number, proof)| async move {
            let key = key::pack(cluster, &owner, number);
            let fault = content::check_pack(store, &key, proof, depth, files.cloned(), watch).await?;
            Ok::<_, StoreError>((number, proof, fault))
        });
        let mut checks = checks.buffered(match depth {
            _ if watch.is_paced() => 1,
            Depth::Digests => AT_ONCE,
            Depth::Full => DECODED_AT_ONCE,
        });
        while let Some((number, proof, fault)) = checks.try_next().await? {
            self.count(proof.size);
            match fault {
                None => {}
                Some(Fault::Absent) => self.tell_pack((owner, number), "it is not there".to_owned())?,
                Some(Fault::Damaged(found)) => self.tell_pack((owner, number), found)?,
                Some(Fault::Pages(pages, first)) => {
                    *wrong_pages = (wrong_pages.0 + pages, wrong_pages.1.or(Some((number, first))));
                }
            }
        }
        Ok(())
    }

    /// What contradicts the table of a pack that is damaged itself, or is another one, is the pack's fault alone.
    async fn settle_coverage(&mut self) -> Result<(), Stop> {
        let (contradicting, others): (Vec<Broken>, Vec<Broken>) =
            std::mem::take(&mut self.facts.broken).into_iter().partition(|broken| broken.what == What::Coverage);
        self.facts.broken = others;
        let mut judged: BTreeMap<PackName, bool> = BTreeMap::new();
        for broken in contradicting {
            let Ok(ParsedKey::Pack { backup, number, .. }) = broken.key.parsed() else { continue };
            let Some(proof) = self.packs.proof((backup, number))? else { continue };
            if self.packs.is_told((backup, number)) {
                continue;
            }
            let as_published = match judged.get(&(backup, number)) {
                Some(as_published) => *as_published,
                None => content::prove(&**self.store, &broken.key, Some(&proof)).await.is_ok(),
            };
            judged.insert((backup, number), as_published);
            match as_published {
                true => self.note(broken),
                false => self.tell_pack((backup, number), "it is a whole pack, but another one".to_owned())?,
            }
        }
        Ok(())
    }

    /// Pages that the backup does not tell of itself.
    fn tell_pages(&mut self, owner: BackupId, (pages, first): WrongPages, told: u64) {
        let Some((number, block)) = first.filter(|_| pages > told) else { return };
        let found = format!("{pages} pages have wrong checksums, the first is block {block} of its relation");
        let key = key::pack(self.cluster, &owner, number);
        let expected = format!("{told} of them, as the backup tells");
        let broken = Broken::new(key, What::Pages, found, expected);
        self.note(Broken { backups: vec![owner], ..broken });
    }

    async fn files_of(&self, backup: &RootBackup) -> Result<Option<Files>, Stop> {
        let Some(manifest) = self.manifest_again(backup).await? else { return Ok(None) };
        let (mut files, mut lines) = (Files::new(manifest.head()), 0);
        for line in manifest {
            if let Ok(Line::File(file)) = line {
                files.add(&file);
            }
            lines += 1;
            if lines % LINES_AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
        Ok(Some(files))
    }

    /// Finds the backups that need broken packs, by reading the manifests once more; that is seldom.
    async fn find_users(&mut self, backups: &[RootBackup]) -> Result<(), Stop> {
        let places: BTreeMap<PackName, usize> = self
            .facts
            .broken
            .iter()
            .enumerate()
            .filter(|(_, broken)| broken.what == What::Pack)
            .filter_map(|(place, broken)| match broken.key.parsed() {
                Ok(ParsedKey::Pack { backup, number, .. }) => Some(((backup, number), place)),
                _ => None,
            })
            .collect();
        if places.is_empty() {
            return Ok(());
        }
        for backup in backups {
            let Some(manifest) = self.manifest_again(backup).await? else { continue };
            for line in manifest {
                let pack = match line {
                    Ok(Line::Pack(pack)) => pack,
                    Ok(Line::File(_)) | Err(_) => break,
                    Ok(_) => continue,
                };
                if let Some(place) = places.get(&(pack.backup.unwrap_or(backup.backup), pack.number)) {
                    self.facts.broken[*place].backups.push(backup.backup);
                }
            }
        }
        Ok(())
    }

    /// A backup that retention took away meanwhile lacks nothing.
    async fn forget_what_went(&mut self) -> Result<(), Stop> {
        if self.facts.broken.iter().all(|broken| broken.backups.is_empty()) {
            return Ok(());
        }
        let newest = match root::newest(&**self.store, self.cluster).await {
            Ok(Some(newest)) => newest,
            Ok(None) => return Ok(()),
            Err(error) => return Err(Stop::Away(chain(&error))),
        };
        self.facts.broken.retain_mut(|broken| {
            let before = broken.backups.len();
            broken.backups.retain(|id| newest.backup(id).is_some());
            before == 0 || !broken.backups.is_empty()
        });
        if let Some(root) = &mut self.facts.root {
            root.backups.retain(|backup| newest.backup(&backup.backup).is_some());
        }
        Ok(())
    }
}
