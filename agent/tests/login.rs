//! What a real server says to a role that may not log in, and which rights a role of its own needs.
#![allow(clippy::unwrap_used)]
// The shared server has more than is used here.
#![allow(dead_code)]

mod server;

use std::error::Error;
use std::sync::Arc;

use agent::postgres::libpq::{Environment, Overrides};
use agent::postgres::{LocalServer, Server as _, ServerError, StartCheckpoint};
use server::{Server, scratch};

/// What README tells an administrator to run.
const README: &str = include_str!("../../README.md");

fn as_role(server: &Server, role: &str) -> Arc<LocalServer> {
    let overrides = Overrides { user: Some(role.to_owned()), ..Overrides::default() };
    Arc::new(LocalServer::new(server.data.clone(), overrides, Environment::default()))
}

/// The SQL block of README that makes the role.
fn grants() -> &'static str {
    let (_, rest) = README.split_once("```sql\n").expect("README has an SQL block");
    rest.split_once("```").expect("the block ends").0
}

#[tokio::test]
async fn a_refused_login_is_told_apart_from_a_server_that_is_down() {
    let scratch = scratch();
    let server = Server::new(scratch.path(), "one");
    server.start();
    let refused = as_role(&server, "nobody_here").position().await.unwrap_err();
    assert!(matches!(refused, ServerError::LoginRefused { .. }), "{refused:?}");
    assert!(refused.to_string().contains("refuses the login of role nobody_here"), "{refused}");
    let said = refused.source().unwrap().to_string();
    assert!(said.contains("role \"nobody_here\" does not exist"), "{said}");
    let agent = as_role(&server, "postgres");
    agent.position().await.unwrap();
    server.stop();
    let down = as_role(&server, "postgres").position().await.unwrap_err();
    assert!(matches!(down, ServerError::Unreachable { .. }), "{down:?}");
}

#[tokio::test]
async fn the_rights_that_readme_names_are_enough_and_needed() {
    let scratch = scratch();
    let server = Server::new(scratch.path(), "one");
    server.start();
    server.sql("CREATE ROLE bare LOGIN");
    let bare = as_role(&server, "bare");
    assert!(matches!(bare.identity().await, Err(ServerError::Hidden { .. })), "{:?}", bare.identity().await);
    assert!(matches!(bare.start_backup("x", StartCheckpoint::Fast).await, Err(ServerError::Hidden { .. })));
    for statement in grants().split(";\n").filter(|statement| !statement.trim().is_empty()) {
        server.sql(statement);
    }
    let own = as_role(&server, "pgconvoy");
    own.identity().await.unwrap();
    own.position().await.unwrap();
    own.archiver_state().await.unwrap();
    assert_eq!(own.archive_settings().await.unwrap().archive_mode, "on");
    own.tablespaces().await.unwrap();
    own.switch_wal().await.unwrap();
    own.start_backup("a test", StartCheckpoint::Fast).await.unwrap();
    own.check_backup().await.unwrap();
    let stopped = own.stop_backup().await.unwrap();
    assert!(!stopped.backup_label.is_empty() && stopped.next_xid.is_some());
}
