//! `pgconvoy rpc`: any method of the coordinator, described by its own reflection.
//!
//! Requests and answers are JSON as protobuf defines it, with field names as in the protos and every field printed;
//! a method that streams prints one object a line. Errors go to standard error as JSON with code, message and details.

use std::collections::BTreeSet;

use agent::coordinator_link::CoordinatorChannel;
use http::uri::PathAndQuery;
use process::exit::Exit;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, SerializeOptions};
use serde_json::json;
use tokio_stream::StreamExt;
use tonic::{Request, Status, client::Grpc};
use tonic_types::StatusExt;

use crate::{
    args::RpcArgs,
    config::Config,
    coordinator::connect,
    error::{CliError, exit_for},
    output,
};

mod codec;
mod reflection;

/// Most request messages for one streaming call.
const REQUESTS_MAX: usize = 100_000;

/// `pgconvoy rpc`
pub(crate) async fn rpc(config: &Config, arguments: &RpcArgs) -> Result<Exit, CliError> {
    let channel = connect(&config.coordinator).await?;
    let wanted = arguments.method.as_deref().map(split).transpose()?;
    let pool = reflection::describe(channel.clone(), wanted.map(|(service, _)| service)).await?;
    let Some((service, method)) = wanted else {
        for line in listing(&pool) {
            output::line(&line)?;
        }
        return Ok(Exit::Ok);
    };
    let method = find(&pool, service, method)?;
    let requests = requests(&method, &arguments.request)?;
    match tokio::time::timeout(arguments.timeout.duration(), call(channel, &method, requests)).await {
        Ok(Ok(())) => Ok(Exit::Ok),
        Ok(Err(Failure::Status(status))) => {
            output::complain(&describe_status(&status));
            Ok(exit_for(&status))
        }
        Ok(Err(Failure::Cli(error))) => Err(error),
        Err(_) => {
            Err(CliError::new(Exit::Timeout, "the call did not end in time; whether it had an effect is unknown"))
        }
    }
}

enum Failure {
    Status(Box<Status>),
    Cli(CliError),
}

fn split(method: &str) -> Result<(&str, &str), CliError> {
    let method = method.strip_prefix('/').unwrap_or(method);
    method.rsplit_once('/').filter(|(service, name)| !service.is_empty() && !name.is_empty()).ok_or_else(|| {
        CliError::new(Exit::Usage, format!("\"{method}\" is not SERVICE/METHOD"))
            .hint("run `pgconvoy rpc` without a method to list them")
    })
}

fn listing(pool: &DescriptorPool) -> BTreeSet<String> {
    pool.services()
        .flat_map(|service| service.methods().collect::<Vec<_>>())
        .map(|method| format!("{}/{}", method.parent_service().full_name(), method.name()))
        .collect()
}

fn find(pool: &DescriptorPool, service: &str, method: &str) -> Result<MethodDescriptor, CliError> {
    let suffix = format!(".{service}");
    let mut services =
        pool.services().filter(|known| known.full_name() == service || known.full_name().ends_with(&suffix));
    let unknown =
        |what: String| CliError::new(Exit::Usage, what).hint("run `pgconvoy rpc` without a method to list them");
    let service = services.next().ok_or_else(|| unknown(format!("the coordinator has no service {service}")))?;
    service
        .methods()
        .find(|known| known.name() == method)
        .ok_or_else(|| unknown(format!("service {} has no method {method}", service.full_name())))
}

fn requests(method: &MethodDescriptor, texts: &[String]) -> Result<Vec<DynamicMessage>, CliError> {
    let mut messages = Vec::new();
    for text in texts {
        let read = if text == "-" { std::io::read_to_string(std::io::stdin()) } else { Ok(text.clone()) };
        let text = read.map_err(|source| CliError::new(Exit::Usage, "cannot read standard input").caused_by(source))?;
        // One text may carry several messages, one after the other.
        for value in serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>() {
            let refused = |source: serde_json::Error| {
                CliError::new(Exit::Usage, format!("the request is not a {}", method.input().full_name()))
                    .caused_by(source)
            };
            let value = value.map_err(refused)?;
            messages.push(DynamicMessage::deserialize(method.input(), value).map_err(refused)?);
            if messages.len() > REQUESTS_MAX {
                return Err(CliError::new(Exit::Usage, format!("more than {REQUESTS_MAX} requests")));
            }
        }
    }
    if !method.is_client_streaming() && messages.len() != 1 {
        return Err(CliError::new(Exit::Usage, format!("{} takes exactly one request", method.full_name())));
    }
    Ok(messages)
}

async fn call(
    channel: CoordinatorChannel,
    method: &MethodDescriptor,
    requests: Vec<DynamicMessage>,
) -> Result<(), Failure> {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let path = PathAndQuery::try_from(path).map_err(|source| {
        Failure::Cli(CliError::new(Exit::Usage, "the method has no usable name").caused_by(source))
    })?;
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|error| Failure::Status(Box::new(Status::from_error(Box::new(error)))))?;
    let codec = codec::DynamicCodec::new(method.output());
    let answers = client
        .streaming(Request::new(tokio_stream::iter(requests)), path, codec)
        .await
        .map_err(|status| Failure::Status(Box::new(status)))?;
    let mut answers = answers.into_inner();
    while let Some(answer) = answers.next().await {
        let answer = answer.map_err(|status| Failure::Status(Box::new(status)))?;
        print(&answer, method.is_server_streaming()).map_err(Failure::Cli)?;
    }
    Ok(())
}

fn print(answer: &DynamicMessage, one_line: bool) -> Result<(), CliError> {
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
    let value = answer
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|source| CliError::new(Exit::Negative, "cannot print the answer as JSON").caused_by(source))?;
    if one_line { output::line(&value.to_string()) } else { output::json(&value) }
}

fn describe_status(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info();
    let metadata = info.map(|info| json!(info.metadata));
    let value = json!({
        "code": format!("{:?}", status.code()),
        "message": status.message(),
        "reason": info.map(|info| info.reason.clone()),
        "domain": info.map(|info| info.domain.clone()),
        "metadata": metadata,
        "retry_seconds": details.retry_info().and_then(|retry| retry.retry_delay).map(|delay| delay.as_secs_f64()),
        "violations": details.precondition_failure().map(|failure| {
            failure.violations.iter().map(|one| json!({"type": one.r#type, "subject": one.subject, "description": one.description}))
                .collect::<Vec<_>>()
        }),
        "fields": details.bad_request().map(|bad| {
            bad.field_violations.iter().map(|one| json!({"field": one.field, "description": one.description})).collect::<Vec<_>>()
        }),
    });
    let known = value.as_object().map(|object| object.iter().filter(|(_, value)| !value.is_null()));
    let known: serde_json::Map<String, serde_json::Value> =
        known.into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())).collect();
    serde_json::Value::Object(known).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> DescriptorPool {
        DescriptorPool::decode(proto::DESCRIPTOR_SET).unwrap()
    }

    #[test]
    fn methods_are_found_by_full_and_short_names() {
        let pool = pool();
        for service in ["pgconvoy.operator.v1.OperatorService", "OperatorService"] {
            assert_eq!(find(&pool, service, "GetInfo").unwrap().name(), "GetInfo");
        }
        assert!(find(&pool, "Service", "GetInfo").is_err());
        assert!(find(&pool, "OperatorService", "Nothing").is_err());
        assert!(split("GetInfo").is_err() && split("/").is_err());
        assert_eq!(split("/a.B/C").unwrap(), ("a.B", "C"));
        assert!(listing(&pool).contains("pgconvoy.archive.v1.ArchiveService/PushWal"));
    }

    #[test]
    fn requests_are_checked_against_the_description() {
        let pool = pool();
        let start = find(&pool, "OperatorService", "StartBackup").unwrap();
        let read = |text: &str| requests(&start, &[text.to_owned()]);
        assert_eq!(read(r#"{"cluster":"c1","start_fast":true}"#).unwrap().len(), 1);
        assert_eq!(read(r#"{"cluster":"c1","startFast":true}"#).unwrap().len(), 1);
        assert!(read(r#"{"clutser":"c1"}"#).is_err());
        assert!(read(r#"{"cluster":"c1"} {"cluster":"c2"}"#).is_err());
        assert!(read("").is_err());
        let push = find(&pool, "ArchiveService", "PushWal").unwrap();
        assert_eq!(requests(&push, &["{} {}\n{}".to_owned()]).unwrap().len(), 3);
    }

    #[test]
    fn an_error_is_one_json_object() {
        let text = describe_status(&Status::not_found("no such operation"));
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["code"], "NotFound");
        assert!(value.get("reason").is_none());
    }
}
