//! `pgconvoy restore`: look at the stores, plan, print the plan, then do it.
//!
//! What is decided is decided by `repository::restore_plan`; what is done is done by `agent::restore`. The place is
//! checked first, so that a refusal costs nothing, and nothing is written before the plan stands. A signal stops the
//! restore; what it wrote cannot be started.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use agent::restore::{
    LinkChoice, OtherLinks, Place, RestoreOptions, RestoreProgress, RestoreSource, Restored, Survey, check_existing,
    check_target, restore as apply, survey,
};
use process::{clock, exit::Exit, shutdown::Shutdown};
use repository::{
    name::StoreName,
    restore_plan::{self, RestorePlan, Step, Testimonies},
    store::ObjectStore,
    witness,
};
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    args::{Output, RestoreArgs},
    config::{self, Config},
    error::CliError,
    output,
    progress::{Progress, bytes_for_people},
    stores::{self, Opened, Selection},
};
use held::Hold;

mod command;
mod end;
mod forecast;
mod gone;
mod held;
mod reader;
mod request;
mod views;

#[derive(Debug, Serialize)]
struct Printed<'a> {
    schema: &'static str,
    #[serde(flatten)]
    plan: &'a RestorePlan,
    /// Of a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    survey: Option<&'a Survey>,
}

/// `pgconvoy restore`
pub(crate) async fn restore(config: &Config, arguments: &RestoreArgs) -> Result<Exit, CliError> {
    let alone = arguments.repository.as_deref().map(config::load_repository).transpose()?;
    let config = alone.as_ref().unwrap_or(config);
    let target = absolute(&arguments.to)?;
    if !arguments.delta {
        check_target(&target, None).map_err(failed)?;
    }
    let selection = Selection { only: &arguments.store, without: &arguments.without_store, repository: None };
    let opened = stores::open(config, selection).await?;
    let plan = plan(config, arguments, &opened).await?;
    request::check_options(arguments, Some(plan.backup.postgres_major))?;
    let (place, owner) = match arguments.delta {
        false => (Place::Free, check_target(&target, None)),
        true => (Place::Existing, check_existing(&target, plan.backup.system_identifier, None)),
    };
    let owner = owner.map_err(failed)?;
    if let Some(owner) = owner.filter(|_| !request::has_own_command(arguments)) {
        reader::check(config, owner)?;
    }
    let options = RestoreOptions {
        target,
        place,
        databases: arguments.database.clone(),
        tablespace_map: arguments.tablespace_map.iter().map(|(oid, place)| (oid.to_string(), place.clone())).collect(),
        links: LinkChoice {
            map: arguments.link_map.iter().cloned().collect(),
            others: if arguments.link_all { OtherLinks::All } else { OtherLinks::WithoutDirectories },
        },
        recovery: plan.recovery.clone().with_options(request::options(arguments)),
        owner: None,
        parallel: arguments.parallel.map_or(0, |workers| workers as usize),
        bytes_per_second: arguments.rate.bytes(),
        scratch: std::env::temp_dir(),
    };
    let source = RestoreSource {
        cluster: plan.cluster.clone(),
        backup: plan.backup.clone(),
        stores: in_order(&opened.stores, &plan.backup_stores),
    };
    let surveyed = match arguments.dry_run {
        true => Some(survey(&source, &options).await.map_err(failed)?),
        false => None,
    };
    match arguments.output {
        Output::Text => {
            let forecast = surveyed.as_ref().map(|survey| forecast::text(survey, place)).unwrap_or_default();
            output::text(&format!("{plan}{forecast}"))?;
        }
        Output::Json => {
            let schema = "pgconvoy.restore-plan/v1";
            output::json(&Printed { schema, plan: &plan, survey: surveyed.as_ref() })?;
        }
    }
    if arguments.dry_run {
        return Ok(Exit::Ok);
    }
    if arguments.delta && !arguments.confirm && check_target(&options.target, None).is_err() {
        let target = options.target.display();
        return Err(CliError::new(Exit::Refused, format!("{target} is a data directory and would become this backup"))
            .hint("what the backup does not have is removed from it: repeat this with --confirm"));
    }
    let hold = alone.is_none().then(|| Hold::new(&config.coordinator, &plan.cluster, &plan.backup, &options.target));
    let restored = run(&source, &options, hold).await?;
    tell(&options.target, &restored, &plan);
    Ok(Exit::Ok)
}

async fn plan(config: &Config, arguments: &RestoreArgs, opened: &Opened) -> Result<RestorePlan, CliError> {
    let without: BTreeSet<StoreName> = opened.left_out.iter().cloned().collect();
    let command = command::restore_command(config, &arguments.cluster, opened)?;
    let request = request::request(arguments, without, command)?;
    let views = views::views(opened, &arguments.cluster).await;
    let (mut testimonies, now) = (Testimonies::new(), clock::now());
    let mut plan = loop {
        let step = restore_plan::next_step(&arguments.cluster, &views, &request, &testimonies, now);
        match step {
            Err(impossible) => {
                let gone = gone::told(opened, &arguments.cluster, arguments.backup.as_ref()).await;
                let reason = gone.map_or(impossible.reason.clone(), |gone| format!("{}: {gone}", impossible.reason));
                let what = format!("this restore is not possible: {reason}");
                return Err(CliError::new(Exit::Refused, what).hint(impossible.hint));
            }
            Ok(Step::Planned(plan)) => break *plan,
            Ok(Step::Ask(backup, history)) => {
                let heard = witness::hear(&opened.stores, &arguments.cluster, &backup, &history).await;
                testimonies.insert(backup.backup, heard);
            }
        }
    };
    if !request::has_own_command(arguments) {
        let command = end::with_end(&request.restore_command, &plan, request.at_gap);
        plan.recovery.set_restore_command(&command);
    }
    Ok(plan)
}

async fn run(source: &RestoreSource, options: &RestoreOptions, hold: Option<Hold<'_>>) -> Result<Restored, CliError> {
    let shutdown = Shutdown::on_signals()
        .map_err(|error| CliError::new(Exit::Negative, "cannot listen for signals").caused_by(error))?;
    let (sender, mut seen) = watch::channel(RestoreProgress::default());
    let cancel = shutdown.token();
    let begun = match &hold {
        Some(hold) => tokio::select! {
            held = hold.begin() => Some(held),
            () = cancel.cancelled() => None,
        },
        None => None,
    };
    let keeping = async {
        match (&hold, begun) {
            (Some(hold), Some(held)) => hold.keep(held).await,
            _ => std::future::pending().await,
        }
    };
    let work = apply(source, options, &sender, &cancel);
    tokio::pin!(work, keeping);
    let mut progress = Progress::new();
    let restored = loop {
        tokio::select! {
            restored = &mut work => break restored,
            never = &mut keeping => match never {},
            Ok(()) = seen.changed() => {
                let now = *seen.borrow_and_update();
                progress.show("restoring", now.bytes_done, now.bytes_total);
            }
        }
    };
    progress.finish();
    restored.map_err(failed)
}

fn tell(target: &Path, restored: &Restored, plan: &RestorePlan) {
    for warning in &restored.warnings {
        output::complain(&format!("warning: {warning}"));
    }
    for tablespace in &restored.tablespaces {
        output::complain(&format!("tablespace {} lies in {}", tablespace.oid, tablespace.location.display()));
    }
    if restored.bytes_kept > 0 || restored.removed > 0 {
        output::complain(&format!(
            "{} were there already, {} entries that the backup does not have were removed",
            bytes_for_people(restored.bytes_kept),
            restored.removed
        ));
    }
    output::complain(&format!(
        "restored {} files, {}, from backup {} into {}; start PostgreSQL on it to recover",
        restored.files,
        bytes_for_people(restored.bytes),
        plan.backup.backup,
        target.display()
    ));
}

fn in_order(stores: &[Arc<dyn ObjectStore>], names: &[StoreName]) -> Vec<Arc<dyn ObjectStore>> {
    names.iter().filter_map(|name| stores.iter().find(|store| store.name() == name)).cloned().collect()
}

fn absolute(path: &Path) -> Result<std::path::PathBuf, CliError> {
    std::path::absolute(path).map_err(|source| {
        CliError::new(Exit::Usage, format!("{} is not a usable path", path.display())).caused_by(source)
    })
}

fn failed(error: agent::restore::RestoreError) -> CliError {
    use agent::restore::RestoreError;
    let exit = match &error {
        RestoreError::Target(_) | RestoreError::Cancelled => Exit::Refused,
        RestoreError::Manifest { .. }
        | RestoreError::Pack { .. }
        | RestoreError::NoStore
        | RestoreError::Checksum { .. } => Exit::Store,
        _ => Exit::Negative,
    };
    CliError::new(exit, "the restore failed").caused_by(error)
}
