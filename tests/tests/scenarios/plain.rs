//! PostgreSQL by itself, archiving with `cp`: what the harness and its ledger are worth, and what a `restore_command`
//! that calls an outage "absent" does to a recovery.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::account::Scratch;
use tests::ledger::{self, Ledger, Moment};
use tests::postgres::{Server, Stop};
use tests::{account, scenario, wait};

use crate::SMALL;

/// A primary that archives to a directory with `cp`, with a base copy of it and a ledger that went on after the copy.
struct Archived {
    primary: Server,
    archive: PathBuf,
    base: PathBuf,
    moments: Vec<Moment>,
}

impl Archived {
    fn set_up(scratch: &Scratch) -> Result<Self> {
        let archive = scratch.directory("archive")?;
        let mut primary = Server::init(scratch, "primary", SMALL)?;
        let command = format!("'test ! -f {0}/%f && cp %p {0}/%f'", archive.display());
        primary.configure(&[("archive_mode", "on"), ("archive_command", &command)])?;
        primary.start()?;
        ledger::create(&primary)?;
        let base = primary.copy(scratch, "base")?.data().to_owned();
        let ledger = Ledger::start(&primary, 200)?;
        // Several segments, each ending with commits of its own.
        for _ in 0..5 {
            ledger.advance(60)?;
            primary.switch_wal()?;
        }
        ledger.advance(60)?;
        let moments = ledger.stop();
        primary.switch_wal()?;
        primary.wait_archived(0, Duration::from_secs(30))?;
        Ok(Self { primary, archive, base, moments })
    }

    /// Recovers a copy of the base with this `restore_command` and further settings until it ends recovery.
    fn recover(&self, scratch: &Scratch, name: &str, restore: &str, settings: &[(&str, &str)]) -> Result<Server> {
        let data = scratch.path().join(format!("{name}-data"));
        copy_tree(&self.base, &data)?;
        let mut server = Server::at(scratch, name, data)?;
        server.own_socket()?;
        server.configure(&[("archive_mode", "off"), ("restore_command", &format!("'{restore}'"))])?;
        server.configure(settings)?;
        account::write_owned(&server.data().join("recovery.signal"), "")?;
        server.start()?;
        server.wait_promoted(Duration::from_secs(60))?;
        Ok(server)
    }
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let mut cp = account::command("/bin/cp");
    cp.arg("-a").arg(from).arg(to);
    tests::program::run(cp, Duration::from_secs(60))?.ok().map(|_| ())
}

#[test]
fn a_moment_of_the_ledger_is_what_a_recovery_to_it_finds() {
    scenario::play("plain-moment", |stage| {
        let archived = Archived::set_up(&stage.scratch)?;
        let fetch = format!("cp {}/%f %p", archived.archive.display());
        let moment = &archived.moments[archived.moments.len() / 2];
        let target =
            [("recovery_target_lsn", format!("'{}'", moment.lsn)), ("recovery_target_action", "'promote'".into())];
        let target: Vec<(&str, &str)> = target.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let by_lsn = archived.recover(&stage.scratch, "by-lsn", &fetch, &target)?;
        ledger::expect_moment(&by_lsn, moment)?;
        let time = format!("'{}'", moment.time);
        let target = [("recovery_target_time", time.as_str()), ("recovery_target_action", "'promote'")];
        let by_time = archived.recover(&stage.scratch, "by-time", &fetch, &target)?;
        ledger::expect_moment(&by_time, moment)
    });
}

/// The experiment behind promise 4: an outage reported as exit code 1 ends recovery early, and the server opens for
/// business without commits that the archive holds.
#[test]
fn an_outage_told_as_exit_code_one_promotes_short() {
    scenario::play("plain-short", |stage| {
        let archived = Archived::set_up(&stage.scratch)?;
        let last = archived.moments.last().expect("the ledger moved").commits;
        // Three segments come, then the storage is "away".
        let counter = stage.scratch.directory("counter")?;
        let fetch = format!(
            "test $(ls {0} | wc -l) -lt 3 || exit 1; case %f in *.history) exit 1;; esac; cp {1}/%f %p && touch {0}/%f",
            counter.display(),
            archived.archive.display()
        );
        let short = archived.recover(&stage.scratch, "short", &fetch, &[])?;
        let held = ledger::holding(&short)?.commits;
        ensure!(held < last, "the recovery got {held} of {last} commits; the experiment shows nothing");
        Ok(())
    });
}

#[test]
fn a_standby_follows_is_promoted_and_servers_die_with_their_owner() {
    scenario::play("plain-standby", |stage| {
        let mut archived = Archived::set_up(&stage.scratch)?;
        let mut standby = archived.primary.standby(&stage.scratch, "standby")?;
        standby.start()?;
        let held = ledger::holding(&archived.primary)?;
        wait::until("the standby has it all", Duration::from_secs(20), || Ok(ledger::holding(&standby)? == held))?;
        archived.primary.kill()?;
        ensure!(!archived.primary.is_running());
        standby.ask_promotion()?;
        standby.wait_promoted(Duration::from_secs(20))?;
        standby.stop(Stop::Fast)
    });
}
