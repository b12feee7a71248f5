//! A backup that goes on from an unfinished one: it takes over the pin in one root commit and refers to the packs that are
//! there. Also how not to do it.

use std::collections::BTreeSet;

use repository::key::{self, ParsedKey};
use repository::name::BackupId;
use repository::retention;
use repository::root::Root;
use repository::store::{self, ObjectStore};

use crate::actors::{Pins, Session, begin_from, commit, newest, send, some_store};
use crate::scheduled::Scheduled;
use crate::world::{World, cluster};

/// Whether the pin of an attempt is taken over before its packs are referred to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Takeover {
    /// In the commit that ends it.
    InOneCommit,
    /// Not at all, whether it stands or not: the packs were seen, and are believed to stay. Wrong.
    Never,
}

/// Goes on from an attempt that is pinned somewhere, in the stores where that is possible.
pub(crate) async fn go_on(world: &World, me: usize, takeover: Takeover) {
    let store = some_store(world);
    let Some(root) = newest(&store).await else { return };
    let standing = || root.pins.iter().filter(|pin| !pin.is_copy()).map(|pin| pin.backup).collect();
    let attempts: Vec<BackupId> = match takeover {
        Takeover::InOneCommit => standing(),
        Takeover::Never => match retention::prefixes(&*store, &cluster()).await {
            Ok(found) => found.into_iter().filter(|id| root.backup(id).is_none()).collect(),
            Err(_) => return,
        },
    };
    let Some(attempt) = world.state().random.choose(&attempts).copied() else { return };
    let covered = root.pin(&attempt).map(|pin| pin.protects.clone()).unwrap_or_default();
    let mut packs = Vec::new();
    for id in [attempt].into_iter().chain(covered) {
        let Some(found) = packs_of(&store, id).await else { return };
        packs.extend(found);
    }
    if packs.is_empty() {
        return;
    }
    let session = begin_from(world, me, None, Pins::First, packs);
    let session = match takeover {
        Takeover::InOneCommit => session,
        Takeover::Never => world.forget_attempts(session),
    };
    let session = pinned(world, me, session, attempt, takeover).await;
    world.note_stores(&session);
    send(world, me, &session).await;
}

async fn packs_of(store: &Scheduled, id: BackupId) -> Option<Vec<(BackupId, u32)>> {
    let listed = store::list_all(store, &key::backup_prefix(&cluster(), &id), 1000).await.ok()?;
    let packs = listed.iter().filter_map(|entry| match entry.key.parsed() {
        Ok(ParsedKey::Pack { number, .. }) => Some((id, number)),
        _ => None,
    });
    Some(packs.collect())
}

/// The session with the stores in which it is pinned, has taken over, and finds all that it refers to.
async fn pinned(world: &World, me: usize, mut session: Session, attempt: BackupId, takeover: Takeover) -> Session {
    let id = session.entry.backup;
    let owners: BTreeSet<BackupId> =
        session.packs.iter().map(|(owner, _)| *owner).filter(|owner| *owner != id).collect();
    for store in &world.stores {
        let pin = session.pin.clone();
        if commit(world, me, store, |root| root.with_pin(pin.clone())).await.is_none() {
            continue;
        }
        let take_over = |root: &Root| root.with_taken_over(&id, &[attempt]);
        if takeover == Takeover::InOneCommit && commit(world, me, store, take_over).await.is_none() {
            continue;
        }
        let mut whole = true;
        for (owner, number) in session.packs.iter().filter(|(owner, _)| owners.contains(owner)) {
            whole &= matches!(store.head(&key::pack(&cluster(), owner, *number)).await, Ok(Some(_)));
        }
        if whole {
            session.stores.push(store.number);
        }
    }
    session
}
