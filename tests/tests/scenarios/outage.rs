//! The coordinator, the bucket, the host, the links: each away in its own way while a server writes, and back.
//!
//! The rule everywhere: what PostgreSQL was told is archived is in the stores with its bytes, `archive_command` does not
//! fail as long as one road is open, and afterwards every store holds everything once.

mod steps;
mod strained;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::account::{self, Scratch};
use tests::fleet::Store;
use tests::ledger::{self, Ledger};
use tests::postgres::Server;
use tests::program::Running;
use tests::proxy::Lane;
use tests::scenario::Stage;
use tests::world::{BUCKET, CLUSTER, CoordinatorLink, DIRECTORY, DirectRoad, Node, NodePlan, Stores, World};
use tests::{scenario, wait};

use crate::SMALL;

/// Announces what an outage rightly makes our processes say.
fn announce_outage(stage: &mut Stage) {
    for part in ["coordinator", "unavailable", "lagging", "road", "store", "direct", "session", "isolated", "strained"]
    {
        stage.announce(part, "a part of the installation is away in this scenario");
    }
}

/// A world with both stores and a primary under load.
struct Loaded {
    world: World,
    primary: Node,
    ledger: Ledger,
    load: Option<Running>,
}

impl Loaded {
    fn set_up(scratch: &Scratch, stores: Stores, plan: &NodePlan) -> Result<Self> {
        let world = World::started(scratch, stores)?;
        let server = Server::init(scratch, "db1", SMALL)?;
        let mut primary = world.node(scratch, server, plan)?;
        primary.server.start()?;
        let system = primary.server.system_identifier()?.to_string();
        world.operator.ok(&["cluster", "create", CLUSTER, "--system-identifier", &system])?;
        primary.agent.start()?;
        ledger::create(&primary.server)?;
        primary.server.pgbench_init(1)?;
        let ledger = Ledger::start(&primary.server, 50)?;
        let load = Some(primary.server.pgbench(200)?);
        ledger.advance(50)?;
        primary.archive_now()?;
        Ok(Self { world, primary, ledger, load })
    }

    /// Lets load run for some commits and waits until what was written by then is acknowledged.
    fn go_on(&self, commits: u64) -> Result<()> {
        self.ledger.advance(commits)?;
        self.primary.archive_now().map(|_| ())
    }

    /// Ends the load and checks every store and that `archive_command` never failed.
    fn end_whole(self) -> Result<()> {
        let primary = self.end()?;
        ensure!(primary.server.failed_count()? == 0, "archive_command failed");
        Ok(())
    }

    /// Ends the load and checks every store.
    fn end(self) -> Result<Node> {
        drop(self.load);
        self.ledger.stop();
        self.primary.archive_now()?;
        self.world.expect_whole(&[&self.primary], 1)?;
        Ok(self.primary)
    }
}

fn breakable() -> NodePlan {
    NodePlan { coordinator_link: CoordinatorLink::Breakable, ..NodePlan::default() }
}

#[test]
fn a_killed_coordinator_is_not_noticed() {
    scenario::play("outage-killed", |stage| {
        announce_outage(stage);
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        for _ in 0..2 {
            loaded.world.coordinator.kill()?;
            loaded.go_on(100)?;
            loaded.go_on(50)?;
            loaded.world.coordinator.start()?;
            loaded.go_on(50)?;
        }
        loaded.end_whole()
    });
}

#[test]
fn a_killed_agent_goes_on_where_it_was() {
    scenario::play("outage-agent", |stage| {
        announce_outage(stage);
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        for _ in 0..4 {
            loaded.ledger.advance(30)?;
            loaded.primary.agent.kill()?;
            loaded.ledger.advance(10)?;
            loaded.primary.agent.start()?;
        }
        loaded.go_on(20)?;
        loaded.end().map(|_| ())
    });
}

#[test]
fn a_frozen_coordinator_diverts_after_the_silence_patience() {
    scenario::play("outage-frozen", |stage| {
        announce_outage(stage);
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        loaded.world.coordinator.process()?.freeze()?;
        loaded.go_on(50)?;
        loaded.world.coordinator.process()?.thaw()?;
        loaded.go_on(50)?;
        loaded.end_whole()
    });
}

#[test]
fn a_destroyed_host_leaves_no_hole() {
    scenario::play("outage-destroyed", |stage| {
        announce_outage(stage);
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        // For a while only the host's own directory takes WAL; what it alone holds dies with it.
        let (world, primary) = (&mut loaded.world, &mut loaded.primary);
        world.coordinator_to_s3.as_mut().context("no link")?.refuse();
        loaded.ledger.advance(100)?;
        primary.archive_now()?;
        world.coordinator.kill()?;
        world.coordinator.delete_state()?;
        let directory = world.directory.clone().context("no directory")?;
        fs::remove_dir_all(&directory)?;
        loaded.go_on(50)?;
        // Everything acknowledged so far is in the bucket although the host never came back.
        let witness = loaded.primary.witness.clone();
        wait::until("the bucket has it all", Duration::from_secs(60), || {
            loaded.world.look(BUCKET)?.undamaged()?.every_acknowledged(&witness).map(|_| true)
        })?;
        loaded.world.coordinator_to_s3.as_mut().context("no link")?.open()?;
        stage.scratch.directory(DIRECTORY)?;
        loaded.world.coordinator.start()?;
        let system = loaded.primary.server.system_identifier()?.to_string();
        loaded.world.operator.ok(&["cluster", "create", CLUSTER, "--system-identifier", &system])?;
        loaded.go_on(50)?;
        loaded.end_whole()
    });
}

#[test]
fn a_bucket_that_is_away_does_not_delay_acknowledgements() {
    scenario::play("outage-bucket", |stage| {
        announce_outage(stage);
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        for lane in [None, Some(Lane::Silent)] {
            let link = loaded.world.coordinator_to_s3.as_mut().context("no link")?;
            match lane {
                None => link.refuse(),
                Some(lane) => link.set(lane, lane),
            }
            loaded.go_on(50)?;
            loaded.go_on(50)?;
            let link = loaded.world.coordinator_to_s3.as_mut().context("no link")?;
            link.cut();
            link.open()?;
            loaded.go_on(20)?;
        }
        loaded.end_whole()
    });
}

#[test]
fn both_away_holds_and_both_back_drains() {
    scenario::play("outage-both", |stage| {
        announce_outage(stage);
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        loaded.world.coordinator.kill()?;
        loaded.primary.to_s3.as_mut().context("no link")?.refuse();
        loaded.ledger.advance(20)?;
        // What was under way when both went is settled by now; from here on nothing may be acknowledged.
        let before = loaded.primary.acknowledged()?;
        loaded.primary.write_wal(3)?;
        loaded.ledger.advance(150)?;
        ensure!(loaded.primary.acknowledged()? == before, "acknowledged with both roads away");
        ensure!(!loaded.primary.server.ready_files()?.is_empty(), "nothing waits");
        loaded.primary.to_s3.as_mut().context("no link")?.open()?;
        loaded.go_on(20)?;
        loaded.world.coordinator.start()?;
        loaded.go_on(20)?;
        loaded.end().map(|_| ())
    });
}

#[test]
fn replies_lost_one_way_make_no_duplicates() {
    scenario::play("outage-replies", |stage| {
        announce_outage(stage);
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &breakable())?;
        // The coordinator stores and answers into the void; the node goes the other way with the same file.
        loaded.primary.to_coordinator.set(Lane::Open, Lane::Silent);
        loaded.go_on(50)?;
        loaded.primary.to_coordinator.cut();
        loaded.primary.to_coordinator.open()?;
        loaded.go_on(20)?;
        // The same on the way to the bucket, with the coordinator gone.
        loaded.world.coordinator.kill()?;
        let link = loaded.primary.to_s3.as_mut().context("no link")?;
        link.set(Lane::Open, Lane::Silent);
        loaded.ledger.advance(50)?;
        let link = loaded.primary.to_s3.as_mut().context("no link")?;
        link.cut();
        link.open()?;
        loaded.go_on(20)?;
        loaded.world.coordinator.start()?;
        loaded.go_on(20)?;
        loaded.end().map(|_| ())
    });
}

#[test]
fn a_full_directory_diverts_nodes_to_the_bucket() {
    scenario::play("outage-full", |stage| {
        announce_outage(stage);
        stage.announce("full", "the directory is nearly full in this scenario");
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        let spacious = loaded.world.setup.clone();
        let mut tight = spacious.clone();
        tight.stores[0] = Store { settings: "full_percent = 1\n".into(), ..tight.stores[0].clone() };
        loaded.world.coordinator.configure(&tight)?;
        loaded.world.coordinator.stop()?;
        loaded.world.coordinator.start()?;
        // Starting again took a moment in which files may still have come by the old way.
        loaded.go_on(20)?;
        let before = loaded.world.look(DIRECTORY)?.segments(1);
        loaded.go_on(50)?;
        ensure!(loaded.world.look(DIRECTORY)?.segments(1) == before, "a full directory took a segment");
        loaded.world.look(BUCKET)?.undamaged()?.every_acknowledged(&loaded.primary.witness)?;
        loaded.world.coordinator.configure(&spacious)?;
        loaded.world.coordinator.stop()?;
        loaded.world.coordinator.start()?;
        loaded.go_on(20)?;
        loaded.end_whole()
    });
}

#[test]
fn an_unmounted_directory_is_refused_and_not_written_to() {
    scenario::play("outage-unmounted", |stage| {
        announce_outage(stage);
        stage.announce("repo.json", "the directory is unmounted in this scenario");
        stage.announce("refused", "the directory is unmounted in this scenario");
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        let directory = loaded.world.directory.clone().context("no directory")?;
        let away = directory.with_extension("away");
        for restart in [false, true] {
            fs::rename(&directory, &away)?;
            // An empty mount point is what remains.
            stage.scratch.directory(DIRECTORY)?;
            if restart {
                loaded.world.coordinator.kill()?;
                loaded.world.coordinator.start()?;
            }
            loaded.go_on(50)?;
            ensure!(
                fs::read_dir(&directory)?.flatten().all(|entry| entry.file_name().to_string_lossy().starts_with('.')),
                "something was written into an empty mount point"
            );
            fs::remove_dir_all(&directory)?;
            fs::rename(&away, &directory)?;
            loaded.go_on(20)?;
        }
        loaded.end_whole()
    });
}

#[test]
fn without_a_direct_road_a_dead_coordinator_is_waited_for() {
    scenario::play("outage-nodirect", |stage| {
        announce_outage(stage);
        let plan = NodePlan { direct: DirectRoad::None, ..NodePlan::default() };
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Directory, &plan)?;
        loaded.world.coordinator.kill()?;
        loaded.ledger.advance(20)?;
        let before = loaded.primary.acknowledged()?;
        loaded.primary.write_wal(3)?;
        loaded.ledger.advance(100)?;
        ensure!(loaded.primary.acknowledged()? == before, "acknowledged with the only road away");
        loaded.world.coordinator.start()?;
        loaded.go_on(20)?;
        loaded.end().map(|_| ())
    });
}

/// The directory of a hung mount is imitated by a frozen file system; that needs root and loop devices.
#[test]
fn a_hung_directory_does_not_hold_what_the_bucket_can_take() {
    scenario::play("outage-hung", |stage| {
        announce_outage(stage);
        let Some(mut frozen) = FrozenMount::set_up(&stage.scratch)? else {
            stage.leave_out("a hung directory", "root, mkfs.ext4, loop devices and a file system that can be frozen");
            return Ok(());
        };
        let loaded = Loaded::set_up(&stage.scratch, Stores::Both, &NodePlan::default())?;
        frozen.freeze()?;
        loaded.go_on(50)?;
        loaded.go_on(50)?;
        frozen.thaw()?;
        loaded.go_on(20)?;
        let primary = loaded.end()?;
        ensure!(primary.server.failed_count()? == 0, "archive_command failed");
        drop(primary);
        Ok(())
    });
}

/// A small ext4 in a file, mounted where the directory store will be; thawed and unmounted on drop.
struct FrozenMount {
    path: std::path::PathBuf,
    frozen: bool,
}

impl FrozenMount {
    fn set_up(scratch: &Scratch) -> Result<Option<Self>> {
        if account::account().is_none() {
            return Ok(None);
        }
        let image = scratch.write("image", "")?;
        fs::File::options().write(true).open(&image)?.set_len(512 << 20)?;
        let path = scratch.directory(DIRECTORY)?;
        let image = image.display().to_string();
        let made = root_command("mkfs.ext4", &["-q", "-F", &image]) && {
            let shown = path.display().to_string();
            root_command("mount", &["-o", "loop", &image, &shown])
        };
        if !made {
            return Ok(None);
        }
        let mut mount = Self { path, frozen: false };
        // Where it may not be frozen nothing can be imitated.
        if mount.freeze().is_err() {
            return Ok(None);
        }
        mount.thaw()?;
        let path = &mount.path;
        account::give(path)?;
        // Not an object: the file system's own directory.
        let _ = fs::remove_dir(path.join("lost+found"));
        Ok(Some(mount))
    }

    fn freeze(&mut self) -> Result<()> {
        ensure!(root_command("fsfreeze", &["--freeze", &self.path.display().to_string()]), "cannot freeze");
        self.frozen = true;
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        ensure!(root_command("fsfreeze", &["--unfreeze", &self.path.display().to_string()]), "cannot thaw");
        self.frozen = false;
        Ok(())
    }
}

impl Drop for FrozenMount {
    fn drop(&mut self) {
        if self.frozen {
            let _ = self.thaw();
        }
        root_command("umount", &["--lazy", &self.path.display().to_string()]);
    }
}

/// Runs a command as root; whether it exited 0.
pub(crate) fn root_command(program: &str, arguments: &[&str]) -> bool {
    let status = std::process::Command::new(program)
        .args(arguments)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}
