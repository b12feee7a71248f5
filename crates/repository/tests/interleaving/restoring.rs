//! Restores: they hold a backup, read it for a while and hold it again, and are killed and paused like everybody else.
//!
//! As long as a restore's hold stands in the newest root of a store and has not run out by the server's time, nothing goes of
//! what the backup needs there, nor of the WAL behind it that was there when the hold was made.

use std::sync::Arc;

use futures_util::FutureExt;
use jiff::{SignedDuration, Timestamp};
use repository::key::{ObjectKey, ParsedKey};
use repository::name::BackupId;
use repository::root::{Root, RootError};
use repository::store::{ObjectStore, list_all};

use crate::actors::{commit, newest, some_store};
use crate::scheduled::Scheduled;
use crate::world::{Lost, State, World, cluster};

/// How often a restore says that it goes on.
const WORDS: u32 = 3;
/// How long a hold lasts at most, in minutes; runs are shorter than real ones.
const LONGEST: u64 = 80;
/// Objects it reads in between.
const READS: u64 = 8;
/// Most objects of a store in these tests.
const OBJECTS: usize = 100_000;

/// Whether a restore holds what it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// As it should, before it reads.
    First,
    /// Wrong: it only reads.
    Never,
}

/// What a restore counts on.
#[derive(Debug, Clone)]
pub(crate) struct Restoring {
    until: Timestamp,
    keys: Vec<ObjectKey>,
    word: Word,
}

/// Restores a backup of a store, any of those that its newest root names.
pub(crate) async fn restore(world: &World, me: usize, word: Word) {
    let store = some_store(world);
    let Some(root) = newest(&store).await else { return };
    let (backup, length) = {
        let mut state = world.state();
        let Some(backup) = state.random.choose(&root.backups).map(|backup| backup.backup) else { return };
        (backup, SignedDuration::from_mins(10 + state.random.below(LONGEST) as i64))
    };
    for _ in 0..WORDS {
        match word {
            Word::First => {
                let edit =
                    |root: &Root| shorter(root.with_restore(backup, "somebody", world.now(me))?, &backup, length);
                if commit(world, me, &store, edit).await.is_none() {
                    return;
                }
            }
            Word::Never => {
                let mut state = world.state();
                let until = state.time() + length;
                let begun = Restoring { until, keys: needed(&store, &state, &root, &backup), word };
                state.restores.entry((store.number, backup)).or_insert(begun).until = until;
            }
        }
        let reads = world.state().random.below(READS);
        let known = world.state().restores.get(&(store.number, backup)).cloned();
        for key in known.iter().flat_map(|one| &one.keys) {
            let _ = store.head(key).await;
            if world.state().random.below(READS) >= reads {
                break;
            }
        }
    }
}

fn shorter(mut root: Root, backup: &BackupId, length: SignedDuration) -> Result<Root, RootError> {
    let less = SignedDuration::try_from(repository::root::RESTORE_HOLD).unwrap() - length;
    for hold in root.holds.iter_mut().filter(|hold| hold.restore && hold.backup == *backup) {
        hold.until = hold.until.map(|until| until - less);
    }
    Ok(root)
}

/// What a backup needs in a store, and all kept WAL from its start on that is there.
fn needed(store: &Scheduled, state: &State, root: &Root, backup: &BackupId) -> Vec<ObjectKey> {
    let session = state.sessions.iter().find(|session| session.entry.backup == *backup).unwrap();
    let listed = list_all(&store.inner, "", OBJECTS).now_or_never().unwrap().unwrap();
    let mut keys = session.needs.clone();
    keys.extend(listed.into_iter().map(|entry| entry.key).filter(|key| match key.parsed() {
        Ok(ParsedKey::Wal { name, .. }) => {
            let kept =
                root.systems.iter().all(|system| name.segment().is_some_and(|segment| system.keeps_wal(segment)));
            kept && *key >= session.wal[0]
        }
        _ => false,
    }));
    keys
}

/// Takes up which restores hold something by a root that was just committed.
pub(crate) fn note_root(store: &Scheduled, state: &mut State, root: &Root) {
    assert_eq!(root.cluster, cluster());
    state.restores.retain(|(number, backup), one| {
        *number != store.number || one.word == Word::Never || root.restore_of(backup).is_some()
    });
    for hold in root.holds.iter().filter(|hold| hold.restore) {
        let (place, until) = ((store.number, hold.backup), hold.until.unwrap());
        let now = state.time();
        match state.restores.get_mut(&place).filter(|standing| standing.until > now) {
            Some(standing) => standing.until = until,
            None => {
                let keys = needed(store, state, root, &hold.backup);
                state.restores.insert(place, Restoring { until, keys, word: Word::First });
                state.note_restored();
            }
        }
    }
}

/// Whether everything is there that restores count on.
pub(crate) fn check(stores: &[Arc<Scheduled>], state: &State) -> Result<(), Lost> {
    for ((store, backup), one) in state.restores.iter().filter(|(_, one)| one.until > state.time()) {
        for key in &one.keys {
            if stores[*store].inner.head(key).now_or_never().unwrap().unwrap().is_none() {
                return Err(Lost::Restored { store: *store, backup: *backup, key: key.clone() });
            }
        }
    }
    Ok(())
}
