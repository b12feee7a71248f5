//! A TCP link that can be broken: refused, cut, silent or slow, each direction by itself.
//!
//! A silent direction holds what it is given, as a network does that drops packets: both ends see an open connection
//! on which nothing arrives. Opened again, what was held goes on its way; after [`Proxy::cut`] it is lost.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::runtime;

/// Largest piece forwarded at once.
const PIECE_BYTES: usize = 64 << 10;
/// Longest wait for the server behind the link.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// What one direction does with bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lane {
    /// Forwards them.
    #[default]
    Open,
    /// Holds them.
    Silent,
    /// Forwards each piece after this long.
    Slow(Duration),
    /// Forwards at most this many bytes a second.
    Narrow(u32),
}

/// State of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Link {
    /// From the client to the server.
    up: Lane,
    /// From the server to the client.
    down: Lane,
    /// Grows with each cut; connections of an earlier number are closed.
    cuts: u64,
}

/// A link on loopback; gone on drop.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    target: watch::Sender<SocketAddr>,
    link: watch::Sender<Link>,
    listening: Option<JoinHandle<()>>,
}

impl Proxy {
    /// A link to `target` on a free port.
    pub fn start(target: SocketAddr) -> Result<Self> {
        let (link, _) = watch::channel(Link::default());
        let (target, _) = watch::channel(target);
        let mut proxy = Self { address: SocketAddr::from(([127, 0, 0, 1], 0)), target, link, listening: None };
        proxy.listen()?;
        Ok(proxy)
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends new connections somewhere else.
    pub fn lead_to(&self, target: SocketAddr) {
        self.target.send_replace(target);
    }

    /// Changes both directions; connections stay.
    pub fn set(&self, up: Lane, down: Lane) {
        self.link.send_modify(|link| (link.up, link.down) = (up, down));
    }

    /// Closes all connections; what they held is lost. What is sent after it is not forwarded any more.
    pub fn cut(&self) {
        self.link.send_modify(|link| link.cuts += 1);
    }

    /// Closes all connections and refuses new ones.
    pub fn refuse(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
            // The port is free once the task has dropped its listener.
            let _ = runtime::block_on(listening);
        }
        self.cut();
    }

    /// Opens both directions, and listens again if it refused.
    pub fn open(&mut self) -> Result<()> {
        self.set(Lane::Open, Lane::Open);
        if self.listening.is_none() {
            self.listen()?;
        }
        Ok(())
    }

    fn listen(&mut self) -> Result<()> {
        let listener = runtime::block_on(async {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(self.address)?;
            socket.listen(128)
        })?;
        self.address = listener.local_addr()?;
        let (target, link) = (self.target.subscribe(), self.link.subscribe());
        self.listening = Some(runtime::runtime().spawn(accept(listener, target, link)));
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
        }
        self.cut();
    }
}

async fn accept(listener: TcpListener, target: watch::Receiver<SocketAddr>, link: watch::Receiver<Link>) {
    while let Ok((client, _)) = listener.accept().await {
        let (target, cuts) = (*target.borrow(), link.borrow().cuts);
        tokio::spawn(forward(client, target, link.clone(), cuts));
    }
}

/// Forwards one connection, which was made after so many cuts, until the next one.
async fn forward(client: TcpStream, target: SocketAddr, link: watch::Receiver<Link>, cuts: u64) {
    // A silent link does not even answer the handshake's first byte: the client is connected to us, and to nobody.
    let mut cut = link.clone();
    let connected = tokio::select! {
        connected = tokio::time::timeout(CONNECT_PATIENCE, TcpStream::connect(target)) => connected,
        _ = cut.wait_for(|link| link.cuts != cuts) => return,
    };
    let Ok(Ok(server)) = connected else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((client_read, client_write), (server_read, server_write)) = (client.into_split(), server.into_split());
    let up = carry(client_read, server_write, link.clone(), cuts, |link| link.up);
    let down = carry(server_read, client_write, link, cuts, |link| link.down);
    // Both directions run to their own end, so that a half-closed connection still gets its answer.
    let both = async { tokio::join!(up, down) };
    tokio::select! {
        _ = both => (),
        _ = cut.wait_for(|link| link.cuts != cuts) => (),
    }
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
    cuts: u64,
    lane: fn(&Link) -> Lane,
) {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let Ok(length) = from.read(&mut piece).await else { return };
        if link.wait_for(|link| lane(link) != Lane::Silent).await.is_err() {
            return;
        }
        if length == 0 {
            let _ = to.shutdown().await;
            return;
        }
        let now = lane(&link.borrow());
        match now {
            Lane::Slow(time) => tokio::time::sleep(time).await,
            Lane::Narrow(rate) => {
                tokio::time::sleep(Duration::from_secs_f64(length as f64 / f64::from(rate.max(1)))).await;
            }
            Lane::Open | Lane::Silent => (),
        }
        if link.borrow().cuts != cuts {
            return;
        }
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net;

    use super::*;

    /// A server that answers each byte with the same byte.
    fn echo() -> SocketAddr {
        let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
                });
            }
        });
        address
    }

    fn ask(stream: &mut net::TcpStream, byte: u8) -> std::io::Result<u8> {
        stream.write_all(&[byte])?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        Ok(answer[0])
    }

    #[test]
    fn a_link_forwards_then_refuses_then_forwards_again() {
        let mut proxy = Proxy::start(echo()).unwrap();
        let mut stream = net::TcpStream::connect(proxy.address()).unwrap();
        assert_eq!(ask(&mut stream, 7).unwrap(), 7);
        proxy.refuse();
        assert!(ask(&mut stream, 8).is_err());
        assert!(net::TcpStream::connect(proxy.address()).is_err());
        proxy.open().unwrap();
        let mut stream = net::TcpStream::connect(proxy.address()).unwrap();
        assert_eq!(ask(&mut stream, 9).unwrap(), 9);
    }

    #[test]
    fn a_silent_direction_holds_what_it_is_given() {
        let mut proxy = Proxy::start(echo()).unwrap();
        let mut stream = net::TcpStream::connect(proxy.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        proxy.set(Lane::Open, Lane::Silent);
        assert!(ask(&mut stream, 1).is_err());
        proxy.open().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[0], 1);
    }
}
