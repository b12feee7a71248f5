//! Commands to an S3 server of another process, over plain HTTP on a port of its own.
//!
//! ```text
//! GET    /counts          how often each operation was asked for, as JSON
//! DELETE /counts          counts anew
//! GET    /faults          the plan, as JSON
//! PUT    /faults          replaces the plan: {"refuse_connections":true}, {"rules":[{"fault":"slow_down","times":3}]}
//! DELETE /faults          nothing goes wrong any more
//! POST   /flip/<key>      flips a bit of a stored object
//! GET    /keys            one key a line
//! ```

use std::convert::Infallible;
use std::net::TcpListener as StdListener;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::faults::Faults;
use super::objects::Objects;

/// Longest command.
const COMMAND_LIMIT_BYTES: usize = 1024 * 1024;

/// Takes commands until aborted.
pub(super) async fn serve(listener: StdListener, faults: Faults, objects: Arc<Objects>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((stream, _)) = listener.accept() => {
                let (faults, objects) = (faults.clone(), objects.clone());
                let answer = service_fn(move |request| answer(request, faults.clone(), objects.clone()));
                connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(
    request: Request<Incoming>,
    faults: Faults,
    objects: Arc<Objects>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = match carry_out(request, &faults, &objects).await {
        Ok(Some(text)) => (StatusCode::OK, text),
        Ok(None) => (StatusCode::NOT_FOUND, "no such command".to_owned()),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error:#}")),
    };
    let mut response = Response::new(Full::from(text + "\n"));
    *response.status_mut() = status;
    Ok(response)
}

async fn carry_out(request: Request<Incoming>, faults: &Faults, objects: &Objects) -> Result<Option<String>> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, COMMAND_LIMIT_BYTES).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
    let text = match (head.method, head.uri.path()) {
        (Method::GET, "/counts") => serde_json::to_string(&faults.counts())?,
        (Method::DELETE, "/counts") => {
            faults.reset_counts();
            String::new()
        }
        (Method::GET, "/faults") => serde_json::to_string(&faults.plan())?,
        (Method::PUT, "/faults") => {
            faults.set(serde_json::from_slice(&body)?);
            String::new()
        }
        (Method::DELETE, "/faults") => {
            faults.heal();
            String::new()
        }
        (Method::GET, "/keys") => objects.keys().join("\n"),
        (Method::POST, path) if path.starts_with("/flip/") => {
            objects.flip_bit(&path["/flip/".len()..])?;
            String::new()
        }
        _ => return Ok(None),
    };
    Ok(Some(text))
}
