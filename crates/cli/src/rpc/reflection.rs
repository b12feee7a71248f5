//! Asks a server to describe itself (gRPC server reflection, v1) and builds a pool of descriptors from the answers.

use std::collections::BTreeMap;

use agent::coordinator_link::CoordinatorChannel;
use process::exit::Exit;
use prost::Message;
use prost_reflect::DescriptorPool;
use prost_types::FileDescriptorProto;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, ServerReflectionResponse, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::error::CliError;

/// Most files a server may describe itself with.
const FILES_MAX: usize = 1000;

/// Descriptors of the service whose full name is `service` or ends with it, or of all services.
pub(super) async fn describe(channel: CoordinatorChannel, service: Option<&str>) -> Result<DescriptorPool, CliError> {
    let mut session = Session::start(channel).await?;
    let suffix = service.map(|name| format!(".{name}"));
    let listed = session.services().await?;
    let wanted = listed.into_iter().filter(|known| match (service, &suffix) {
        (Some(name), Some(suffix)) => known == name || known.ends_with(suffix),
        _ => true,
    });
    let mut files = BTreeMap::new();
    for service in wanted {
        session.collect(MessageRequest::FileContainingSymbol(service), &mut files).await?;
    }
    let mut pool = DescriptorPool::new();
    pool.add_file_descriptor_protos(files.into_values()).map_err(|source| {
        CliError::new(Exit::Refused, "the coordinator's description of itself does not hold together").caused_by(source)
    })?;
    Ok(pool)
}

/// One reflection stream: a question, an answer, and so on.
struct Session {
    questions: mpsc::Sender<ServerReflectionRequest>,
    answers: Streaming<ServerReflectionResponse>,
}

impl Session {
    async fn start(channel: CoordinatorChannel) -> Result<Self, CliError> {
        let (questions, asked) = mpsc::channel(1);
        let answers = ServerReflectionClient::new(channel)
            .server_reflection_info(ReceiverStream::new(asked))
            .await
            .map_err(unusable)?
            .into_inner();
        Ok(Self { questions, answers })
    }

    async fn ask(&mut self, question: MessageRequest) -> Result<MessageResponse, CliError> {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
        let gone = || CliError::new(Exit::Unreachable, "the coordinator ended the description of its methods");
        self.questions.send(request).await.map_err(|_| gone())?;
        let answer = self.answers.message().await.map_err(unusable)?.ok_or_else(gone)?;
        match answer.message_response.ok_or_else(gone)? {
            MessageResponse::ErrorResponse(error) => Err(CliError::new(
                Exit::Refused,
                format!("the coordinator does not describe it: {}", error.error_message),
            )),
            other => Ok(other),
        }
    }

    async fn services(&mut self) -> Result<Vec<String>, CliError> {
        match self.ask(MessageRequest::ListServices(String::new())).await? {
            MessageResponse::ListServicesResponse(list) => Ok(list.service.into_iter().map(|one| one.name).collect()),
            _ => Err(unexpected()),
        }
    }

    /// Adds the file that answers `question` and every file it needs.
    async fn collect(
        &mut self,
        question: MessageRequest,
        files: &mut BTreeMap<String, FileDescriptorProto>,
    ) -> Result<(), CliError> {
        let mut questions = vec![question];
        while let Some(question) = questions.pop() {
            if matches!(&question, MessageRequest::FileByFilename(name) if files.contains_key(name)) {
                continue;
            }
            let MessageResponse::FileDescriptorResponse(answer) = self.ask(question).await? else {
                return Err(unexpected());
            };
            for bytes in answer.file_descriptor_proto {
                let file = FileDescriptorProto::decode(bytes.as_slice()).map_err(|_| unexpected())?;
                questions.extend(file.dependency.iter().cloned().map(MessageRequest::FileByFilename));
                files.insert(file.name().to_owned(), file);
                if files.len() > FILES_MAX {
                    return Err(unexpected());
                }
            }
        }
        Ok(())
    }
}

fn unusable(status: Status) -> CliError {
    match status.code() {
        tonic::Code::Unimplemented => {
            CliError::new(Exit::Refused, "the server there does not describe its methods (no gRPC reflection)")
        }
        _ => status.into(),
    }
}

fn unexpected() -> CliError {
    CliError::new(Exit::Refused, "the server there described its methods in an unexpected way")
}
