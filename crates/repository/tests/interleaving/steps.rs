//! A coordinator that dies between any two requests of expiry and sweep, and another one that goes on.
//!
//! Unlike the runs with a seed, these try every place once, and what is there in the end must be the same wherever it was.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use futures_util::FutureExt;
use repository::name::BackupId;
use repository::retention::Policy;
use repository::root::{self, Root};
use repository::store::ObjectStore;
use repository::sweep::{SWEEP_LIMIT, sweep};

use crate::actors::{Binding, Pins, begin, newest, pin_and_send, retain_in};
use crate::judge;
use crate::world::{World, cluster};

/// Requests after which a retention must have ended.
const REQUESTS_MAX: usize = 2000;
/// Backups before it, one an hour.
const BACKUPS: usize = 7;

/// Lets so many requests be made; whether it ended.
fn requests(what: impl Future<Output = ()>, count: usize) -> bool {
    let mut what = pin!(what);
    (0..count).any(|_| what.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready())
}

fn to_the_end(what: impl Future<Output = ()>) {
    assert!(requests(what, REQUESTS_MAX), "it does not end");
}

/// Two stores with backups that build on each other, and one that was begun, given up and left its packs. The same each
/// time.
fn filled(policy: &Policy) -> Arc<World> {
    let world = World::calm(policy.clone());
    let mut parent: Option<BackupId> = None;
    for number in 0..BACKUPS {
        let session = begin(&world, 0, parent, Pins::First);
        parent = Some(session.entry.backup);
        to_the_end(pin_and_send(&world, 0, session));
        world.pass(60);
        if number == 2 {
            let dead = begin(&world, 0, parent, Pins::First);
            let id = dead.entry.backup;
            // Its pins, and the first of its objects.
            assert!(!requests(pin_and_send(&world, 0, dead), 10));
            for store in &world.stores {
                let edit = |root: &Root| Ok(root.without_pin(&id));
                let (name, writer) = (cluster(), "coordinator0".parse().unwrap());
                let revoking = root::commit(&store.inner, &name, &writer, world.now(0), edit);
                revoking.now_or_never().unwrap().unwrap();
            }
        }
    }
    world
}

/// How many backups the first store has, each of them whole, and all its keys but its roots'.
fn look(world: &World) -> (usize, BTreeSet<String>) {
    let store: &dyn ObjectStore = &world.stores[0].inner;
    let sound = judge::expect_sound(store).now_or_never().expect("a store in memory answers at once");
    (sound, judge::keys(store).now_or_never().unwrap())
}

/// What a coordinator does when it starts, whatever another one left.
async fn sweep_by_newest(world: &World) {
    let store = &world.stores[0];
    let Some(root) = newest(store).await else { return };
    sweep(&**store, &root, SWEEP_LIMIT).await.unwrap();
}

fn check(policy: &Policy, left: usize) {
    let world = filled(policy);
    let before = look(&world);
    assert_eq!(before.0, BACKUPS);
    to_the_end(retain_in(&world, 0, Binding::ToItsRoot, &world.stores[0]));
    let whole = look(&world);
    assert_eq!(whole.0, left);
    assert!(whole.1.is_subset(&before.1) && whole.1.len() < before.1.len(), "nothing was removed");
    to_the_end(retain_in(&world, 1, Binding::ToItsRoot, &world.stores[0]));
    assert_eq!(look(&world), whole, "something was left for a second one");
    for count in 1..REQUESTS_MAX {
        let world = filled(policy);
        let ended = requests(retain_in(&world, 0, Binding::ToItsRoot, &world.stores[0]), count);
        let (sound, keys) = look(&world);
        assert!(sound == BACKUPS || sound == left, "{sound} backups after {count} requests");
        assert!(keys.is_subset(&before.1) && whole.1.is_subset(&keys), "after {count} requests");
        // And the next one is cut off too.
        requests(sweep_by_newest(&world), count / 2);
        look(&world);
        to_the_end(sweep_by_newest(&world));
        look(&world);
        to_the_end(retain_in(&world, 1, Binding::ToItsRoot, &world.stores[0]));
        assert_eq!(look(&world), whole, "after {count} requests");
        if ended {
            assert!(count > 20, "it ended after {count} requests");
            return;
        }
    }
    panic!("it does not end");
}

#[test]
fn an_expiry_cut_off_anywhere_is_finished_by_another_coordinator() {
    check(&Policy { any: Some(2), ..Policy::default() }, 2);
}

#[test]
fn an_expiry_with_a_window_cut_off_anywhere_is_finished_too() {
    let hours = |hours: u64| Duration::from_secs(hours * 3600);
    // Ages count from the end of the newest backup.
    check(&Policy { any: Some(1), window: Some(hours(2)), ..Policy::default() }, 2);
}
