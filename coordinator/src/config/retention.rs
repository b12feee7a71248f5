//! What the configuration says about retention: checked rules, by cluster and store.
//!
//! Without rules everything is kept. Rules that cannot be meant are refused rather than guessed at, because what they remove
//! is gone.

use std::collections::BTreeMap;

use jiff::tz::TimeZone;
use process::units::Span;
use repository::config::StoreConfig;
use repository::name::{ClusterName, StoreName};
use repository::retention::Policy;
use serde::Deserialize;

/// Most that a count may say; more is a slip of the hand.
const COUNT_MAX: u32 = 10_000;

/// A table of rules as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRetention {
    /// Keep everything, whatever the cluster's other stores do.
    #[serde(default)]
    everything: bool,
    full: Option<u32>,
    backups: Option<u32>,
    age: Option<Span>,
    daily: Option<u32>,
    weekly: Option<u32>,
    monthly: Option<u32>,
    yearly: Option<u32>,
    window: Option<Span>,
    zone: Option<String>,
    #[serde(default)]
    store: BTreeMap<StoreName, RawRetention>,
}

/// The rules of all clusters.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    clusters: BTreeMap<ClusterName, OfCluster>,
}

#[derive(Debug, Clone, Default)]
struct OfCluster {
    everywhere: Policy,
    stores: BTreeMap<StoreName, Policy>,
}

impl Policies {
    /// The rules of a cluster in a store; without any, everything is kept.
    pub fn of(&self, cluster: &ClusterName, store: &StoreName) -> Policy {
        let Some(rules) = self.clusters.get(cluster) else { return Policy::default() };
        rules.stores.get(store).unwrap_or(&rules.everywhere).clone()
    }

    /// Whether anything is ever removed of a cluster.
    pub fn removes_anything(&self, cluster: &ClusterName) -> bool {
        self.clusters.get(cluster).is_some_and(|rules| {
            !rules.everywhere.keeps_everything() || rules.stores.values().any(|rules| !rules.keeps_everything())
        })
    }

    /// These rules for a cluster in some stores, and none elsewhere.
    #[cfg(test)]
    pub(crate) fn for_tests(cluster: &str, rules: &[(&str, Policy)]) -> Self {
        let stores = rules.iter().map(|(store, policy)| (store.parse().expect("a name"), policy.clone())).collect();
        let rules = OfCluster { everywhere: Policy::default(), stores };
        Self { clusters: BTreeMap::from([(cluster.parse().expect("a name"), rules)]) }
    }

    /// Takes up a cluster's table.
    ///
    /// # Errors
    /// What cannot be meant, and what to do.
    pub(super) fn add(
        &mut self,
        cluster: &ClusterName,
        raw: RawRetention,
        stores: &[StoreConfig],
    ) -> Result<(), String> {
        let mut rules = OfCluster::default();
        let place = format!("cluster \"{cluster}\": [cluster.retention]");
        let only_of_stores = !raw.store.is_empty() && !raw.says_something();
        if !only_of_stores {
            rules.everywhere = raw.policy().map_err(|text| format!("{place}: {text}"))?;
        }
        for (store, raw) in &raw.store {
            let place = format!("cluster \"{cluster}\": [cluster.retention.store.{store}]");
            if !stores.iter().any(|known| known.name == *store) {
                return Err(format!("{place}: there is no [[store]] of that name"));
            }
            if !raw.store.is_empty() {
                return Err(format!("{place}: a store's rules have no stores of their own"));
            }
            rules.stores.insert(store.clone(), raw.policy().map_err(|text| format!("{place}: {text}"))?);
        }
        self.clusters.insert(cluster.clone(), rules);
        Ok(())
    }
}

impl RawRetention {
    fn counts(&self) -> [(&'static str, Option<u32>); 6] {
        [
            ("full", self.full),
            ("backups", self.backups),
            ("daily", self.daily),
            ("weekly", self.weekly),
            ("monthly", self.monthly),
            ("yearly", self.yearly),
        ]
    }

    fn says_something(&self) -> bool {
        let rule =
            self.counts().iter().any(|(_, count)| count.is_some()) || self.age.is_some() || self.window.is_some();
        rule || self.everything || self.zone.is_some()
    }

    fn policy(&self) -> Result<Policy, String> {
        let spans = [("age", self.age), ("window", self.window)];
        let mut given: Vec<&str> =
            self.counts().iter().filter(|(_, count)| count.is_some()).map(|(name, _)| *name).collect();
        given.extend(spans.iter().filter(|(_, span)| span.is_some()).map(|(name, _)| *name));
        match (self.everything, given.first()) {
            (true, Some(rule)) => {
                return Err(format!("everything = true and {rule} contradict each other; leave one of them out"));
            }
            (true, None) if self.zone.is_none() => return Ok(Policy::default()),
            (_, None) => {
                let text = "it says nothing of what is kept; give full, backups, age, daily, weekly, monthly, yearly or \
                            window, or leave it out to keep everything";
                return Err(text.to_owned());
            }
            (false, Some(_)) => {}
        }
        if let Some((name, _)) = self.counts().iter().find(|(_, count)| *count == Some(0)) {
            return Err(format!("{name} = 0 keeps nothing; leave it out"));
        }
        if let Some((name, Some(count))) = self.counts().iter().find(|(_, count)| count.is_some_and(|c| c > COUNT_MAX))
        {
            return Err(format!("{name} = {count} is more than {COUNT_MAX}; to keep all, leave it out or give an age"));
        }
        if let Some((name, _)) = spans.iter().find(|(_, span)| span.is_some_and(|span| span.duration().is_zero())) {
            return Err(format!("{name} = \"0\" keeps nothing; leave it out"));
        }
        let periods = self.daily.or(self.weekly).or(self.monthly).or(self.yearly);
        let zone = match (&self.zone, periods) {
            (None, _) => TimeZone::UTC,
            (Some(_), None) => return Err("zone is of use with daily, weekly, monthly or yearly only".to_owned()),
            (Some(zone), Some(_)) => TimeZone::get(zone)
                .map_err(|_| format!("\"{zone}\" is not a time zone such as \"UTC\" or \"Europe/Berlin\""))?,
        };
        if let (Some(age), Some(window)) = (self.age, self.window)
            && age < window
        {
            return Err(format!(
                "age = \"{age}\" is less than the window of {window}, which keeps older backups all the same; leave age out \
                 or make it longer"
            ));
        }
        Ok(Policy {
            full: self.full,
            any: self.backups,
            age: self.age.map(Span::duration),
            daily: self.daily.unwrap_or(0),
            weekly: self.weekly.unwrap_or(0),
            monthly: self.monthly.unwrap_or(0),
            yearly: self.yearly.unwrap_or(0),
            window: self.window.map(Span::duration),
            zone,
            ..Policy::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::read;

    const HEAD: &str = "state_directory = \"/var/lib/pgconvoy\"\n[[store]]\nname = \"repo1\"\nkind = \"directory\"\n\
                        path = \"/srv/repo1\"\n[[store]]\nname = \"s3\"\nkind = \"directory\"\npath = \"/srv/s3\"\n";

    fn rules(text: &str) -> Result<(String, String), String> {
        let settings = read(&format!("{HEAD}[[cluster]]\nname = \"main\"\n{text}"))?;
        let of = |store: &str| settings.retention.of(&"main".parse().unwrap(), &store.parse().unwrap()).summary();
        Ok((of("repo1"), of("s3")))
    }

    #[test]
    fn rules_are_of_all_stores_or_of_one() {
        let check = |text: &str, repo1: &str, s3: &str| {
            assert_eq!(rules(text), Ok((repo1.to_owned(), s3.to_owned())), "{text}");
        };
        check("", "everything", "everything");
        check("[cluster.retention]\nbackups = 3\n", "newest 3", "newest 3");
        check(
            "[cluster.retention]\nwindow = \"7d\"\n",
            "younger than 7 d, a window of 7 d",
            "younger than 7 d, a window of 7 d",
        );
        let both =
            "[cluster.retention]\nfull = 2\n[cluster.retention.store.s3]\nmonthly = 12\nzone = \"Europe/Vienna\"\n";
        check(both, "newest 2 full and what was taken since", "12 monthly");
        check("[cluster.retention.store.repo1]\nage = \"3d\"\n", "younger than 3 d", "everything");
        check(
            "[cluster.retention]\nfull = 2\n[cluster.retention.store.s3]\neverything = true\n",
            "newest 2 full and what was taken since",
            "everything",
        );
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let check = |text: &str, part: &str| {
            let refused = rules(text).unwrap_err();
            assert!(refused.contains(part), "{part} in {refused}");
        };
        check("[cluster.retention]\n", "says nothing");
        check("[cluster.retention]\nzone = \"UTC\"\n", "says nothing");
        check("[cluster.retention]\nfull = 0\n", "full = 0 keeps nothing");
        check("[cluster.retention]\nbackups = 99999\n", "more than 10000");
        check("[cluster.retention]\nage = \"0\"\n", "age = \"0\"");
        check("[cluster.retention]\nwindow = \"7\"\n", "has no unit");
        check("[cluster.retention]\ndaily = 7\nzone = \"Atlantis\"\n", "Atlantis");
        check("[cluster.retention]\nfull = 2\nzone = \"UTC\"\n", "zone is of use");
        check("[cluster.retention]\neverything = true\nfull = 2\n", "contradict");
        check("[cluster.retention]\nage = \"3d\"\nwindow = \"7d\"\n", "make it longer");
        check("[cluster.retention]\nfulls = 2\n", "did you mean `full`");
        check("[cluster.retention.store.s4]\nfull = 2\n", "no [[store]] of that name");
        check(
            "[cluster.retention.store.s3]\nfull = 2\n[cluster.retention.store.s3.store.s3]\nfull = 2\n",
            "of their own",
        );
    }

    #[test]
    fn without_rules_nothing_is_ever_removed() {
        let settings = read(&format!("{HEAD}[[cluster]]\nname = \"main\"\n")).unwrap();
        assert!(!settings.retention.removes_anything(&"main".parse().unwrap()));
        let policy = settings.retention.of(&"other".parse().unwrap(), &"s3".parse().unwrap());
        assert!(policy.keeps_everything() && policy.clock_ahead > Duration::from_secs(3600));
    }
}
