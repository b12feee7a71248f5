//! Two coordinators and two stores, with crashes, pauses and outages between any two requests: nothing that a backup needs
//! is ever lost.
//!
//! What runs is the product's own code: root commits, the planner, gathering and the sweep; only the backups are made
//! up. Every request to a store is a point at which the scheduler may let somebody else go on, pause a coordinator, kill
//! it, or let a store fail before or after it did what it was asked, or list what was there a while ago. Everything random
//! comes from the seed, which a failure prints.
//!
//! Four deliberately wrong variants run beside it and must lose, so that the model is known to bite: one that marks and
//! sweeps by listings and a period of grace, one that commits a plan upon another root than the one it was made from, one that
//! goes on from unfinished backups without taking over their pins, and one that restores without a word.

#![allow(clippy::unwrap_used)]

mod actors;
mod judge;
mod random;
mod restoring;
mod scheduled;
mod steps;
mod takeover;
mod world;
mod wrong;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use actors::{Binding, Protocol};
use random::Random;
use restoring::Word;
use takeover::Takeover;
use world::{Lost, World};

/// Requests in one run.
const STEPS: u64 = 310;
/// Runs of the right protocol, in each of [`PARTS`] tests.
const SEEDS: u64 = 520;
const PARTS: u64 = 4;

/// Which protocol the coordinators follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    /// The product's.
    Real,
    /// Backups without pins; retention marks by listings, waits for a period of grace and sweeps.
    MarkAndSweep,
    /// The product's planner, but its plan is committed upon whatever root is the newest.
    Unbound,
    /// The product's, but backups refer to what attempts left without taking over their pins.
    NotTakenOver,
    /// The product's, but restores do not hold what they read.
    NotHeld,
}

type Actor = Pin<Box<dyn Future<Output = ()>>>;

fn coordinator(world: &Arc<World>, number: usize, variant: Variant) -> Actor {
    let world = world.clone();
    match variant {
        Variant::Real => Box::pin(actors::run(world, number, Protocol::REAL)),
        Variant::Unbound => {
            Box::pin(actors::run(world, number, Protocol { binding: Binding::ToNothing, ..Protocol::REAL }))
        }
        Variant::NotTakenOver => {
            Box::pin(actors::run(world, number, Protocol { takeover: Takeover::Never, ..Protocol::REAL }))
        }
        Variant::NotHeld => Box::pin(actors::run(world, number, Protocol { word: Word::Never, ..Protocol::REAL })),
        Variant::MarkAndSweep => Box::pin(wrong::run(world)),
    }
}

/// One run; what was lost and when, if anything was.
fn run(seed: u64, variant: Variant) -> Result<Arc<World>, (u64, Lost)> {
    let world = World::new(seed);
    let mut dice = Random::new(seed ^ 0x5ced_u64);
    let mut actors = [coordinator(&world, 0, variant), coordinator(&world, 1, variant)];
    let mut paused_until = [0u64; 2];
    for step in 0..STEPS {
        world.tick(step, &mut dice);
        let number = dice.below(2) as usize;
        if paused_until[number] > step {
            continue;
        }
        match dice.below(1000) {
            0..12 => paused_until[number] = step + 10 + dice.below(100),
            12..20 => actors[number] = coordinator(&world, number, variant),
            _ => {}
        }
        let ended = actors[number].as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(ended, Poll::Pending, "a coordinator ended");
        world.check().map_err(|lost| (step, lost))?;
    }
    Ok(world)
}

fn part(number: u64) {
    let (mut published, mut removed, mut refused, mut gone_on, mut restored) = (0, 0, 0, 0, 0);
    for seed in number * SEEDS..(number + 1) * SEEDS {
        match run(seed, Variant::Real) {
            Ok(world) => {
                let counts = world.counts();
                published += counts.published;
                removed += counts.removed;
                refused += counts.zombies;
                gone_on += counts.gone_on;
                restored += counts.restored;
            }
            Err((step, lost)) => panic!("seed {seed}, step {step}: {lost}"),
        }
    }
    // A model in which nothing happens proves nothing.
    assert!(published > SEEDS && removed > SEEDS && refused > SEEDS / 50, "{published} {removed} {refused}");
    assert!(gone_on > SEEDS / 50, "only {gone_on} backups that went on from others came to exist");
    assert!(restored > SEEDS / 2, "only {restored} restores held a backup");
}

#[test]
fn nothing_is_lost_in_the_first_part() {
    part(0);
}

#[test]
fn nothing_is_lost_in_the_second_part() {
    part(1);
}

#[test]
fn nothing_is_lost_in_the_third_part() {
    part(2);
}

#[test]
fn nothing_is_lost_in_the_last_part() {
    part(PARTS - 1);
}

/// How many of so many runs lose something.
fn losses(variant: Variant, seeds: u64) -> u64 {
    (0..seeds).filter(|seed| run(*seed, variant).is_err()).count() as u64
}

#[test]
fn marking_and_sweeping_loses() {
    let losses = losses(Variant::MarkAndSweep, 100);
    assert!(losses >= 3, "{losses} of 100 runs lost something: the model does not bite");
}

#[test]
fn a_plan_that_is_not_bound_to_its_root_loses() {
    let losses = losses(Variant::Unbound, 200);
    assert!(losses >= 1, "{losses} of 200 runs lost something: the model does not bite");
}

#[test]
fn attempts_that_are_not_taken_over_lose() {
    let losses = losses(Variant::NotTakenOver, 300);
    assert!(losses >= 1, "{losses} of 300 runs lost something: the model does not bite");
}

#[test]
fn restores_that_say_nothing_lose() {
    let losses = losses(Variant::NotHeld, 100);
    assert!(losses >= 3, "{losses} of 100 runs lost something: the model does not bite");
}

#[test]
fn a_run_is_the_same_again() {
    let log = |seed| run(seed, Variant::Real).unwrap().requests();
    assert_eq!(log(7), log(7));
}
