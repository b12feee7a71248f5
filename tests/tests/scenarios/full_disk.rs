//! Disks that are full: a node's own while it takes a backup, and the one that a backup is restored to.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::account;
use tests::scenario::{self, Stage};
use tests::wait;
use tests::world::{CLUSTER, DIRECTORY, Stores, World, start_restored};

use crate::SMALL;
use crate::increment::{change, dump, expect_restorable, expect_sound, fill, take};
use crate::outage::root_command;

const SEGMENT_BYTES: u64 = 1 << 20;

/// A small file system in memory; unmounted on drop.
struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Mounted over a directory that is there; `None` where this machine does not let us.
    fn mount(stage: &Stage, path: &Path, mebibytes: u32) -> Result<Option<Self>> {
        let shown = path.display().to_string();
        let size = format!("size={mebibytes}m,mode=0700");
        if account::account().is_none() || !root_command("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &shown]) {
            stage.leave_out("a full disk", "root and mounts");
            return Ok(None);
        }
        account::give(path)?;
        Ok(Some(Self { path: path.to_owned() }))
    }

    fn resize(&self, mebibytes: u32) -> Result<()> {
        let options = format!("remount,size={mebibytes}m,mode=0700");
        ensure!(root_command("mount", &["-o", &options, &self.path.display().to_string()]), "cannot be remounted");
        account::give(&self.path)
    }

    /// A file that leaves no room for anything.
    fn stuff(&self) -> Result<PathBuf> {
        use std::io::Write;
        let path = self.path.join("stuffing");
        let mut file = fs::File::create(&path)?;
        while file.write_all(&[7; 4096]).is_ok() {}
        Ok(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        root_command("umount", &["--lazy", &self.path.display().to_string()]);
    }
}

#[test]
fn a_node_without_room_says_where_and_its_backup_goes_on_when_there_is_some() {
    scenario::play("full-node", |stage| {
        for part in ["backup", "operation", "spool", "No space", "agent"] {
            stage.announce(part, "the disk of the node's spool is full in this scenario");
        }
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let spool = stage.scratch.directory("db1-spool")?;
        let Some(disk) = Disk::mount(stage, &spool, 24)? else { return Ok(()) };
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let first = take(&world, &primary, &[])?;
        change(&primary.server, 1)?;
        let stuffing = disk.stuff()?;
        let refused = world.operator.run(&["backup", CLUSTER, "--start-fast"])?;
        ensure!(refused.code.is_some_and(|code| code != 0), "{refused:?}");
        let place = spool.display().to_string();
        ensure!(refused.err.contains("No space left") && refused.err.contains(&place), "{refused:?}");
        // WAL does not need that room.
        let segment = primary.archive_now()?;
        ensure!(world.look(DIRECTORY)?.undamaged()?.segments(1).contains(&segment), "{segment} is not stored");
        ensure!(primary.server.failed_count()? == 0, "archive_command failed");
        ensure!(world.backups(SEGMENT_BYTES)? == [first.backup.clone()], "half a backup exists");
        // Nor does an agent that starts.
        primary.agent.kill()?;
        primary.agent.start()?;
        world.wait_reported("db1")?;
        primary.archive_now()?;
        fs::remove_file(stuffing)?;
        let second = take(&world, &primary, &[])?;
        for taken in [&first, &second] {
            expect_restorable(&stage.scratch, &world, taken)?;
        }
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

#[test]
fn a_restore_without_room_says_where_and_goes_on_when_there_is_some() {
    scenario::play("full-target", |stage| {
        let world = World::started(&stage.scratch, Stores::Any)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let taken = take(&world, &primary, &[])?;
        let data = stage.scratch.directory("full")?;
        let Some(disk) = Disk::mount(stage, &data, 24)? else { return Ok(()) };
        let to = data.display().to_string();
        let fixed = ["restore", CLUSTER, "--to", &to, "--immediate"];
        let said = world.operator.alone(&fixed)?;
        ensure!(said.code == Some(1), "{said:?}");
        ensure!(said.err.contains("No space left on device") && said.err.contains(&to), "{said:?}");
        ensure!(!data.join("global/pg_control").exists(), "what is left can be started");
        // Another attempt is refused until somebody says that what is there may be gone on with; that fails again.
        let again = world.operator.alone(&fixed)?;
        ensure!(again.code == Some(5) && again.err.contains("--delta --confirm"), "{again:?}");
        let going_on = [&fixed[..], &["--delta", "--confirm"]].concat();
        let said = world.operator.alone(&going_on)?;
        ensure!(said.code == Some(1) && !data.join("global/pg_control").exists(), "{said:?}");
        disk.resize(512)?;
        let said = world.operator.alone(&going_on)?;
        ensure!(said.err.contains("were there already"), "{said:?}");
        said.ok()?;
        let restored = start_restored(&stage.scratch, "full", &data)?;
        let held = dump(&restored)?;
        ensure!(held == taken.dump, "the contents differ");
        expect_sound(&restored)?;
        drop(restored);
        wait::until("nobody uses the disk", Duration::from_secs(10), || {
            Ok(fs::metadata(data.join("postmaster.pid")).is_err())
        })
        .map(|_| ())
        .context("the server lives on")
    });
}
