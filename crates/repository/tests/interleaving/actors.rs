//! Coordinators as the product has them: each does one thing after the other, chosen at random, and gives up a thing when a
//! store fails. Nothing is awaited but stores.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline, WalFileName};
use repository::backup::manifest::{Head, Line, ManifestWriter, Pack};
use repository::backup::{self};
use repository::coverage::ArchivedWal;
use repository::key::{self, ObjectKey};
use repository::name::{BackupId, NodeName};
use repository::retention::{self, Facts};
use repository::root::{self, Hold, Pin, PinnedWal, Root, RootBackup, RootError, System};
use repository::store::{Body, ObjectStore};
use repository::sweep::{SWEEP_LIMIT, sweep};
use repository::wal_index;

use crate::restoring::{self, Word};
use crate::scheduled::Scheduled;
use crate::takeover::{Takeover, go_on};
use crate::world::{World, cluster};

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7);
const MIB: u64 = 1 << 20;

/// Upon what a plan is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Binding {
    /// The very root that it was made from.
    ToItsRoot,
    /// Whatever is the newest; wrong.
    ToNothing,
}

/// What coordinators, and who restores, keep to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Protocol {
    pub(crate) binding: Binding,
    pub(crate) takeover: Takeover,
    pub(crate) word: Word,
}

impl Protocol {
    /// The product's.
    pub(crate) const REAL: Self =
        Self { binding: Binding::ToItsRoot, takeover: Takeover::InOneCommit, word: Word::First };
}

/// Whether a backup pins before it sends anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pins {
    /// As it should.
    First,
    /// As agents of older versions do; it may be refused in the end, and nothing worse.
    Never,
}

/// A backup that was begun: what it consists of and needs, which never changes.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) entry: RootBackup,
    pub(crate) pin: Pin,
    pub(crate) manifest: Bytes,
    pub(crate) own: Vec<ObjectKey>,
    pub(crate) wal: Vec<ObjectKey>,
    /// Packs of its own and of others that it refers to.
    pub(crate) packs: Vec<(BackupId, u32)>,
    /// Every object it needs.
    pub(crate) needs: Vec<ObjectKey>,
    pub(crate) pins: Pins,
    /// The stores it is sent to.
    pub(crate) stores: Vec<usize>,
}

fn writer(coordinator: usize) -> NodeName {
    format!("coordinator{coordinator}").parse().unwrap()
}

fn size() -> SegmentSize {
    SegmentSize::from_bytes(MIB).unwrap()
}

pub(crate) async fn run(world: Arc<World>, me: usize, protocol: Protocol) {
    let Protocol { binding, takeover, word } = protocol;
    loop {
        let what = world.state().random.below(100);
        match what {
            0..20 if takeover == Takeover::Never => go_on(&world, me, takeover).await,
            0..20 if word == Word::Never => restoring::restore(&world, me, word).await,
            0..34 => backup(&world, me).await,
            34..36 => restoring::restore(&world, me, word).await,
            36..63 => retain(&world, me, binding).await,
            63..70 => copy(&world, me).await,
            70..80 => revoke(&world, me).await,
            80..87 => sweep_late(&world).await,
            87..91 => resume(&world, me).await,
            91..95 => go_on(&world, me, takeover).await,
            _ => hold_or_release(&world, me).await,
        }
    }
}

pub(crate) async fn newest(store: &Scheduled) -> Option<Root> {
    root::newest(store, &cluster()).await.ok().flatten()
}

pub(crate) async fn commit(
    world: &World,
    me: usize,
    store: &Scheduled,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) -> Option<Root> {
    let now = world.now(me);
    let with_system = |root: &Root| edit(&root.with_system(System::new(SYSTEM, Some(15), Some(MIB), now))?);
    match root::commit(store, &cluster(), &writer(me), now, with_system).await {
        Ok(root) => Some(root),
        Err(RootError::PinGone { .. }) => {
            world.note_zombie();
            None
        }
        Err(_) => None,
    }
}

/// Begins a backup in every store that answers, and takes it.
async fn backup(world: &World, me: usize) {
    let mut roots = Vec::new();
    for store in &world.stores {
        roots.push(root::newest(&**store, &cluster()).await.ok());
    }
    let parent = choose_parent(world, &roots);
    let pins = if world.state().random.percent(90) { Pins::First } else { Pins::Never };
    let session = begin(world, me, parent, pins);
    pin_and_send(world, me, session).await;
}

/// The newest backup that every store that answered has, usually.
pub(crate) fn choose_parent(world: &World, roots: &[Option<Option<Root>>]) -> Option<BackupId> {
    if world.state().random.percent(20) {
        return None;
    }
    let roots: Vec<Root> = roots.iter().flatten().cloned().collect::<Option<_>>()?;
    let in_all = |backup: &&RootBackup| roots.iter().all(|root| root.backup(&backup.backup).is_some());
    roots.first()?.backups.iter().rev().find(in_all).map(|backup| backup.backup)
}

/// Makes up a backup: new packs, and some of what its parent refers to.
pub(crate) fn begin(world: &World, me: usize, parent: Option<BackupId>, pins: Pins) -> Session {
    begin_from(world, me, parent, pins, Vec::new())
}

/// The same, with packs that attempts left.
pub(crate) fn begin_from(
    world: &World,
    me: usize,
    parent: Option<BackupId>,
    pins: Pins,
    left: Vec<(BackupId, u32)>,
) -> Session {
    let attempts: BTreeSet<BackupId> = left.iter().map(|(attempt, _)| *attempt).collect();
    let (mut now, server_time) = (world.now(me), world.server_time());
    if pins == Pins::Never {
        // So old that retention does not spare it for its age.
        now -= SignedDuration::from_hours(100);
    }
    let mut state = world.state();
    state.next_id += 1;
    let id = BackupId::new(now, state.next_id);
    let mut packs: Vec<(BackupId, u32)> = (0..1 + state.random.below(2) as u32).map(|number| (id, number)).collect();
    packs.extend(left);
    let inherited = parent.and_then(|parent| state.sessions.iter().find(|session| session.entry.backup == parent));
    for pack in inherited.map(|session| session.packs.clone()).unwrap_or_default() {
        if state.random.percent(60) {
            packs.push(pack);
        }
    }
    let (first, last) = (state.wal, state.wal + state.random.below(2));
    state.wal = last + 1;
    let head = Head { attempts: attempts.into_iter().collect(), ..head(id, first, last, server_time) };
    let (manifest, entry) = manifest(head, &packs, parent);
    let keys = |packs: &[(BackupId, u32)]| -> Vec<ObjectKey> {
        packs.iter().map(|(backup, number)| key::pack(&cluster(), backup, *number)).collect()
    };
    let own = keys(&packs.iter().copied().filter(|(backup, _)| *backup == id).collect::<Vec<_>>());
    let wal: Vec<ObjectKey> = (first..=last).map(segment_key).collect();
    let mut needs = keys(&packs);
    needs.extend(wal.iter().cloned());
    needs.push(key::manifest(&cluster(), &id));
    let pin = Pin::new(id, parent, writer(me), now);
    let session = Session { entry, pin, manifest, own, wal, packs, needs, pins, stores: Vec::new() };
    state.sessions.push(session.clone());
    session
}

fn segment_key(number: u64) -> ObjectKey {
    let name = WalFileName::Segment(SegmentName::new(Timeline::FIRST, SegmentNumber::new(number), size()));
    key::wal(&cluster(), SYSTEM, &name, &"s00000000000000000000000000000001".parse().unwrap())
}

fn head(id: BackupId, first: u64, last: u64, at: Timestamp) -> Head {
    let (start, stop) = (Lsn::new(first * MIB + 40), Lsn::new(last * MIB + MIB / 2));
    let text = format!(
        r#"{{"line":"head","format":1,"tool":"test","backup":"{id}","cluster":"main","system_identifier":"{SYSTEM}",
        "node":"db1","from_standby":false,"postgres_major":15,"control_version":1300,"catalog_version":202209061,
        "segment_size_bytes":{MIB},"block_size":8192,"relation_segment_blocks":131072,"checksum_version":1,
        "start_timeline":1,"start_lsn":"{start}","start_time":"{at}","stop_timeline":1,"stop_lsn":"{stop}",
        "stop_time":"{at}","min_recovery_point":null,"label":"","backup_label":"","tablespace_map":"","mode":448,
        "owner":null,"group":null,"page_errors":0}}"#
    );
    match serde_json::from_str(&text).unwrap() {
        Line::Head(head) => *head,
        _ => unreachable!("the text is a head"),
    }
}

fn manifest(head: Head, packs: &[(BackupId, u32)], parent: Option<BackupId>) -> (Bytes, RootBackup) {
    let own = head.backup;
    let others: BTreeSet<BackupId> = packs.iter().map(|(backup, _)| *backup).filter(|other| *other != own).collect();
    let critical = if others.is_empty() { Vec::new() } else { vec!["layers".to_owned()] };
    let head = Head { critical, parent, references: others.into_iter().collect(), ..head };
    let mut manifest = ManifestWriter::new(Vec::new(), head.clone()).unwrap();
    let mut lines: Vec<Pack> = packs
        .iter()
        .map(|(backup, number)| Pack {
            backup: Some(*backup).filter(|backup| *backup != own),
            number: *number,
            size: 1,
            sha256: [0; 32],
        })
        .collect();
    lines.sort_by_key(|pack| (pack.backup, pack.number));
    lines.into_iter().for_each(|pack| manifest.add(&Line::Pack(pack)).unwrap());
    let (bytes, summary) = manifest.finish().unwrap();
    (Bytes::from(bytes), backup::entry(&head, &summary))
}

pub(crate) async fn pin_and_send(world: &World, me: usize, mut session: Session) {
    for store in &world.stores {
        let pin = &session.pin;
        if session.pins == Pins::Never || commit(world, me, store, |root| root.with_pin(pin.clone())).await.is_some() {
            session.stores.push(store.number);
        }
    }
    world.note_stores(&session);
    send(world, me, &session).await;
}

/// Sends what the backup consists of to the stores it is pinned in, and publishes where all of it arrived.
pub(crate) async fn send(world: &World, me: usize, session: &Session) {
    let mut stores: Vec<&Arc<Scheduled>> = session.stores.iter().map(|number| &world.stores[*number]).collect();
    let manifest = key::manifest(&cluster(), &session.entry.backup);
    for key in session.own.iter().chain(&session.wal).chain([&manifest]) {
        let content = if *key == manifest { session.manifest.clone() } else { Bytes::from_static(b"x") };
        let mut arrived = Vec::new();
        for store in stores {
            if store.put_new(key, Body::Memory(content.clone())).await.is_ok() {
                arrived.push(store);
            }
        }
        stores = arrived;
    }
    for store in stores {
        let publish = |root: &Root| match session.pins {
            Pins::First => root.with_published(session.entry.clone()),
            Pins::Never => root.with_backup(session.entry.clone()),
        };
        commit(world, me, store, publish).await;
    }
}

/// Goes on with a backup that somebody began, whoever that was and whatever became of it.
async fn resume(world: &World, me: usize) {
    let session = {
        let mut state = world.state();
        let recent: Vec<Session> = state.sessions.iter().rev().take(6).cloned().collect();
        state.random.choose(&recent).cloned()
    };
    if let Some(session) = session {
        send(world, me, &session).await;
    }
}

/// Takes away a pin, rightly or wrongly.
async fn revoke(world: &World, me: usize) {
    let store = some_store(world);
    let Some(root) = newest(&store).await else { return };
    // With many the oldest, most likely rightly; else any.
    let pin = match root.pins.len() {
        0..3 => world.state().random.choose(&root.pins).map(|pin| pin.backup),
        _ => root.pins.first().map(|pin| pin.backup),
    };
    if let Some(pin) = pin {
        commit(world, me, &store, |root| Ok(root.without_pin(&pin))).await;
    }
}

pub(crate) fn some_store(world: &World) -> Arc<Scheduled> {
    let number = world.state().random.below(2) as usize;
    world.stores[number].clone()
}

/// Copies a backup to the store that lacks it: pin, objects, commit.
async fn copy(world: &World, me: usize) {
    let target = some_store(world);
    let source = &world.stores[1 - target.number];
    let (Some(from), Some(to)) = (newest(source).await, newest(&target).await) else { return };
    let lacking: Vec<BackupId> = from
        .backups
        .iter()
        .map(|backup| backup.backup)
        .filter(|id| to.backup(id).is_none() && to.pin(id).is_none() && !to.is_gone(id))
        .collect();
    let session = {
        let mut state = world.state();
        let Some(chosen) = state.random.choose(&lacking).copied() else { return };
        state.sessions.iter().find(|session| session.entry.backup == chosen).unwrap().clone()
    };
    let id = session.entry.backup;
    let others: BTreeSet<BackupId> =
        session.packs.iter().map(|(backup, _)| *backup).filter(|other| *other != id).collect();
    let (timeline, start_lsn) = (session.entry.start_timeline, session.entry.start_lsn);
    let pin = Pin {
        protects: others.into_iter().collect(),
        wal: Some(PinnedWal { system_identifier: SYSTEM, timeline, start_lsn }),
        ..Pin::new(id, None, writer(me), world.now(me))
    };
    if commit(world, me, &target, |root| root.with_pin(pin.clone())).await.is_none() {
        return;
    }
    for key in &session.needs {
        let content = repository::store::read(&**source, key, MIB).await;
        let Ok(Some(content)) = content else { return };
        if target.put_new(key, Body::Memory(content)).await.is_err() {
            return;
        }
    }
    commit(world, me, &target, |root| root.with_published(session.entry.clone())).await;
}

/// Plans, commits and sweeps in one store.
async fn retain(world: &World, me: usize, binding: Binding) {
    let store = some_store(world);
    retain_in(world, me, binding, &store).await;
}

pub(crate) async fn retain_in(world: &World, me: usize, binding: Binding, store: &Scheduled) {
    let Some(root) = newest(store).await else { return };
    let Ok(leftovers) = retention::prefixes(store, &cluster()).await else { return };
    let mut references = BTreeMap::new();
    for entry in &root.backups {
        let known = world.state().references.get(&entry.backup).cloned();
        let found = match known {
            Some(known) => known,
            None => match retention::gather_references(store, &cluster(), entry, &std::env::temp_dir()).await {
                Ok(found) => found,
                Err(_) => continue,
            },
        };
        world.state().references.insert(entry.backup, found.clone());
        references.insert(entry.backup, found);
    }
    let Some(wal) = archived(store).await else { return };
    let facts = Facts {
        store: store.name(),
        root: &root,
        wal: BTreeMap::from([(SYSTEM, wal)]),
        last_commit: None,
        references,
        leftovers,
        running: BTreeSet::new(),
        held_back: None,
    };
    let plan = retention::plan(&facts, &world.policy, world.now(me));
    if plan.changes_nothing(&root) {
        return;
    }
    let retired = plan.retired();
    let committed = commit(world, me, store, |newest| match binding {
        Binding::ToItsRoot => newest.with_retired(&retired),
        Binding::ToNothing => {
            let (generation, nonce) = (newest.generation, newest.nonce);
            newest.with_retired(&root::Retired { generation, nonce, ..retired.clone() })
        }
    });
    let Some(committed) = committed.await else { return };
    world.state().old_roots.push((store.number, committed.clone()));
    let _ = sweep(store, &committed, SWEEP_LIMIT).await;
}

async fn archived(store: &Scheduled) -> Option<ArchivedWal> {
    let mut wal = ArchivedWal::new(size());
    let mut after = None;
    loop {
        let page = wal_index::list_page(store, &cluster(), SYSTEM, after.as_deref()).await.ok()?;
        for object in &page.objects {
            wal.add(object.name.segment()?);
        }
        after = page.next;
        if after.is_none() {
            return Some(wal);
        }
    }
}

/// Sweeps by a root that was read long ago, as a coordinator does that was stopped in between.
async fn sweep_late(world: &World) {
    let old = {
        let mut state = world.state();
        let old = std::mem::take(&mut state.old_roots);
        let chosen = state.random.choose(&old).cloned();
        state.old_roots = old;
        chosen
    };
    if let Some((store, root)) = old {
        let _ = sweep(&*world.stores[store], &root, SWEEP_LIMIT).await;
    }
}

async fn hold_or_release(world: &World, me: usize) {
    let store = some_store(world);
    let Some(root) = newest(&store).await else { return };
    let (backup, release) = {
        let mut state = world.state();
        let Some(backup) = state.random.choose(&root.backups).map(|backup| backup.backup) else { return };
        (backup, state.random.percent(60))
    };
    let (reason, by) = ("audit".to_owned(), "ann".to_owned());
    let hold = Hold::new(backup, reason, by, world.now(me));
    commit(
        world,
        me,
        &store,
        |root| if release { Ok(root.without_hold(&backup)) } else { root.with_hold(hold.clone()) },
    )
    .await;
}
