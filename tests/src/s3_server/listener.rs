//! Sockets of the S3 server, and the faults that happen to connections rather than to objects.

use std::convert::Infallible;
use std::net::TcpListener as StdListener;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, BodyStream, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::service::S3Service;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::faults::{Fault, Faults, Operation};

/// Before a body breaks off, so that what came before it is sent.
const FLUSH_PAUSE: Duration = Duration::from_millis(50);

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type AnyBody = UnsyncBoxBody<Bytes, BoxError>;

/// How long to wait before trying again to take back the address.
const REBIND_PAUSE: Duration = Duration::from_millis(20);

/// Accepts connections until aborted. While connections are to be refused, nobody listens.
pub(super) async fn serve(listener: StdListener, service: S3Service, faults: Faults) {
    let Ok(address) = listener.local_addr() else { return };
    let mut changes = faults.changes();
    let mut listener = TcpListener::from_std(listener).ok();
    let mut connections = JoinSet::new();
    loop {
        let refuse = changes.borrow_and_update().refuse_connections;
        if refuse {
            listener = None;
            connections.abort_all();
        } else if listener.is_none() {
            listener = TcpListener::bind(address).await.ok();
            if listener.is_none() {
                tokio::time::sleep(REBIND_PAUSE).await;
                continue;
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            accepted = accept(listener.as_ref()) => {
                let (service, faults) = (service.clone(), faults.clone());
                connections.spawn(serve_connection(accepted, service, faults));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> TcpStream {
    let Some(listener) = listener else { return std::future::pending().await };
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            return stream;
        }
        // Out of descriptors; others must close theirs first.
        tokio::time::sleep(REBIND_PAUSE).await;
    }
}

async fn serve_connection(stream: TcpStream, service: S3Service, faults: Faults) {
    let answer = service_fn(move |request| answer(request, service.clone(), faults.clone()));
    // An error is a connection that broke, by a fault or by the client.
    let _ = http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), answer).await;
}

/// Answers a request; an error breaks the connection.
async fn answer(request: Request<Incoming>, service: S3Service, faults: Faults) -> Result<Response<AnyBody>, BoxError> {
    let mut changes = faults.changes();
    // The plan may have changed a moment before the listener hears of it.
    if changes.borrow_and_update().refuse_connections {
        return Err("nobody listens".into());
    }
    let fault = faults.befalling(operation_of(&request), request.uri().path());
    match fault {
        Some(Fault::SlowDown) => {
            drain(request.into_body()).await;
            return Ok(refused(StatusCode::SERVICE_UNAVAILABLE, "SlowDown", "a planned fault"));
        }
        Some(Fault::Locked) => {
            drain(request.into_body()).await;
            return Ok(refused(
                StatusCode::FORBIDDEN,
                "AccessDenied",
                "Object is WORM protected and cannot be removed",
            ));
        }
        Some(Fault::Hang) => {
            let _ = changes.changed().await;
            return Err("a planned fault".into());
        }
        Some(Fault::ResetBeforeCommit) => {
            drain(request.into_body()).await;
            return Err("a planned fault".into());
        }
        Some(Fault::Latency(ms)) => tokio::time::sleep(Duration::from_millis(ms)).await,
        Some(Fault::LostReply | Fault::TruncatedRead(_)) | None => {}
    }
    let response =
        service.call(request.map(s3s::Body::from)).await.map_err(|error| BoxError::from(format!("{error:?}")))?;
    match fault {
        Some(Fault::LostReply) => Err("a planned fault".into()),
        Some(Fault::TruncatedRead(after)) => Ok(response.map(|body| truncated(body, after))),
        _ => Ok(response.map(|body| body.boxed_unsync())),
    }
}

fn operation_of<B>(request: &Request<B>) -> Operation {
    let has_key = request.uri().path().trim_start_matches('/').split_once('/').is_some_and(|(_, key)| !key.is_empty());
    match *request.method() {
        // Many keys at once, named in the body.
        Method::POST if !has_key => Operation::Delete,
        _ if !has_key => Operation::List,
        // The only posts about a key begin and complete a multipart upload.
        Method::PUT | Method::POST => Operation::Put,
        Method::HEAD => Operation::Head,
        Method::DELETE => Operation::Delete,
        _ => Operation::Get,
    }
}

async fn drain(mut body: Incoming) {
    while let Some(Ok(_)) = body.frame().await {}
}

fn refused(status: StatusCode, code: &str, message: &str) -> Response<AnyBody> {
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    );
    let body = Full::from(Bytes::from(text)).map_err(|never: Infallible| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = status;
    response
}

fn truncated(body: s3s::Body, after: u64) -> AnyBody {
    let mut left = after as usize;
    let frames = BodyStream::new(body).map(move |frame| {
        let mut data = frame?.into_data().map_err(|_| "a trailer")?;
        data.truncate(left);
        left -= data.len();
        Ok::<_, BoxError>(data)
    });
    let before = frames.take_while(|data| std::future::ready(data.as_ref().is_ok_and(|data| !data.is_empty())));
    let broken = stream::once(async {
        tokio::time::sleep(FLUSH_PAUSE).await;
        Err(BoxError::from("a planned fault"))
    });
    StreamBody::new(before.map(|data| data.map(Frame::data)).chain(broken)).boxed_unsync()
}
