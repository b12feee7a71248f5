//! PURE: which databases are wanted, by name or object identifier, from what the repository alone knows: the names that the
//! manifest's head has, and the directories that files lie in.

use std::collections::BTreeSet;

use repository::backup::manifest::Database;

use super::layout::FIRST_OF_USERS;
use super::target::TargetError;

/// The databases of a backup.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    /// By name, if the backup tells names.
    pub(super) named: &'a [Database],
    /// Those that files belong to.
    pub(super) with_files: &'a BTreeSet<u32>,
}

impl Known<'_> {
    /// The identifiers of what is asked for; none for all. A number is an identifier or a name.
    pub(super) fn wanted(&self, asked: &[String]) -> Result<Option<BTreeSet<u32>>, TargetError> {
        if asked.is_empty() {
            return Ok(None);
        }
        asked.iter().map(|database| self.find(database)).collect::<Result<_, _>>().map(Some)
    }

    fn find(&self, asked: &str) -> Result<u32, TargetError> {
        let by_name = self.named.iter().filter(|database| database.name.as_bytes() == asked.as_bytes());
        let by_number = asked.parse().ok().filter(|oid| self.oids().contains(oid));
        let found: BTreeSet<u32> = by_name.map(|database| database.oid).chain(by_number).collect();
        let (database, known) = (asked.to_owned(), self.told(&self.oids()));
        let mut found = found.into_iter();
        match (found.next(), found.next()) {
            (Some(only), None) => Ok(only),
            (Some(_), Some(_)) => Err(TargetError::DatabaseAmbiguous { database }),
            (None, _) if self.named.is_empty() => Err(TargetError::DatabaseUnnamed { database, known }),
            (None, _) => Err(TargetError::DatabaseUnknown { database, known }),
        }
    }

    fn oids(&self) -> BTreeSet<u32> {
        self.named.iter().map(|database| database.oid).chain(self.with_files.iter().copied()).collect()
    }

    /// For people: the databases whose content is left out; none if there is none.
    pub(super) fn left_out(&self, wanted: Option<&BTreeSet<u32>>) -> Option<String> {
        let wanted = wanted?;
        let left_out = self.with_files.difference(wanted).copied().filter(|database| *database >= FIRST_OF_USERS);
        let left_out: BTreeSet<u32> = left_out.collect();
        (!left_out.is_empty()).then(|| self.told(&left_out))
    }

    fn told(&self, databases: &BTreeSet<u32>) -> String {
        let told = |oid: &u32| match self.named.iter().find(|database| database.oid == *oid) {
            Some(Database { name, .. }) => format!("{name} ({oid})"),
            None => oid.to_string(),
        };
        let told: Vec<String> = databases.iter().map(told).collect();
        told.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use repository::byte_text::ByteText;

    use super::*;

    #[test]
    fn databases_are_found_by_name_or_number() {
        let database = |oid, name: &str| Database { oid, name: ByteText::new(name) };
        let named =
            [database(5, "postgres"), database(16_390, "app"), database(16_391, "16390"), database(16_399, "new")];
        let with_files = BTreeSet::from([1, 5, 16_390, 16_391, 16_392]);
        let known = Known { named: &named, with_files: &with_files };
        let check = |asked: &[&str], expected: Result<&[u32], &str>| {
            let asked: Vec<String> = asked.iter().map(|one| (*one).to_owned()).collect();
            match (known.wanted(&asked), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found.unwrap_or_default(), expected.iter().copied().collect()),
                (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
                (found, _) => panic!("{asked:?}: {found:?}"),
            }
        };
        check(&[], Ok(&[]));
        check(&["app"], Ok(&[16_390]));
        check(&["16391", "5"], Ok(&[5, 16_391]));
        // It was dropped while the backup ran, or made; WAL says the rest.
        check(&["16392", "new"], Ok(&[16_392, 16_399]));
        check(&["16390"], Err("name of one database and the OID of another"));
        let all = "1, postgres (5), app (16390), 16390 (16391), 16392, new (16399)";
        check(&["ap"], Err(&format!("no database ap, it has {all}")));
        check(&["17000"], Err("no database 17000, it has 1, "));
        assert_eq!(known.left_out(None), None);
        assert_eq!(known.left_out(Some(&[16_391].into())).unwrap(), "app (16390), 16392");
        assert_eq!(known.left_out(Some(&[16_390, 16_391, 16_392].into())), None);
        let unnamed = Known { named: &[], with_files: &with_files };
        assert_eq!(unnamed.wanted(&["16390".to_owned()]).unwrap(), Some([16_390].into()));
        let error = unnamed.wanted(&["app".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("does not tell the names of its databases") && error.contains("1, 5, 16390"), "{error}");
    }
}
