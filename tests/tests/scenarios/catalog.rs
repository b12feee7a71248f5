//! The catalog is an index: whatever becomes of its file, everything is there again.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use rand::RngCore;
use tests::ledger;
use tests::scenario;
use tests::world::{Stores, World};

use crate::SMALL;
use crate::operator::settled;

const SEGMENT_BYTES: u64 = 1 << 20;

/// Writes random bytes over a part of a file.
fn overwrite(path: &Path, from: u64, length: u64) -> Result<()> {
    let mut noise = vec![0; length as usize];
    rand::rng().fill_bytes(&mut noise);
    Ok(OpenOptions::new().write(true).open(path)?.write_all_at(&noise, from)?)
}

fn moved_aside(state: &Path) -> Result<usize> {
    let names = fs::read_dir(state)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names = names.collect::<Result<Vec<String>>>()?;
    Ok(names.iter().filter(|name| name.starts_with("catalog.damaged-") && name.ends_with('Z')).count())
}

#[test]
fn a_damaged_catalog_is_moved_aside_and_everything_is_there_again() {
    scenario::play("catalog-damaged", |stage| {
        stage.announce("the catalog is damaged", "this scenario damages the catalog");
        for part in ["unavailable", "road", "coordinator"] {
            stage.announce(part, "the coordinator is stopped between the steps");
        }
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        for _ in 0..40 {
            primary.server.switch_wal()?;
        }
        primary.archive_now()?;
        world.back_up(&[])?;
        let catalog = world.coordinator.state().join("catalog.sqlite");
        for (round, part) in ["the middle", "the header", "both, after a crash"].into_iter().enumerate() {
            primary.archive_now()?;
            world.expect_whole(&[&primary], 1)?;
            let before = settled(&world)?;
            match part {
                "both, after a crash" => world.coordinator.kill()?,
                _ => world.coordinator.stop()?,
            }
            // After a crash most of it is still in the journal beside the file.
            let crashed = part == "both, after a crash";
            let middle = if crashed { world.coordinator.state().join("catalog.sqlite-wal") } else { catalog.clone() };
            let size = fs::metadata(&middle)?.len();
            ensure!(size > 3 * 4096, "{} has {size} bytes; there is no middle", middle.display());
            if part != "the header" {
                overwrite(&middle, size / 3, size / 3)?;
            }
            if part != "the middle" {
                overwrite(&catalog, 0, 100)?;
            }
            let aside = moved_aside(world.coordinator.state())?;
            world.coordinator.start()?;
            // What of the journal is whole may replace the damaged header; what it lost is found in the stores again.
            if !crashed {
                ensure!(moved_aside(world.coordinator.state())? == aside + 1, "{part}: nothing was moved aside");
                let log = fs::read_to_string(world.coordinator.log_path())?;
                let told = log.matches("the catalog is damaged and was moved aside").count();
                ensure!(told == round + 1, "{part}: the log tells of {told} damaged catalogs");
            }
            let after = settled(&world)?;
            ensure!(before == after, "{part}: before\n{before:#}\nafter\n{after:#}");
            primary.archive_now()?;
            ensure!(world.backups(SEGMENT_BYTES)?.len() == round + 1, "{part}: a backup is missing");
            world.back_up(&[])?;
        }
        primary.server.wait_archived(0, Duration::from_secs(60))?;
        let restored = world.restored(&stage.scratch, "restored", &["--latest"])?;
        ledger::holding(&restored)?;
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}
