//! TLS before a service that speaks none: takes a connection, shows a certificate, forwards what is inside.
//!
//! Callers need no certificate. It ends, with its connections, when dropped.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::certificates::Papers;
use crate::runtime;

/// What is held of each direction of a connection.
const BUFFER_BYTES: usize = 64 << 10;

/// A running front on loopback.
#[derive(Debug)]
pub struct TlsFront {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl TlsFront {
    /// A front before `target` with a server's papers, on a free port.
    pub fn start(target: SocketAddr, papers: &Papers) -> Result<Self> {
        process::tls::install_provider();
        let chain: Vec<_> = CertificateDer::pem_file_iter(&papers.certificate)?.collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_file(&papers.key)?;
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = runtime::block_on(TcpListener::bind("127.0.0.1:0")).context("cannot listen")?;
        let address = listener.local_addr()?;
        Ok(Self { address, task: runtime::runtime().spawn(serve(listener, acceptor, target)) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, target: SocketAddr) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                connections.spawn(forward(stream, acceptor.clone(), target));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Errors are connections that broke, which either end sees for itself.
async fn forward(stream: TcpStream, acceptor: TlsAcceptor, target: SocketAddr) {
    let _ = stream.set_nodelay(true);
    let Ok(mut inside) = acceptor.accept(stream).await else { return };
    let Ok(mut behind) = TcpStream::connect(target).await else { return };
    let _ = behind.set_nodelay(true);
    let _ = tokio::io::copy_bidirectional_with_sizes(&mut inside, &mut behind, BUFFER_BYTES, BUFFER_BYTES).await;
}
