//! Whether another user may read a file: the one that PostgreSQL will run as, while a restore is run by root.
//!
//! The permission bits of the file and of every directory above it decide, for the user, all its groups and everyone. Where
//! an access control list says more than the bits do, it is not judged, and the answer is yes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::target::Owner;

/// Largest table of groups read, in bytes.
const GROUPS_BYTES_MAX: usize = 16 << 20;
/// Where the kernel keeps an access control list.
const ACCESS_LIST: &str = "system.posix_acl_access";

/// What a user wants of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read a file.
    Read,
    /// To run a program.
    Run,
    /// To go through a directory.
    Enter,
}

impl Access {
    /// The bit for everyone.
    fn bit(self) -> u32 {
        match self {
            Self::Read => 0o4,
            Self::Run | Self::Enter => 0o1,
        }
    }
}

/// A user with all its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reader {
    user: u32,
    groups: Vec<u32>,
}

impl Reader {
    /// The user of this host that owns what is restored.
    pub fn of(owner: Owner) -> Self {
        let table = |path: &str| fs::read_to_string(path).ok().filter(|text| text.len() <= GROUPS_BYTES_MAX);
        let (passwd, group) = (table("/etc/passwd").unwrap_or_default(), table("/etc/group").unwrap_or_default());
        Self { user: owner.user, groups: groups_of(owner, &passwd, &group) }
    }

    /// The first part of the path that stands against it; none if it is allowed.
    ///
    /// # Errors
    /// When the path cannot be looked at.
    pub fn obstacle(&self, path: &Path, wanted: Access) -> io::Result<Option<PathBuf>> {
        let path = fs::canonicalize(path)?;
        let parents = path.ancestors().skip(1).map(|parent| (parent, Access::Enter));
        for (place, wanted) in parents.collect::<Vec<_>>().into_iter().rev().chain([(path.as_path(), wanted)]) {
            let found = fs::metadata(place)?;
            if !self.may(wanted, (found.uid(), found.gid(), found.mode())) && !has_access_list(place) {
                return Ok(Some(place.to_owned()));
            }
        }
        Ok(None)
    }

    /// As the kernel decides by owner, group and permission bits: the first class that fits is the only one that counts.
    fn may(&self, wanted: Access, (user, group, mode): (u32, u32, u32)) -> bool {
        let class = match () {
            () if self.user == 0 => return true,
            () if self.user == user => 6,
            () if self.groups.contains(&group) => 3,
            () => 0,
        };
        (mode >> class) & wanted.bit() != 0
    }
}

/// Group numbers of a user: its own one and those that list its name.
fn groups_of(owner: Owner, passwd: &str, group: &str) -> Vec<u32> {
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(owner.user)).then_some(name)
    });
    let listed = group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let number = fields.nth(2)?.parse().ok()?;
        fields.next()?.split(',').any(|member| Some(member) == name).then_some(number)
    });
    std::iter::once(owner.group).chain(listed).collect()
}

fn has_access_list(path: &Path) -> bool {
    // A list is longer than nothing; what does not fit into so little is an error that says it is there.
    !matches!(
        rustix::fs::getxattr(path, ACCESS_LIST, &mut [0_u8; 1]),
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) | Ok(0)
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const OWNER: Owner = Owner { user: 101, group: 104 };

    #[test]
    fn groups_are_those_of_both_tables() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgres:x:101:104::/:/bin/sh\n";
        let group = "root:x:0:\nssl-cert:x:107:postgres,www\npostgres:x:104:\nother:x:108:postgresql\nbroken\n";
        assert_eq!(groups_of(OWNER, passwd, group), [104, 107]);
        assert_eq!(groups_of(OWNER, "", group), [104]);
    }

    #[test]
    fn the_first_class_that_fits_decides() {
        let reader = Reader { user: 101, groups: vec![104, 107] };
        let may = |user, group, mode| reader.may(Access::Read, (user, group, mode));
        assert!(may(0, 0, 0o604) && may(0, 107, 0o640) && may(101, 0, 0o400));
        assert!(!may(0, 0, 0o640) && !may(0, 104, 0o604) && !may(101, 104, 0o044));
        assert!(reader.may(Access::Run, (0, 0, 0o755)) && !reader.may(Access::Enter, (0, 0, 0o700)));
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("inner/stores.toml");
        fs::create_dir(folder.path().join("inner")).unwrap();
        fs::write(&file, "").unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let stranger = Reader { user: 4_000_000, groups: vec![4_000_000] };
        let obstacle = || stranger.obstacle(&file, Access::Read).unwrap();
        set(folder.path(), 0o755);
        set(&folder.path().join("inner"), 0o755);
        set(&file, 0o644);
        assert_eq!(obstacle(), None);
        set(&file, 0o600);
        assert_eq!(obstacle(), Some(fs::canonicalize(&file).unwrap()));
        set(&folder.path().join("inner"), 0o700);
        assert_eq!(obstacle(), Some(fs::canonicalize(folder.path().join("inner")).unwrap()));
        assert!(stranger.obstacle(&folder.path().join("none"), Access::Read).is_err());
    }
}
