//! What was said of single objects, so that it is said once and not at every pass.
//!
//! Bounded: beyond [`KEPT_MAX`] all is forgotten, and what still holds is said once more. It does not log.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use repository::key::ObjectKey;
use repository::name::StoreName;

/// Complaints kept in mind.
const KEPT_MAX: usize = 4096;

/// The last complaint about each object in each store.
#[derive(Debug, Default)]
pub struct Complaints {
    said: Mutex<HashMap<(StoreName, ObjectKey), String>>,
}

impl Complaints {
    /// Notes a complaint. True when it is not what was said of that object last.
    pub fn is_new(&self, store: &StoreName, key: &ObjectKey, reason: &str) -> bool {
        let mut said = self.said();
        let about = (store.clone(), key.clone());
        if said.get(&about).is_some_and(|last| last == reason) {
            return false;
        }
        if said.len() >= KEPT_MAX {
            said.clear();
        }
        said.insert(about, reason.to_owned());
        true
    }

    /// The object was found well: the next complaint is news.
    pub fn settle(&self, store: &StoreName, key: &ObjectKey) {
        self.said().remove(&(store.clone(), key.clone()));
    }

    fn said(&self) -> MutexGuard<'_, HashMap<(StoreName, ObjectKey), String>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_news_once_until_it_changes_or_the_object_is_well() {
        let complaints = Complaints::default();
        let (repo1, s3): (StoreName, StoreName) = ("repo1".parse().unwrap(), "s3".parse().unwrap());
        let key = ObjectKey::parse("repo.json").unwrap();
        assert!(complaints.is_new(&repo1, &key, "torn"));
        assert!(!complaints.is_new(&repo1, &key, "torn"));
        assert!(complaints.is_new(&s3, &key, "torn"));
        assert!(complaints.is_new(&repo1, &key, "flipped"));
        complaints.settle(&repo1, &key);
        assert!(complaints.is_new(&repo1, &key, "flipped"));
        for number in 0..2 * KEPT_MAX {
            complaints.is_new(&repo1, &key, &number.to_string());
        }
        assert!(complaints.said().len() <= KEPT_MAX);
    }
}
