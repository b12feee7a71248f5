//! A coordinator's memory does not grow with the files of its clusters, nor much with their bytes: it copies, verifies,
//! expires and lists made-up backups of very many files and of very large ones.
//!
//! `PGCONVOY_MEMORY_FILES` and `PGCONVOY_MEMORY_SEGMENTS` ask for other numbers than the ordinary ones: files of one page, and
//! files of 1 GiB. With other numbers what is asked at the peak alone is the limit.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use repository::root::{self, RootBackup};
use tests::account::{Scratch, environment, give};
use tests::fleet::{Coordinator, CoordinatorSetup, Operator, Store};
use tests::repository_check::published;
use tests::runtime::block_on;
use tests::synthetic::{self, Shape, whole};
use tests::{program, scenario, wait};

/// Files of one page in the first round, and in the second. Of both there are as many packs as are read at the same time.
const FEW: u32 = 20_000;
const MANY: u32 = 90_000;
/// Files of 1 GiB.
const SEGMENTS: u32 = 2;
/// What 70,000 files more in each of two backups, or packs of 2 GiB, may cost, in bytes. Each file, remembered, would take some
/// 400, together 27 MiB; what is kept for a while of the tables of packs, and what threads hold at the same time, fills up and
/// takes 8 to 14 MiB.
const GROWTH_MAX: u64 = 22 << 20;
/// What a coordinator may take, with any number of files.
const PEAK_MAX: u64 = 256 << 20;
/// Longest wait for one thing that the coordinator does: ten million files take their time.
const PATIENCE: Duration = Duration::from_secs(3600);

const DIGESTS: &[&str] = &[];
const FULL: &[&str] = &["--full"];

fn number(variable: &str, ordinary: u32) -> Result<u32> {
    Ok(environment(variable).map(|text| text.parse()).transpose()?.unwrap_or(ordinary))
}

/// A coordinator over directories, with what it is asked.
struct Round {
    setup: CoordinatorSetup,
    coordinator: Coordinator,
    operator: Operator,
    cluster: String,
}

impl Round {
    fn start(scratch: &Scratch, name: &str, stores: &[&str]) -> Result<Self> {
        let store = |store: &&str| {
            let directory = scratch.directory(&format!("{name}-{store}"))?;
            Ok(Store::directory(store, &directory))
        };
        let stores: Vec<Store> = stores.iter().map(store).collect::<Result<_>>()?;
        let cluster = synthetic::cluster()?.to_string();
        let mut setup = CoordinatorSetup::over(&stores);
        // The disk of ten million files is busy for a while.
        setup.store_patience_seconds = 60;
        setup.tables = format!("[[cluster]]\nname = \"{cluster}\"\n");
        let mut coordinator = Coordinator::set_up(scratch, name, &setup)?;
        coordinator.start()?;
        let seat = format!("{name}-operator");
        let operator = Operator::set_up(scratch, &seat, Some(coordinator.address()), &stores, None)?;
        operator.ok(&["cluster", "create", &cluster, "--system-identifier", &whole::system()?.to_string()])?;
        Ok(Self { setup, coordinator, operator, cluster })
    }

    /// Publishes backups in the first store, in a directory: the WAL of all, then one after the other, then the root. The
    /// coordinator is away meanwhile: what is written has to be given to its account.
    fn publish(&mut self, scratch: &Scratch, directory: &Path, shape: Shape, backups: u32) -> Result<Vec<String>> {
        self.coordinator.stop()?;
        let store = repository::config::open(&synthetic::store_at(directory))?;
        let entries: Vec<RootBackup> = block_on(async {
            whole::archive(store.as_ref()).await?;
            let mut entries = Vec::new();
            for number in 1..=backups {
                let id = whole::id(number);
                entries.push(whole::publish(store.as_ref(), directory, id, shape, scratch.path()).await?);
            }
            anyhow::Ok(entries)
        })?;
        let (writer, now) = ("another".parse()?, process::clock::now());
        let named =
            |root: &root::Root| entries.iter().try_fold(root.clone(), |root, one| root.with_backup(one.clone()));
        block_on(root::commit(store.as_ref(), &synthetic::cluster()?, &writer, now, named))?;
        give_all(directory)?;
        self.coordinator.start()?;
        Ok(entries.iter().map(|entry| entry.backup.to_string()).collect())
    }

    /// From here on the coordinator keeps this much.
    fn keep(&mut self, rules: &str) -> Result<()> {
        self.setup.tables.push_str(rules);
        self.coordinator.configure(&self.setup)?;
        self.coordinator.stop()?;
        self.coordinator.start()
    }

    /// Runs a command for as long as it takes.
    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let said = program::run(self.operator.command(arguments)?, PATIENCE)?;
        said.ok().with_context(|| format!("pgconvoy {}", arguments.join(" ")))
    }

    fn wait_left(&self, left: &[&String]) -> Result<()> {
        wait::until(&format!("{left:?} are left in every store"), PATIENCE, || {
            let same = |store| Ok(published(store, &self.cluster)?.iter().eq(left.iter().copied()));
            Ok(self.setup.stores.iter().map(same).collect::<Result<Vec<bool>>>()?.into_iter().all(|same| same))
        })
        .map(|_| ())
    }

    /// Verifies at one depth after the other, asks for all else that looks into manifests, and gives the coordinator's peak.
    fn look(&mut self, what: &str, depths: &[&[&str]]) -> Result<u64> {
        let mut verified = Vec::new();
        for depth in depths {
            self.ask(&[&["verify", self.cluster.as_str()], *depth].concat())?;
            verified.push(self.peak()?);
        }
        self.ask(&["rebuild"])?;
        self.ask(&["expire", &self.cluster])?;
        self.ask(&["info", &self.cluster])?;
        let all = self.peak()?;
        println!("{what}: peak after verifying {verified:?}, in the end {all} bytes");
        Ok(all)
    }

    fn peak(&mut self) -> Result<u64> {
        self.coordinator.process()?.memory_peak_bytes()
    }
}

/// Lets the account have what was written beside its programs.
fn give_all(directory: &Path) -> Result<()> {
    give(directory)?;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() { give_all(&path)? } else { give(&path)? }
    }
    Ok(())
}

/// Two backups of so many files come to one store by another's hand; the coordinator copies them, lets the older one expire, and
/// looks at what is left.
fn files(scratch: &Scratch, name: &str, files: u32) -> Result<u64> {
    let mut round = Round::start(scratch, name, &["repo1", "repo2"])?;
    let directory = scratch.path().join(format!("{name}-repo1"));
    let backups = round.publish(scratch, &directory, Shape::Small(files), 2)?;
    round.wait_left(&[&backups[0], &backups[1]])?;
    let copying = round.peak()?;
    round.keep("[cluster.retention]\nbackups = 1\n")?;
    round.wait_left(&[&backups[1]])?;
    let gone = directory.join(format!("c/{}/b/{}/manifest", round.cluster, backups[0]));
    wait::until("the older backup is swept", PATIENCE, || Ok(!gone.exists()))?;
    let peak = round.look(&format!("{files} files"), &[FULL])?;
    round.coordinator.stop()?;
    Ok(peak.max(copying))
}

/// A backup of files of 1 GiB that an older one stored.
fn segments(scratch: &Scratch, name: &str, files: u32) -> Result<u64> {
    let mut round = Round::start(scratch, name, &["repo1"])?;
    let directory = scratch.path().join(format!("{name}-repo1"));
    let backups = round.publish(scratch, &directory, Shape::Large(files), 1)?;
    round.wait_left(&[&backups[0]])?;
    // Whoever asks for more has no day to have it decoded.
    let depths: &[&[&str]] = if files <= SEGMENTS { &[DIGESTS, FULL] } else { &[DIGESTS] };
    let peak = round.look(&format!("{files} GiB"), depths)?;
    round.coordinator.stop()?;
    Ok(peak)
}

#[test]
fn a_coordinator_is_small_whatever_it_looks_after() {
    scenario::play("coordinator-memory", |stage| {
        let (many, large) = (number("PGCONVOY_MEMORY_FILES", MANY)?, number("PGCONVOY_MEMORY_SEGMENTS", SEGMENTS)?);
        let few = files(&stage.scratch, "few", FEW)?;
        for (peak, ordinary) in [
            (files(&stage.scratch, "many", many)?, many == MANY),
            (segments(&stage.scratch, "large", large)?, large == SEGMENTS),
        ] {
            ensure!(peak <= PEAK_MAX, "{peak} bytes");
            let growth = peak.saturating_sub(few);
            ensure!(!ordinary || growth < GROWTH_MAX, "{growth} bytes more than with {FEW} files");
        }
        Ok(())
    });
}
