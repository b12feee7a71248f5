//! The array against what pgBackRest itself printed, 2.45 and 2.60, of a cluster with a full, a diff and an incr.

use std::collections::BTreeMap;

use super::*;

const THEIRS: [&str; 2] = [include_str!("sample-2.45.json"), include_str!("sample-2.60.json")];
const OURS: &str = include_str!("sample.json");

fn ours() -> Info {
    serde_json::from_str(OURS).unwrap()
}

/// Every place in a value and the types found there; places in an array are one.
fn shape(value: &Value, place: &str, into: &mut BTreeMap<String, Vec<&'static str>>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_u64() => "whole number",
        Value::Number(_) => "number",
        Value::String(_) => "text",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let kinds = into.entry(place.to_owned()).or_default();
    if !kinds.contains(&kind) {
        kinds.push(kind);
        kinds.sort_unstable();
    }
    match value {
        Value::Array(items) => items.iter().for_each(|item| shape(item, &format!("{place}[]"), into)),
        Value::Object(fields) => fields.iter().for_each(|(name, item)| shape(item, &format!("{place}.{name}"), into)),
        _ => {}
    }
}

fn shape_of(value: &Value) -> BTreeMap<String, Vec<&'static str>> {
    let mut places = BTreeMap::new();
    shape(value, "", &mut places);
    places
}

#[test]
fn every_field_of_theirs_is_there_with_its_type() {
    let ours = shape_of(&render(&ours()));
    for theirs in THEIRS {
        for (place, kinds) in shape_of(&serde_json::from_str(theirs).unwrap()) {
            assert_eq!(ours.get(&place), Some(&kinds), "{place}");
        }
    }
    let newest = shape_of(&serde_json::from_str(THEIRS[1]).unwrap());
    let more: Vec<&String> = ours.keys().filter(|place| !newest.contains_key(*place)).collect();
    assert_eq!(more, ["[].backup[].annotation", "[].backup[].annotation.label", "[].backup[].annotation.node"]);
}

#[test]
fn backups_are_listed_by_store_with_what_they_refer_to() {
    let report = render(&ours());
    let backups = report[0]["backup"].as_array().unwrap();
    let told: Vec<(&str, u64)> = backups
        .iter()
        .map(|one| (one["type"].as_str().unwrap(), one["database"]["repo-key"].as_u64().unwrap()))
        .collect();
    assert_eq!(told, [("full", 1), ("full", 2), ("diff", 1), ("incr", 1)]);
    assert_eq!(backups[3]["prior"], "20261124T030804Z-00000002");
    assert_eq!(backups[3]["reference"], json!(["20261124T030801Z-00000001", "20261124T030804Z-00000002"]));
    assert_eq!(backups[3]["info"], json!({"delta": 100, "repository": {"delta": 10, "size": 100}, "size": 1000}));
    assert_eq!(backups[0]["archive"], json!({"start": "000000010000000000000002", "stop": "000000010000000000000002"}));
    assert_eq!(backups[0]["timestamp"], json!({"start": 1_795_489_681, "stop": 1_795_489_684}));
}

#[test]
fn a_store_that_lacks_the_newest_wal_does_not_claim_it() {
    let report = render(&ours());
    let archive =
        |place: usize| (report[0]["archive"][place]["min"].clone(), report[0]["archive"][place]["max"].clone());
    assert_eq!(archive(0), (json!("000000010000000000000001"), json!("000000010000000000000006")));
    assert_eq!(archive(1), (json!("000000010000000000000001"), json!("000000010000000000000004")));
}

#[test]
fn codes_are_theirs() {
    let mut info = ours();
    assert_eq!(render(&info)[0]["status"]["code"], 0);
    info.clusters[0].stores[1].state = StoreState::Unreachable;
    info.clusters[0].stores[1].detail = Some("no route to host".to_owned());
    let report = render(&info);
    assert_eq!(report[0]["status"]["code"], 4);
    assert_eq!(report[0]["repo"][1]["status"], json!({"code": 99, "message": "[StoreUnreachable] no route to host"}));
    info.clusters[0].backups.clear();
    info.clusters[0].stores.truncate(1);
    assert_eq!(render(&info)[0]["status"]["code"], 2);
    info.clusters[0].systems.clear();
    assert_eq!(render(&info)[0]["status"]["code"], 1);
}

#[test]
fn a_running_backup_holds_their_lock() {
    let mut info = ours();
    info.clusters[0].fleet.as_mut().unwrap().operations[0].state = "running".to_owned();
    let lock = &render(&info)[0]["status"]["lock"];
    assert_eq!(lock["backup"], json!({"held": true, "size": 1000, "size-cplt": 250}));
}
