//! The one table of exit codes, shared by all programs and by their manual pages.
//!
//! PostgreSQL reads some of them: an `archive_command` above 125 ends the archiver process without counting a failure,
//! so `pgconvoy-wal push` answers only [`Exit::Ok`] or [`Exit::Negative`]; a `restore_command` between 1 and 125 means
//! "no such file", which ends archive recovery and promotes, so `fetch` answers [`Exit::Unknown`] for whatever it does
//! not know (`RestoreArchivedFile` in `xlogarchive.c`).

use std::{fmt, process::ExitCode};

/// How a program of ours ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Exit {
    /// Everything asked for was done.
    Ok = 0,
    /// A definite no: the file is not in the archive, a check found something, the push failed.
    Negative = 1,
    /// The command line was not understood.
    Usage = 2,
    /// The configuration is missing or wrong.
    Config = 3,
    /// Agent, coordinator or every store could not be reached.
    Unreachable = 4,
    /// Someone said no: identity, authentication, a plan that cannot work.
    Refused = 5,
    /// One name, two contents; an operator must choose.
    Conflict = 6,
    /// A store failed or holds damaged bytes.
    Store = 7,
    /// The PostgreSQL server failed or refused.
    Postgres = 8,
    /// A deadline passed; what was asked for may still happen.
    Timeout = 9,
    /// Some of it was done.
    Partial = 10,
    /// Not known; only `fetch` answers this, so that PostgreSQL stops instead of promoting early.
    Unknown = 255,
}

impl Exit {
    /// Every code with its meaning, in order; the manual pages print this.
    pub const TABLE: [(Self, &'static str); 12] = [
        (Self::Ok, "done"),
        (Self::Negative, "a definite no: not in the archive, a check failed, a push failed"),
        (Self::Usage, "the command line was not understood"),
        (Self::Config, "the configuration is missing or wrong"),
        (Self::Unreachable, "agent, coordinator or every store could not be reached"),
        (Self::Refused, "refused: identity, authentication, or a plan that cannot work"),
        (Self::Conflict, "one name, two contents; an operator must choose"),
        (Self::Store, "a store failed or holds damaged bytes"),
        (Self::Postgres, "the PostgreSQL server failed or refused"),
        (Self::Timeout, "a deadline passed; what was asked for may still happen"),
        (Self::Partial, "some of it was done"),
        (Self::Unknown, "not known; only fetch answers this, so that PostgreSQL stops instead of promoting early"),
    ];

    /// The number the operating system sees.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The meaning of a number, if it is one of ours.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::TABLE.iter().map(|(exit, _)| *exit).find(|exit| exit.code() == code)
    }

    /// What the code means, for people.
    pub fn meaning(self) -> &'static str {
        Self::TABLE.iter().find(|(exit, _)| *exit == self).map_or("", |(_, meaning)| meaning)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.code(), self.meaning())
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_complete_and_ordered() {
        let codes: Vec<u8> = Exit::TABLE.iter().map(|(exit, _)| exit.code()).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255]);
        for (exit, meaning) in Exit::TABLE {
            assert_eq!(Exit::from_code(exit.code()), Some(exit));
            assert_eq!(exit.meaning(), meaning);
        }
        assert_eq!(Exit::from_code(11), None);
    }
}
