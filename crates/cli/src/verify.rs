//! `pgconvoy verify`: whether what the stores hold can be restored. By the coordinator, or from the stores alone. With
//! `--source`, whether it is what a running server has.

use std::sync::Mutex;

use process::{clock, exit::Exit};
use proto::operator::{
    GetVerificationRequest, Operation, OperationState, StartComparisonRequest, StartVerificationRequest,
};
use repository::verify::source::{SourceReport, render_source};
use repository::verify::{Depth, Report, Request, StoreVerdict, Watch, render_text, verify as look};
use serde::de::DeserializeOwned;

use crate::{
    args::{Output, VerifyArgs},
    backup::watch,
    config::{self, Config},
    coordinator::{Operator, operator},
    error::CliError,
    output,
    progress::Progress,
    stores::{self, Selection},
};

/// `pgconvoy verify`
pub(crate) async fn verify(config: &Config, arguments: &VerifyArgs) -> Result<Exit, CliError> {
    if let Some(path) = &arguments.repository {
        return alone(&config::load_repository(path)?, arguments).await;
    }
    match operator(&config.coordinator).await {
        Ok(client) if arguments.source => compare(client, arguments).await,
        Ok(client) => by_coordinator(client, arguments).await,
        Err(error) if error.exit() == Exit::Unreachable && !config.stores.is_empty() && !arguments.source => {
            output::complain(&format!("pgconvoy: {error}; reading the stores instead"));
            alone(config, arguments).await
        }
        Err(error) => Err(error),
    }
}

async fn by_coordinator(mut client: Operator, arguments: &VerifyArgs) -> Result<Exit, CliError> {
    let request = StartVerificationRequest {
        cluster: arguments.cluster.to_string(),
        stores: arguments.store.iter().map(ToString::to_string).collect(),
        backup: arguments.backup.map(|backup| backup.to_string()).unwrap_or_default(),
        full: arguments.full,
        request_id: String::new(),
    };
    let started = client.start_verification(request).await?.into_inner().operation.unwrap_or_default();
    let report: Report = report(&mut client, started).await?;
    conclude(&report, arguments.output)
}

/// A running server's pages with the newest backup.
async fn compare(mut client: Operator, arguments: &VerifyArgs) -> Result<Exit, CliError> {
    let request = StartComparisonRequest {
        cluster: arguments.cluster.to_string(),
        node: arguments.node.as_ref().map(ToString::to_string).unwrap_or_default(),
        request_id: String::new(),
    };
    let started = client.start_comparison(request).await?.into_inner().operation.unwrap_or_default();
    let report: SourceReport = report(&mut client, started).await?;
    match arguments.output {
        Output::Text => output::text(&render_source(&report))?,
        Output::Json => output::json(&report)?,
    }
    Ok(match (report.sound, report.left_out) {
        (false, _) => Exit::Negative,
        (true, 0) => Exit::Ok,
        (true, _) => Exit::Partial,
    })
}

/// What an operation found, once it has ended.
async fn report<T: DeserializeOwned>(client: &mut Operator, started: Operation) -> Result<T, CliError> {
    let ended = watch(client, started).await?;
    match ended.state() {
        OperationState::Done => {}
        OperationState::Failed => {
            return Err(CliError::new(Exit::Negative, format!("the verification ended early: {}", ended.error)));
        }
        _ => return Err(CliError::new(Exit::Timeout, "the coordinator stopped telling how the verification goes")),
    }
    let answer = client.get_verification(GetVerificationRequest { operation: ended.operation }).await?.into_inner();
    serde_json::from_str(&answer.report_json).map_err(|source| {
        CliError::new(Exit::Refused, "the report that came is not one this version can read").caused_by(source)
    })
}

/// From the stores, without coordinator or agent.
async fn alone(config: &Config, arguments: &VerifyArgs) -> Result<Exit, CliError> {
    let opened = stores::open(config, Selection { only: &arguments.store, ..Selection::default() }).await?;
    if opened.stores.is_empty() {
        let reasons: Vec<String> = opened.away.iter().map(|away| format!("{}: {}", away.store, away.reason)).collect();
        return Err(CliError::new(Exit::Store, format!("no store can be read: {}", reasons.join("; "))));
    }
    let depth = if arguments.full { Depth::Full } else { Depth::Digests };
    let request = Request { backup: arguments.backup, ..Request::all(depth) };
    let scratch = std::env::temp_dir();
    let mut report = {
        let progress = Mutex::new(Progress::new());
        let watch = Watch::default().telling(move |now| {
            if let Ok(mut progress) = progress.lock() {
                progress.show(&now.step, now.bytes_done, now.bytes_total);
            }
        });
        let looked = look(&opened.stores, &arguments.cluster, &request, &watch, &scratch, clock::now()).await;
        looked.map_err(|source| {
            CliError::new(Exit::Negative, format!("nothing can be laid down in {}", scratch.display()))
                .caused_by(source)
        })?
    };
    report.complete &= opened.away.is_empty();
    report.stores.extend(opened.away.into_iter().map(|away| StoreVerdict {
        store: away.store,
        failed: Some(away.reason),
        objects: 0,
        bytes: 0,
        left_out: 0,
    }));
    conclude(&report, arguments.output)
}

fn conclude(report: &Report, form: Output) -> Result<Exit, CliError> {
    match form {
        Output::Text => output::text(&render_text(report))?,
        Output::Json => output::json(report)?,
    }
    Ok(exit(report))
}

fn exit(report: &Report) -> Exit {
    match (report.sound, report.complete) {
        (false, _) => Exit::Negative,
        (true, false) => Exit::Partial,
        // A look at nothing found nothing.
        (true, true) if report.stores.iter().all(|store| store.objects == 0) => Exit::Negative,
        (true, true) => Exit::Ok,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_looked_at_and_is_sound_is_a_success() {
        let check = |sound: bool, complete: bool, objects: u64, expected: Exit| {
            let text = format!(
                r#"{{"schema":"pgconvoy.verify/v1","generated":"2026-11-23T05:00:00Z","cluster":"main","depth":"digests",
                "share":null,"sound":{sound},"complete":{complete},"backups":[],"findings":[],
                "stores":[{{"store":"repo1","failed":null,"objects":{objects},"bytes":0,"left_out":0}}]}}"#
            );
            assert_eq!(exit(&serde_json::from_str(&text).unwrap()), expected, "{text}");
        };
        check(true, true, 5, Exit::Ok);
        check(true, true, 0, Exit::Negative);
        check(true, false, 5, Exit::Partial);
        check(false, false, 5, Exit::Negative);
        check(false, true, 5, Exit::Negative);
    }
}
