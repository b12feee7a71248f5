//! Sessions that come, go and come again, and names that are kept.

use super::*;
use crate::catalog::seats::SeatRow;
use postgres_format::{SegmentSize, SystemIdentifier};

fn hello(instance: &str) -> (Hello, ServerIdentity) {
    let hello = Hello { instance: instance.to_owned(), ..Hello::default() };
    let server = ServerIdentity {
        system_identifier: SystemIdentifier::new(7),
        postgres_major: Some(15),
        segment_size: SegmentSize::DEFAULT,
    };
    (hello, server)
}

#[tokio::test]
async fn the_first_report_is_waited_for() {
    let (cluster, node, now) = names();
    let sessions = Sessions::default();
    sessions.settled(&cluster).await;
    let (hello, server) = hello("i1");
    let (seat, outbox) = sessions.enter(&cluster, &node, hello.clone(), server, now).unwrap();
    let heard = || sessions.state(&cluster, &node).unwrap().heard;
    assert_eq!(heard(), Heard::NotYet);
    let begun = Monotonic::now();
    sessions.settled(&cluster).await;
    assert!(begun.elapsed() >= FIRST_REPORT_WAIT);
    let reporting = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        sessions.report(&seat, Report::default(), now);
    };
    let begun = Monotonic::now();
    tokio::join!(sessions.settled(&cluster), reporting);
    assert!(begun.elapsed() < FIRST_REPORT_WAIT / 2);
    assert!(matches!(heard(), Heard::Ago(_)));
    // A session that came again knows what was said a moment ago.
    sessions.leave(&seat);
    drop(outbox);
    assert!(matches!(heard(), Heard::Gone(_)));
    let (_seat, _outbox) = sessions.enter(&cluster, &node, hello, server, now).unwrap();
    assert!(matches!(heard(), Heard::Ago(_)));
}

fn names() -> (ClusterName, NodeName, Timestamp) {
    ("main".parse().unwrap(), "a".parse().unwrap(), "2026-11-23T00:00:00Z".parse().unwrap())
}

#[tokio::test]
async fn a_session_is_replaced_only_by_its_own_data_directory() {
    let (cluster, node, now) = names();
    let sessions = Sessions::default();
    let enter = |instance: &str| {
        let (hello, server) = hello(instance);
        sessions.enter(&cluster, &node, hello, server, now)
    };
    let (first, _outbox) = enter("i1").unwrap();
    assert_eq!(enter("i2").unwrap_err().reason(), "NODE_TAKEN");
    let pushes = |instance: &str| sessions.expect_instance(&cluster, &node, instance);
    assert_eq!(pushes("i2").unwrap_err().reason(), "NODE_TAKEN");
    pushes("i1").unwrap();
    pushes("").unwrap();
    assert!(sessions.nodes(None)[0].rival.is_some());
    let (second, outbox) = enter("i1").unwrap();
    assert!(!sessions.is_seated(&first) && sessions.is_seated(&second));
    sessions.leave(&first);
    assert_eq!(sessions.connected(), 1);
    sessions.leave(&second);
    drop(outbox);
    assert_eq!(sessions.connected(), 0);
    assert_eq!(sessions.nodes(None).len(), 1);
    // The name is kept for a while, and an operator is told for how long.
    for refused in [pushes("i2"), enter("i2").map(|_| ())] {
        let refused = refused.unwrap_err();
        assert_eq!(refused.reason(), "NODE_TAKEN");
        assert!(refused.to_string().contains("gets in by itself in "), "{refused}");
    }
    enter("i1").unwrap();
}

#[tokio::test]
async fn a_name_outlives_a_restart_and_is_free_when_its_holder_stays_away() {
    let (cluster, node, now) = names();
    let (catalog, _thread, _) = Catalog::in_memory().unwrap();
    let row = SeatRow {
        cluster: cluster.clone(),
        node: node.clone(),
        instance: "i1".to_owned(),
        data_directory: "/data".to_owned(),
    };
    catalog.call(move |connection| seats::put(connection, &row)).await.unwrap();
    let enter = |sessions: &Sessions, instance: &str| {
        let (hello, server) = hello(instance);
        sessions.enter(&cluster, &node, hello, server, now)
    };
    let restarted = Sessions::load(&catalog, HOLD).await.unwrap();
    restarted.open();
    let refused = enter(&restarted, "i2").unwrap_err().to_string();
    assert!(refused.contains("in 60 s") && refused.contains("/data"), "{refused}");
    assert!(restarted.is_stranger(&cluster, &node, "i2") && !restarted.is_stranger(&cluster, &node, "i1"));
    restarted.expect_instance(&cluster, &node, "i1").unwrap();
    enter(&restarted, "i1").unwrap();
    // Whoever has a new spool gets in by itself.
    let restarted = Sessions::load(&catalog, Duration::from_millis(300)).await.unwrap();
    let begun = Monotonic::now();
    let entered = loop {
        match enter(&restarted, "i2") {
            Ok(entered) => break entered,
            Err(refused) => assert!(begun.elapsed() < Duration::from_secs(10), "{refused}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(begun.elapsed() >= Duration::from_millis(250));
    assert_eq!(enter(&restarted, "i1").unwrap_err().reason(), "NODE_TAKEN");
    drop(entered);
}

#[tokio::test]
async fn whoever_sends_without_a_session_keeps_its_name() {
    let (cluster, node, now) = names();
    let sessions = Sessions::default();
    sessions.lock().hold = Duration::from_millis(500);
    let (hello, server) = hello("i1");
    let (seat, outbox) = sessions.enter(&cluster, &node, hello, server, now).unwrap();
    sessions.leave(&seat);
    drop(outbox);
    let begun = Monotonic::now();
    while begun.elapsed() < Duration::from_secs(1) {
        assert!(!sessions.is_stranger(&cluster, &node, "i1"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(sessions.is_stranger(&cluster, &node, "i2"));
}

#[tokio::test]
async fn the_primary_answers_a_switch() {
    let (cluster, node, now) = names();
    let sessions = Sessions::default();
    let (hello, server) = hello("i1");
    let (seat, mut outbox) = sessions.enter(&cluster, &node, hello, server, now).unwrap();
    let wait = Duration::from_secs(5);
    let refusal = sessions.switch_wal(&cluster, Lsn::ZERO, wait, now).await.unwrap_err();
    assert!(refusal.to_string().contains("no primary"), "{refusal}");
    let report = Report { timeline: 1, server_reachable: true, ..Report::default() };
    sessions.report(&seat, report, now);
    let agent = async {
        let Some(Ok(SessionResponse { message: Some(session_response::Message::Order(order)) })) = outbox.recv().await
        else {
            panic!("no order came");
        };
        let running = OrderUpdate { operation: order.operation.clone(), state: 1, ..OrderUpdate::default() };
        assert!(sessions.answer(running).is_none());
        let done = OrderUpdate { operation: order.operation, state: 2, lsn: 9, ..OrderUpdate::default() };
        assert!(sessions.answer(done.clone()).is_none());
        assert!(sessions.answer(done).is_some());
    };
    let (switched, ()) = tokio::join!(sessions.switch_wal(&cluster, Lsn::ZERO, wait, now), agent);
    assert_eq!(switched.unwrap().lsn, Lsn::new(9));
}
