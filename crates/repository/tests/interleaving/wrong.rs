//! How not to do it: no pins, and a retention that marks what no backup refers to by a listing and removes it when it is old
//! enough. Each step is sensible by itself, and many tools work so.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use repository::key::{self, ObjectKey, ParsedKey};
use repository::root::{self, Root, RootError};
use repository::store::{self, Body, ObjectStore};

use crate::actors::{Pins, Session, begin, choose_parent, newest};
use crate::scheduled::Scheduled;
use crate::world::{World, cluster};

/// How old an object must be, in steps, before it counts as left over.
const GRACE: u64 = 40;
/// Backups that are kept.
const KEPT: usize = 2;

pub(crate) async fn run(world: Arc<World>) {
    loop {
        let what = world.state().random.below(100);
        match what {
            0..60 => backup(&world).await,
            _ => retain(&world).await,
        }
    }
}

async fn commit(store: &Scheduled, edit: impl Fn(&Root) -> Root) -> bool {
    let writer = "coordinator".parse().unwrap();
    let edit = |root: &Root| Ok::<Root, RootError>(edit(root));
    root::commit(store, &cluster(), &writer, jiff::Timestamp::UNIX_EPOCH, edit).await.is_ok()
}

async fn backup(world: &World) {
    let mut roots = Vec::new();
    for store in &world.stores {
        roots.push(root::newest(&**store, &cluster()).await.ok());
    }
    let parent = choose_parent(world, &roots);
    let session = begin(world, 0, parent, Pins::First);
    for store in &world.stores {
        if has_parent(store, &session).await && send(store, &session).await {
            commit(store, |root| {
                let mut root = root.clone();
                if root.backup(&session.entry.backup).is_none() {
                    root.backups.push(session.entry.clone());
                    root.backups.sort_by_key(|backup| backup.backup);
                }
                root
            })
            .await;
        }
    }
}

async fn has_parent(store: &Scheduled, session: &Session) -> bool {
    match session.entry.parent {
        None => true,
        Some(parent) => newest(store).await.is_some_and(|root| root.backup(&parent).is_some()),
    }
}

async fn send(store: &Scheduled, session: &Session) -> bool {
    let manifest = key::manifest(&cluster(), &session.entry.backup);
    for key in session.own.iter().chain(&session.wal) {
        if store.put_new(key, Body::Memory(Bytes::from_static(b"x"))).await.is_err() {
            return false;
        }
    }
    store.put_new(&manifest, Body::Memory(session.manifest.clone())).await.is_ok()
}

async fn retain(world: &World) {
    let number = world.state().random.below(2) as usize;
    let store = &world.stores[number];
    let Some(root) = newest(store).await else { return };
    let kept: BTreeSet<_> = root.backups.iter().rev().take(KEPT).map(|backup| backup.backup).collect();
    let expire = |root: &Root| {
        let mut root = root.clone();
        let newest = root.backups.last().map(|backup| backup.backup);
        root.backups.retain(|backup| kept.contains(&backup.backup) || Some(backup.backup) == newest);
        root
    };
    if !commit(store, expire).await {
        return;
    }
    let needed: BTreeSet<ObjectKey> = {
        let state = world.state();
        let kept = state.sessions.iter().filter(|session| kept.contains(&session.entry.backup));
        kept.flat_map(|session| session.needs.clone()).collect()
    };
    let Ok(listed) = store::list_all(&**store, &key::backups_prefix(&cluster()), 10_000).await else { return };
    for entry in listed {
        let young = {
            let state = world.state();
            let age = state.put_at.get(&entry.key).map_or(0, |at| state.step().saturating_sub(*at));
            age < GRACE
        };
        let pack = matches!(entry.key.parsed(), Ok(ParsedKey::Pack { .. } | ParsedKey::Manifest { .. }));
        if pack && !young && !needed.contains(&entry.key) && store.delete(&entry.key).await.is_err() {
            return;
        }
    }
}
