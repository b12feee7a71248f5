//! The channel to the coordinator, which takes only gRPC for an answer.
//!
//! A proxy in front of a host that is down, or whoever else got its address, answers in plain HTTP. The client would make a
//! status of the HTTP status code, and of a 404 one that says the coordinator knows no such method: the road would not
//! change for it. Such an answer is one of a coordinator that is away.
//!
//! This room does not read what it lets pass.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response, header::CONTENT_TYPE};
use tonic::transport::{Channel, Error};

/// What every answer in gRPC says of its content (gRPC over HTTP2, Responses).
const GRPC: &[u8] = b"application/grpc";

/// A channel to the coordinator. Cloning it is cheap; clones share the connection.
#[derive(Debug, Clone)]
pub struct CoordinatorChannel(Channel);

impl From<Channel> for CoordinatorChannel {
    fn from(channel: Channel) -> Self {
        Self(channel)
    }
}

impl Service<Request<Body>> for CoordinatorChannel {
    type Response = Response<Body>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.0.call(request);
        Box::pin(async move { Ok(of_a_coordinator(answer.await?)) })
    }
}

fn of_a_coordinator(answer: Response<Body>) -> Response<Body> {
    let is_grpc = answer.headers().get(CONTENT_TYPE).is_some_and(|of| of.as_bytes().starts_with(GRPC));
    if is_grpc {
        return answer;
    }
    let status = answer.status();
    Status::unavailable(format!("what answers there is no coordinator: it speaks HTTP and not gRPC, and says {status}"))
        .into_http()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, content: &str) -> Response<Body> {
        Response::builder().status(status).header(CONTENT_TYPE, content).body(Body::empty()).unwrap()
    }

    fn code(answer: &Response<Body>) -> Option<&[u8]> {
        answer.headers().get("grpc-status").map(|code| code.as_bytes())
    }

    #[test]
    fn only_grpc_is_an_answer_of_a_coordinator() {
        assert_eq!(code(&of_a_coordinator(answer(404, "application/xml"))), Some(&b"14"[..]));
        assert_eq!(code(&of_a_coordinator(answer(200, "text/html"))), Some(&b"14"[..]));
        assert_eq!(code(&of_a_coordinator(answer(200, "application/grpc"))), None);
        assert_eq!(code(&of_a_coordinator(Status::not_found("no such cluster").into_http())), Some(&b"5"[..]));
    }
}
