//! What several stores together say about one WAL file.
//!
//! All of them are asked at the same time. Once one of them holds anything under the name, the others have [`PATIENCE`] to
//! say what they hold; who is silent longer is passed over, because a store that hangs must not stop a recovery that another
//! store can serve. A caller that fetches again and again remembers who was silent, and does not wait for it each time.
//!
//! Nothing is concluded from silence: without an answer of every store nothing is absent.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use postgres_format::WalFileName;
use tokio::time::Instant;

use super::variants::{Choice, Decision, Held, Variant, Wanted, choose, newest_decision, variants};
use super::{Fingerprint, WalError};
use crate::key::ObjectKey;
use crate::name::StoreName;
use crate::observe::chain;
use crate::store::{ObjectStore, StoreError};

/// How long stores are waited for once one of them can serve.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a silent store is taken for silent.
const SILENCE_LASTS: Duration = Duration::from_secs(30);

/// Stores that were silent lately. A fetch that another store can serve does not wait for them.
#[derive(Debug, Default)]
pub struct Silences {
    since: Mutex<HashMap<StoreName, Instant>>,
    heard: Arc<Heard>,
}

/// When any store was heard last: an answer, or a piece of an object.
#[derive(Debug, Default)]
pub(super) struct Heard {
    last: Mutex<Option<Instant>>,
}

impl Heard {
    pub(super) fn note(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

impl Silences {
    /// Whether any store answered within this time, or sent a piece of an object. One that is slow is not silent.
    pub fn heard_within(&self, time: Duration) -> bool {
        self.heard.last.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|last| last.elapsed() < time)
    }

    /// A caller knows that a store answered: it has what came from one.
    pub fn hear(&self) {
        self.heard.note();
    }

    pub(super) fn heard(&self) -> &Arc<Heard> {
        &self.heard
    }

    pub(super) fn note(&self, store: &StoreName) {
        self.since.lock().unwrap_or_else(PoisonError::into_inner).insert(store.clone(), Instant::now());
    }

    fn end(&self, store: &StoreName) {
        self.heard.note();
        self.since.lock().unwrap_or_else(PoisonError::into_inner).remove(store);
    }

    pub(super) fn holds(&self, store: &StoreName) -> bool {
        let since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        since.get(store).is_some_and(|since| since.elapsed() < SILENCE_LASTS)
    }
}

/// One store's answer.
#[derive(Debug)]
struct Answer {
    variants: Vec<Variant>,
    decision: Option<(u32, Decision)>,
}

/// What the stores said about one name.
#[derive(Debug)]
pub(super) struct Said<'a> {
    stores: &'a [Arc<dyn ObjectStore>],
    /// By place in `stores`; none where nothing was said.
    answers: Vec<Option<Answer>>,
    /// Why others said nothing, a line each.
    pub(super) reasons: Vec<String>,
}

/// Asks all stores at the same time: two listings each, one look for a history file.
pub(super) async fn ask_all<'a>(
    stores: &'a [Arc<dyn ObjectStore>],
    wanted: Wanted<'_>,
    silences: &Silences,
) -> Said<'a> {
    let mut said = Said { stores, answers: stores.iter().map(|_| None).collect(), reasons: Vec::new() };
    let mut waiting = vec![true; stores.len()];
    let asked = stores.iter().enumerate().map(|(place, store)| async move { (place, ask(&**store, wanted).await) });
    let mut asked: FuturesUnordered<_> = asked.collect();
    let mut until: Option<Instant> = None;
    loop {
        let next = match until {
            None => asked.next().await,
            Some(until) => tokio::time::timeout_at(until, asked.next()).await.unwrap_or(None),
        };
        let Some((place, answer)) = next else { break };
        waiting[place] = false;
        let name = stores[place].name();
        match answer {
            Ok(answer) => {
                silences.end(name);
                if !answer.variants.is_empty() {
                    until = until.or_else(|| Some(Instant::now() + PATIENCE));
                }
                said.answers[place] = Some(answer);
            }
            Err(error) => {
                if matches!(error, WalError::Store(StoreError::Timeout { .. })) {
                    silences.note(name);
                }
                said.reasons.push(chain(&error));
            }
        }
        let silent = |place: usize| silences.holds(stores[place].name());
        if until.is_some() && (0..stores.len()).filter(|place| waiting[*place]).all(silent) {
            break;
        }
    }
    for (place, _) in waiting.iter().enumerate().filter(|(_, waiting)| **waiting) {
        let name = stores[place].name();
        // One that was not waited for has not shown anew that it is silent.
        if !silences.holds(name) {
            silences.note(name);
        }
        said.reasons.push(format!("store {name} did not say within {} s what it has", PATIENCE.as_secs()));
    }
    said
}

async fn ask(store: &dyn ObjectStore, wanted: Wanted<'_>) -> Result<Answer, WalError> {
    let listed = variants(store, wanted.cluster, wanted.system, wanted.name);
    if matches!(wanted.name, WalFileName::History(_)) {
        // Its key has no fingerprint and nobody decides about it: the stored one stays.
        return Ok(Answer { variants: listed.await?, decision: None });
    }
    let (variants, decision) = futures_util::future::try_join(listed, newest_decision(store, wanted)).await?;
    Ok(Answer { variants, decision })
}

impl<'a> Said<'a> {
    /// The stores that hold an object, in order.
    pub(super) fn holders(&self, key: &ObjectKey) -> Vec<&'a Arc<dyn ObjectStore>> {
        let holds = |answer: &Answer| answer.variants.iter().any(|variant| variant.key == *key);
        let both = self.stores.iter().zip(&self.answers);
        both.filter(|(_, answer)| answer.as_ref().is_some_and(holds)).map(|(store, _)| store).collect()
    }

    /// The places of the stores that hold an object, in order, and its size in each: objects of one content may differ in
    /// how they are compressed and in what they tell of changes.
    pub(super) fn places(&self, key: &ObjectKey) -> Vec<(usize, u64)> {
        let size = |answer: &Answer| answer.variants.iter().find(|variant| variant.key == *key).map(|found| found.size);
        let sizes = self.answers.iter().map(|answer| answer.as_ref().and_then(size));
        sizes.enumerate().filter_map(|(place, size)| Some((place, size?))).collect()
    }

    /// Which content is to be served.
    pub(super) async fn choose(&self, name: &WalFileName) -> Result<Choice, WalError> {
        let mut held: Vec<Held<'_>> = Vec::new();
        for variant in self.answers.iter().flatten().flat_map(|answer| &answer.variants) {
            if held.iter().all(|content| content.variant.key != variant.key) {
                let places = self.places(&variant.key).into_iter();
                let stores = places.map(|(place, size)| (&*self.stores[place], size)).collect();
                held.push(Held { variant: variant.clone(), stores });
            }
        }
        match self.decided() {
            Decided::Nothing => choose(name, held, None).await,
            Decided::For(fingerprint) => choose(name, held, Some(fingerprint)).await,
            Decided::Unlike => Ok(Choice::Conflict(held.into_iter().map(|content| content.variant).collect())),
        }
    }

    /// What operators chose last. Stores number choices each for itself; the highest number counts.
    fn decided(&self) -> Decided {
        let all = || self.answers.iter().flatten().filter_map(|answer| answer.decision.as_ref());
        let Some(newest) = all().map(|(number, _)| *number).max() else { return Decided::Nothing };
        let mut last = all().filter(|(number, _)| *number == newest).map(|(_, decision)| decision.fingerprint);
        match last.next() {
            Some(first) if last.all(|other| other == first) => Decided::For(first),
            _ => Decided::Unlike,
        }
    }

    /// Contents and who has them, for people.
    pub(super) fn describe(&self, variants: &[Variant]) -> String {
        let one = |variant: &Variant| {
            let holders: Vec<&str> =
                self.holders(&variant.key).into_iter().map(|store| store.name().as_str()).collect();
            format!("{} in {}", variant.content_name(), holders.join(" and "))
        };
        let texts: Vec<String> = variants.iter().map(one).collect();
        match self.decided() {
            Decided::Nothing => texts.join(", "),
            Decided::For(fingerprint) => format!("{fingerprint} was chosen, and there is {}", texts.join(", ")),
            Decided::Unlike => format!("stores hold unlike choices, and there is {}", texts.join(", ")),
        }
    }
}

/// What operators chose.
#[derive(Debug)]
enum Decided {
    Nothing,
    For(Fingerprint),
    /// Stores hold unlike choices of the same age.
    Unlike,
}
