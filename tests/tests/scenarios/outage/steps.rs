//! Killed at every named step between two durable effects, and started again: nothing acknowledged is lost, nothing half
//! is visible, and the next one works.
//!
//! [`STEPS`] names every crash point of the sources with the way on which it is passed, but for those of expiries,
//! restores and stores that are set back, which their own rooms play. A point of the sources without a
//! step fails, and so does a step whose point is not reached.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::account::Scratch;
use tests::fleet::Operator;
use tests::ledger;
use tests::program::{Farewell, Running, read_log};
use tests::scenario::{self, Stage};
use tests::world::{BUCKET, CLUSTER, NodePlan, Stores};
use tests::{repository_check, wait};

use super::{Loaded, announce_outage};
use crate::{expire, hybrid, restore, rollback};

/// Longest wait for a crash point to be reached.
const CRASH_PATIENCE: Duration = Duration::from_secs(60);
/// Time between two finished segments while WAL is what leads to the point.
const SWITCH_EVERY: Duration = Duration::from_millis(250);
/// Longest wait until every store holds what one of them does.
const SPREAD_PATIENCE: Duration = Duration::from_secs(90);
/// Longest run of a backup whose coordinator was killed and is back.
const BACKUP_PATIENCE: Duration = Duration::from_secs(120);
/// Another cluster, without any node.
const OTHER_CLUSTER: &str = "other";
/// System identifier of that one.
const OTHER_SYSTEM: &str = "7300000000000000001";

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Party {
    Agent,
    Coordinator,
}

/// What leads past a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// WAL through the coordinator.
    Wal,
    /// The same while the coordinator does not reach the bucket, so that the agent keeps copies.
    KeptCopy,
    /// Those copies sent to the bucket, the coordinator being dead.
    Resend,
    /// The coordinator's return to a bucket that WAL came to meanwhile.
    Adoption,
    /// A cluster created.
    Creation,
    /// The catalog rebuilt.
    Rebuild,
    /// A backup through the coordinator.
    Backup,
    /// A backup straight into the bucket, the coordinator being away.
    BackupAlone,
    /// The coordinator's return to a bucket that a backup came to meanwhile.
    BackupCopy,
}

impl Way {
    fn is_of_backups(self) -> bool {
        matches!(self, Self::Backup | Self::BackupAlone | Self::BackupCopy)
    }
}

/// Every crash point, by who passes it and on which way.
const STEPS: &[(Party, Way, &[&str])] = &[
    (Party::Agent, Way::Wal, &["agent/after-store-before-answer", "agent/after-answer-before-ledger"]),
    (Party::Agent, Way::KeptCopy, &["agent/after-retain-before-ack"]),
    (Party::Agent, Way::Resend, &["agent/during-resend"]),
    (
        Party::Coordinator,
        Way::Wal,
        &["coordinator/after-first-store-before-second", "coordinator/after-store-before-catalog"],
    ),
    (Party::Coordinator, Way::Adoption, &["coordinator/after-adoption-copy-before-catalog"]),
    (Party::Coordinator, Way::Creation, &["coordinator/after-identity-before-root"]),
    (Party::Coordinator, Way::Rebuild, &["coordinator/after-gathering-before-catalog"]),
    (
        Party::Agent,
        Way::Backup,
        &[
            "agent/after-backup-start-before-packs",
            "agent/after-pack-before-next",
            "agent/after-packs-before-backup-stop",
            "agent/after-backup-stop-before-manifest",
            "agent/after-manifest-before-publication",
            "agent/after-publication-before-answer",
        ],
    ),
    (Party::Agent, Way::BackupAlone, &["agent/after-parts-before-backup-root"]),
    (
        Party::Coordinator,
        Way::Backup,
        &["coordinator/after-parts-before-backup-root", "coordinator/after-backup-root-before-catalog"],
    ),
    (Party::Coordinator, Way::BackupCopy, &["coordinator/after-manifest-copy-before-root"]),
];

/// Names of the crash points in the sources of our programs.
fn in_the_sources() -> Result<Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no workspace")?;
    let mut names = Vec::new();
    let mut todo: Vec<_> =
        ["agent/src", "coordinator/src", "crates/cli/src", "crates/repository/src"].map(|room| root.join(room)).into();
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            for part in fs::read_to_string(&path)?.split("crash_point!(\"").skip(1) {
                names.extend(part.split('"').next().map(str::to_owned));
            }
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}

#[test]
fn every_crash_point_has_its_step() {
    let mut named: Vec<&str> = STEPS.iter().flat_map(|(_, _, points)| points.iter().copied()).collect();
    named.extend(expire::STEPS);
    named.extend(hybrid::STEPS);
    named.extend(restore::STEPS);
    named.extend(rollback::STEPS);
    named.sort_unstable();
    named.dedup();
    assert_eq!(in_the_sources().unwrap(), named);
}

#[test]
fn a_crash_at_any_step_of_the_agent_loses_nothing() {
    play("steps-agent", |party, way| party == Party::Agent && !way.is_of_backups());
}

#[test]
fn a_crash_at_any_step_of_the_coordinator_loses_nothing() {
    play("steps-coordinator", |party, way| party == Party::Coordinator && !way.is_of_backups());
}

#[test]
fn an_agent_killed_at_any_step_of_a_backup_leaves_none_or_a_whole_one() {
    play("steps-backup-agent", |party, way| party == Party::Agent && way == Way::Backup);
}

#[test]
fn an_agent_killed_at_any_step_of_a_backup_of_its_own_leaves_none_or_a_whole_one() {
    play("steps-backup-alone", |party, way| party == Party::Agent && way == Way::BackupAlone);
}

#[test]
fn a_coordinator_killed_at_any_step_of_a_backup_leaves_none_or_a_whole_one() {
    play("steps-backup-coord", |party, way| party == Party::Coordinator && way.is_of_backups());
}

/// Plays all chosen steps in one world after another.
fn play(name: &str, chosen: fn(Party, Way) -> bool) {
    scenario::play(name, |stage| {
        announce(stage);
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        if STEPS.iter().any(|(party, way, _)| chosen(*party, *way) && way.is_of_backups()) {
            // The ledger is load enough: every store is read whole after each step.
            loaded.load = None;
        }
        let address = loaded.world.coordinator.address();
        let seat = Operator::set_up(&stage.scratch, "seat", Some(address), &[], Some(&loaded.primary.agent))?;
        let mut play = Play { scratch: &stage.scratch, loaded, seat, played: 0 };
        for (party, way, points) in STEPS.iter().filter(|(party, way, _)| chosen(*party, *way)) {
            for point in *points {
                let start = Instant::now();
                play.step(*party, *way, point).with_context(|| format!("{way:?} with {party:?} killed at {point}"))?;
                println!("{point}: {:.1} s", start.elapsed().as_secs_f64());
            }
        }
        ensure!(play.played > 0, "no step was played");
        match chosen(Party::Coordinator, Way::Wal) || chosen(Party::Coordinator, Way::Backup) {
            // Only the agent's own death may make `archive_command` fail.
            true => play.loaded.end_whole(),
            false => play.loaded.end().map(|_| ()),
        }
    });
}

fn announce(stage: &mut Stage) {
    announce_outage(stage);
    for part in ["backup", "operation"] {
        stage.announce(part, "backups are interrupted in this scenario");
    }
}

struct Play<'a> {
    scratch: &'a Scratch,
    loaded: Loaded,
    /// Reaches the agent's socket.
    seat: Operator,
    played: usize,
}

impl Play<'_> {
    /// Kills one party at one point, starts it again, and judges.
    fn step(&mut self, party: Party, way: Way, point: &str) -> Result<()> {
        self.played += 1;
        match way {
            Way::Wal => self.arm(party, point)?,
            Way::KeptCopy => {
                self.coordinator_to_bucket(Link::Cut)?;
                self.arm(party, point)?;
            }
            Way::Resend => {
                self.coordinator_to_bucket(Link::Cut)?;
                self.loaded.go_on(5)?;
                self.loaded.world.coordinator.kill()?;
                self.arm(party, point)?;
            }
            Way::Adoption => {
                self.loaded.world.coordinator.kill()?;
                self.loaded.go_on(5)?;
                self.arm(party, point)?;
            }
            Way::Creation => self.arm_for_command(party, point, &CREATION)?,
            Way::Rebuild => self.arm_for_command(party, point, &REBUILD)?,
            Way::Backup => {
                self.arm(party, point)?;
                self.on_the_coordinators_road()?;
            }
            Way::BackupAlone => {
                self.loaded.world.coordinator.kill()?;
                self.arm(party, point)?;
                // Until WAL has found the other way, a backup would begin on this one.
                self.loaded.go_on(5)?;
            }
            Way::BackupCopy => {
                self.loaded.world.coordinator.kill()?;
                self.loaded.go_on(5)?;
                self.seat.ok(&BACKUP)?;
                self.arm(party, point)?;
            }
        }
        let backup = matches!(way, Way::Backup | Way::BackupAlone).then(|| self.backup_in_background()).transpose()?;
        self.wait_crashed(party, point)?;
        match party {
            Party::Agent => self.loaded.primary.agent.start()?,
            Party::Coordinator => self.loaded.world.coordinator.start()?,
        }
        if let Some(backup) = backup {
            Self::end_of_backup(backup, party)?;
        }
        self.judge(way)
    }

    /// Starts one party again with an armed point. It may reach it before it is up.
    fn arm(&mut self, party: Party, point: &str) -> Result<()> {
        let started = match party {
            Party::Agent => {
                self.loaded.primary.agent.kill()?;
                self.loaded.primary.agent.start_crashing_at(point)
            }
            Party::Coordinator => {
                let coordinator = &mut self.loaded.world.coordinator;
                if coordinator.is_running() {
                    coordinator.kill()?;
                }
                coordinator.start_crashing_at(point)
            }
        };
        started.or_else(|error| if self.has_crashed(party, point) { Ok(()) } else { Err(error) })
    }

    /// As [`Play::arm`], and runs the operator's command that leads to the point, which must notice.
    fn arm_for_command(&mut self, party: Party, point: &str, command: &[&str]) -> Result<()> {
        self.arm(party, point)?;
        let said = self.loaded.world.operator.run(command)?;
        ensure!(said.code != Some(0), "the command did not notice: {said:?}");
        Ok(())
    }

    fn has_crashed(&self, party: Party, point: &str) -> bool {
        let log = match party {
            Party::Agent => self.loaded.primary.agent.log_path(),
            Party::Coordinator => self.loaded.world.coordinator.log_path(),
        };
        read_log(log).lines().any(|line| line.contains("crash point reached") && line.contains(point))
    }

    /// Finishes segments until the point is reached, for whichever way needs them.
    fn wait_crashed(&mut self, party: Party, point: &str) -> Result<()> {
        let start = Instant::now();
        while !self.has_crashed(party, point) {
            ensure!(start.elapsed() < CRASH_PATIENCE, "{point} was not reached");
            self.loaded.primary.server.switch_wal()?;
            wait::pause(SWITCH_EVERY);
        }
        let process = match party {
            Party::Agent => self.loaded.primary.agent.process(),
            Party::Coordinator => self.loaded.world.coordinator.process(),
        };
        // There is none when it crashed before it was up.
        process.map_or(Ok(()), |process| process.wait_ended(Duration::from_secs(10)).map(|_| ()))
    }

    fn coordinator_to_bucket(&mut self, link: Link) -> Result<()> {
        let proxy = self.loaded.world.coordinator_to_s3.as_mut().context("no link")?;
        match link {
            Link::Cut => proxy.refuse(),
            Link::Open => proxy.open()?,
        }
        Ok(())
    }

    fn on_the_coordinators_road(&self) -> Result<()> {
        wait::until("WAL goes through the coordinator", Duration::from_secs(60), || {
            let info = self.loaded.world.operator.json(&["info", CLUSTER])?;
            let node = &info["clusters"][0]["fleet"]["nodes"][0];
            Ok(node["connected"] == true && node["road"] == "coordinator")
        })
        .map(|_| ())
    }

    fn backup_in_background(&self) -> Result<Running> {
        let log = self.scratch.path().join(format!("backup{}.log", self.played));
        Running::start("backup", self.seat.command(&BACKUP)?, &log, Farewell::Kill)
    }

    /// A killed agent takes its backup along; a coordinator that comes back does not.
    fn end_of_backup(mut backup: Running, killed: Party) -> Result<()> {
        let status = backup.wait_ended(BACKUP_PATIENCE)?;
        ensure!(
            status.success() == (killed == Party::Coordinator),
            "the command ended with {status}: {}",
            backup.log()
        );
        Ok(())
    }

    fn judge(&mut self, way: Way) -> Result<()> {
        match way {
            Way::Wal | Way::Adoption => self.loaded.go_on(5),
            Way::KeptCopy => {
                self.coordinator_to_bucket(Link::Open)?;
                self.loaded.go_on(5)
            }
            Way::Resend => {
                // Without the coordinator: what it had taken alone must come from the spool.
                self.loaded.go_on(5)?;
                self.bucket_has_all()?;
                self.coordinator_to_bucket(Link::Open)?;
                self.loaded.world.coordinator.start()?;
                self.loaded.go_on(5)
            }
            Way::Creation => {
                self.loaded.world.operator.ok(&CREATION)?;
                for store in &self.loaded.world.stores {
                    ensure!(
                        repository_check::look(store, OTHER_CLUSTER)?.root()?.is_some(),
                        "{} knows nothing",
                        store.name
                    );
                }
                self.loaded.go_on(5)
            }
            Way::Rebuild => {
                self.loaded.world.operator.ok(&REBUILD)?;
                self.loaded.go_on(5)
            }
            Way::Backup | Way::BackupAlone | Way::BackupCopy => self.judge_backups(way),
        }
    }

    fn bucket_has_all(&self) -> Result<()> {
        let acknowledged = self.loaded.primary.acknowledged()?;
        wait::until("the bucket has what was acknowledged", SPREAD_PATIENCE, || {
            let holdings = self.loaded.world.look(BUCKET)?;
            holdings.undamaged()?.acknowledged(&self.loaded.primary.witness, &acknowledged).map(|_| true)
        })
        .map(|_| ())
    }

    /// Whatever a store names is whole now; the next backup works, spreads and is restored.
    fn judge_backups(&mut self, way: Way) -> Result<()> {
        let segment_bytes = self.loaded.primary.segment_bytes()?;
        for store in &self.loaded.world.stores {
            // More than once only because a listing that a publication overtakes is no state of the store.
            wait::until("every backup that is named is whole", Duration::from_secs(1), || {
                repository_check::look(store, CLUSTER)?.undamaged()?.backups(segment_bytes).map(|_| true)
            })?;
        }
        if way == Way::BackupAlone {
            self.loaded.go_on(5)?;
            self.seat.ok(&BACKUP)?;
            self.loaded.world.coordinator.start()?;
        }
        self.on_the_coordinators_road()?;
        self.seat.ok(&BACKUP)?;
        let newest = self.newest_backup_everywhere(segment_bytes)?;
        let moment = self.loaded.ledger.advance(5)?;
        self.loaded.go_on(5)?;
        let name = format!("r{}", self.played);
        let wanted = ["--backup", &newest, "--target-lsn", &moment.lsn];
        let restored = self.loaded.world.restored(self.scratch, &name, &wanted)?;
        ledger::expect_moment(&restored, &moment)?;
        let data = restored.data().to_owned();
        drop(restored);
        Ok(fs::remove_dir_all(data)?)
    }

    /// The newest backup, once every store names it and the same others.
    fn newest_backup_everywhere(&self, segment_bytes: u64) -> Result<String> {
        let mut newest = None;
        wait::until("every store names the same backups", SPREAD_PATIENCE, || {
            newest = self.loaded.world.backups(segment_bytes)?.into_iter().max();
            Ok(true)
        })?;
        newest.context("no backup")
    }
}

/// The coordinator's way to the bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Open,
    Cut,
}

const BACKUP: [&str; 4] = ["backup", CLUSTER, "--here", "--start-fast"];
const REBUILD: [&str; 1] = ["rebuild"];
const CREATION: [&str; 5] = ["cluster", "create", OTHER_CLUSTER, "--system-identifier", OTHER_SYSTEM];
