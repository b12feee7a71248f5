//! A blocking SQL session over a server's socket.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::{PORT, Server};
use crate::runtime;

/// Longest wait for a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Longest wait for a statement.
const STATEMENT_PATIENCE: Duration = Duration::from_secs(120);

/// One connection.
#[derive(Debug)]
pub struct Session {
    client: Client,
    connection: JoinHandle<()>,
}

impl Session {
    /// Connects to database `postgres` as `postgres`.
    pub fn open(server: &Server) -> Result<Self> {
        let mut config = Config::new();
        config
            .host_path(server.host())
            .port(PORT)
            .user("postgres")
            .dbname("postgres")
            .connect_timeout(CONNECT_PATIENCE);
        runtime::block_on(async {
            let (client, connection) = tokio::time::timeout(CONNECT_PATIENCE, config.connect(NoTls))
                .await
                .with_context(|| format!("{} did not answer", server.name()))?
                .with_context(|| format!("cannot connect to {}", server.name()))?;
            // The connection's own error is told by the statement that meets it.
            let connection = tokio::spawn(async move {
                let _ = connection.await;
            });
            Ok(Self { client, connection })
        })
    }

    /// Runs one or several statements; rows of all of them, NULL as the empty text.
    pub fn rows(&mut self, statement: &str) -> Result<Vec<Vec<String>>> {
        let messages = runtime::block_on(async {
            tokio::time::timeout(STATEMENT_PATIENCE, self.client.simple_query(statement))
                .await
                .with_context(|| format!("no answer in time: {statement}"))?
                .with_context(|| statement.to_owned())
        })?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|column| row.get(column).unwrap_or_default().to_owned()).collect())
            }
            _ => None,
        });
        Ok(rows.collect())
    }

    /// The first column of the first row.
    pub fn text(&mut self, statement: &str) -> Result<String> {
        let rows = self.rows(statement)?;
        let first = rows.into_iter().next().and_then(|row| row.into_iter().next());
        first.with_context(|| format!("no row: {statement}"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Whether the server accepts connections now.
pub fn answers(server: &Server) -> bool {
    Session::open(server).and_then(|mut session| session.text("select 1")).is_ok()
}
