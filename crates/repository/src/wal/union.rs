//! What several stores together say about one WAL file.
//!
//! All of them are asked at the same time. Once one of them holds anything under the name, the others have [`PATIENCE`] to
//! say what they hold; who is silent longer is passed over, because a store that hangs must not stop a recovery that another
//! store can serve. A caller that fetches again and again remembers who was silent, and does not wait for it each time.
//!
//! Nothing is concluded from silence: without an answer of every store nothing is absent.
//!
//! History files are read where several stores hold one, or a choice was made: their keys do not tell contents apart.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use postgres_format::{Timeline, WalFileName};
use tokio::time::Instant;

use super::histories::{self, Content};
use super::variants::{Choice, Decision, Held, Variant, Wanted, choose, newest_decision, variants};
use super::{Fingerprint, WalError};
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

/// Asks all stores at the same time: two listings each, or a listing and one look for a history file.
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
    if let WalFileName::History(timeline) = wanted.name {
        said.tell_histories_apart(wanted, *timeline).await;
    }
    said
}

async fn ask(store: &dyn ObjectStore, wanted: Wanted<'_>) -> Result<Answer, WalError> {
    let listed = variants(store, wanted.cluster, wanted.system, wanted.name);
    let (variants, decision) = futures_util::future::try_join(listed, newest_decision(store, wanted)).await?;
    Ok(Answer { variants, decision })
}

impl<'a> Said<'a> {
    /// The stores that hold a content, in order.
    pub(super) fn holders(&self, content: &Variant) -> Vec<&'a Arc<dyn ObjectStore>> {
        self.places(content).into_iter().map(|(place, _)| &self.stores[place]).collect()
    }

    /// The places of the stores that hold a content, in order, and its size in each: objects of one content may differ in
    /// how they are compressed and in what they tell of changes.
    pub(super) fn places(&self, content: &Variant) -> Vec<(usize, u64)> {
        let size =
            |answer: &Answer| answer.variants.iter().find(|found| is_same(found, content)).map(|found| found.size);
        let sizes = self.answers.iter().map(|answer| answer.as_ref().and_then(size));
        sizes.enumerate().filter_map(|(place, size)| Some((place, size?))).collect()
    }

    /// Which content is to be served.
    pub(super) async fn choose(&self, name: &WalFileName) -> Result<Choice, WalError> {
        let mut held: Vec<Held<'_>> = Vec::new();
        for variant in self.answers.iter().flatten().flat_map(|answer| &answer.variants) {
            if held.iter().all(|content| !is_same(&content.variant, variant)) {
                let places = self.places(variant).into_iter();
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

    /// Gives histories their fingerprints where these matter: stores hold several, or one was chosen. Equal ancestries get
    /// one, that which was chosen if it is among theirs.
    async fn tell_histories_apart(&mut self, wanted: Wanted<'_>, timeline: Timeline) {
        let decided = self.decided();
        let held = self.answers.iter().flatten().filter(|answer| !answer.variants.is_empty()).count();
        if held < 2 && matches!(decided, Decided::Nothing) {
            return;
        }
        let mut contents = self.read_histories().await;
        let chosen = if let Decided::For(chosen) = decided { Some(chosen) } else { None };
        contents.sort_by_key(|(place, content)| (Some(content.fingerprint) != chosen, *place));
        for index in 0..contents.len() {
            let (place, content) = &contents[index];
            let first = contents[..index].iter().find(|(_, first)| first.is_same(timeline, content));
            let told = first.map_or(content, |(_, first)| first).fingerprint;
            for own in self.answers[*place].iter_mut().flat_map(|answer| &mut answer.variants) {
                own.fingerprint = Some(told);
            }
        }
        if let Some(chosen) = chosen {
            self.look_apart(wanted, chosen).await;
        }
    }

    /// Reads what stores hold under a history's own key. One that fails has said nothing; a damaged one is not there.
    async fn read_histories(&mut self) -> Vec<(usize, Content)> {
        let stores = self.stores;
        let reads = self.answers.iter().enumerate().filter_map(|(place, answer)| {
            let own = answer.as_ref()?.variants.first()?;
            Some(async move { (place, Content::read(&*stores[place], own).await) })
        });
        let mut contents = Vec::new();
        for (place, read) in join_all(reads).await {
            match read {
                Ok(content) => contents.push((place, content)),
                Err(error) => self.unsay(place, &error),
            }
        }
        contents
    }

    /// Finds a chosen history where a store keeps it apart.
    async fn look_apart(&mut self, wanted: Wanted<'_>, chosen: Fingerprint) {
        let has = |answer: &Answer| answer.variants.iter().any(|own| own.fingerprint == Some(chosen));
        let answered = |place: &usize| self.answers[*place].as_ref().is_some_and(|answer| !has(answer));
        let lacking: Vec<usize> = (0..self.answers.len()).filter(answered).collect();
        let looks = lacking.iter().map(|place| histories::kept_apart(&*self.stores[*place], wanted, chosen));
        for (place, found) in lacking.iter().zip(join_all(looks).await) {
            match (found, &mut self.answers[*place]) {
                (Ok(Some(apart)), Some(answer)) => answer.variants = vec![apart],
                (Ok(_), _) => {}
                (Err(error), _) => self.unsay(*place, &error),
            }
        }
    }

    /// A store turned out not to be able to say what it has.
    fn unsay(&mut self, place: usize, error: &WalError) {
        self.reasons.push(chain(error));
        self.answers[place] = None;
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
            let holders: Vec<&str> = self.holders(variant).into_iter().map(|store| store.name().as_str()).collect();
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

/// Whether two stores' variants are one content: a history's key alone does not tell.
fn is_same(one: &Variant, other: &Variant) -> bool {
    (&one.key, one.fingerprint) == (&other.key, other.fingerprint)
}

/// What operators chose.
#[derive(Debug)]
enum Decided {
    Nothing,
    For(Fingerprint),
    /// Stores hold unlike choices of the same age.
    Unlike,
}
