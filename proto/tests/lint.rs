//! The protos' style and their promise never to break a caller, as tests.
//!
//! `released.protoset` is the descriptor set callers may have been built with. What it holds must still be there with the
//! same number, type and cardinality. After an addition, `PGCONVOY_BLESS=1 cargo test -p proto` writes it anew; that
//! refuses to run while something is broken.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::source_code_info::Location;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};

fn current() -> FileDescriptorSet {
    FileDescriptorSet::decode(proto::DESCRIPTOR_SET).unwrap()
}

fn ours(set: &FileDescriptorSet) -> impl Iterator<Item = &FileDescriptorProto> {
    set.file.iter().filter(|file| file.package().starts_with("pgconvoy."))
}

fn snake_case(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn pascal_case(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase()) && name.chars().all(|c| c.is_ascii_alphanumeric())
}

fn screaming(name: &str) -> String {
    let mut text = String::new();
    for (index, c) in name.char_indices() {
        if c.is_ascii_uppercase() && index > 0 {
            text.push('_');
        }
        text.push(c.to_ascii_uppercase());
    }
    text
}

/// Paths of everything that has a comment before it.
fn commented(file: &FileDescriptorProto) -> BTreeSet<Vec<i32>> {
    let said = |location: &&Location| !location.leading_comments().trim().is_empty();
    let locations = &file.source_code_info.as_ref().expect("the descriptor set keeps comments").location;
    locations.iter().filter(said).map(|location| location.path.clone()).collect()
}

#[derive(Default)]
struct Complaints(Vec<String>);

impl Complaints {
    fn unless(&mut self, holds: bool, text: impl FnOnce() -> String) {
        if !holds {
            self.0.push(text());
        }
    }
}

fn lint_message(message: &DescriptorProto, path: &[i32], comments: &BTreeSet<Vec<i32>>, found: &mut Complaints) {
    let name = message.name();
    found.unless(pascal_case(name), || format!("message {name} is not PascalCase"));
    found.unless(comments.contains(path), || format!("message {name} has no comment"));
    for (index, field) in (0..).zip(&message.field) {
        let field_path = [path, &[2, index]].concat();
        found.unless(snake_case(field.name()), || format!("{name}.{} is not snake_case", field.name()));
        found.unless(comments.contains(&field_path), || format!("{name}.{} has no comment", field.name()));
    }
    found.unless(message.nested_type.is_empty() && message.enum_type.is_empty(), || format!("{name} nests types"));
}

fn lint_enum(item: &EnumDescriptorProto, path: &[i32], comments: &BTreeSet<Vec<i32>>, found: &mut Complaints) {
    let (name, prefix) = (item.name(), screaming(item.name()));
    found.unless(comments.contains(path), || format!("enum {name} has no comment"));
    let zero = item.value.iter().find(|value| value.number() == 0).map(|value| value.name());
    found.unless(zero == Some(&format!("{prefix}_UNSPECIFIED")), || {
        format!("enum {name} has no {prefix}_UNSPECIFIED = 0")
    });
    for (index, value) in (0..).zip(&item.value) {
        let value_path = [path, &[2, index]].concat();
        found.unless(value.name().starts_with(&format!("{prefix}_")), || format!("{} lacks {prefix}_", value.name()));
        found.unless(comments.contains(&value_path), || format!("{} has no comment", value.name()));
    }
}

fn lint_file(file: &FileDescriptorProto, found: &mut Complaints) {
    let comments = commented(file);
    let directory = file.package().replace('.', "/");
    found.unless(file.name().starts_with(&directory), || format!("{} does not lie in {directory}", file.name()));
    found.unless(file.syntax() == "proto3", || format!("{} is not proto3", file.name()));
    for (index, message) in (0..).zip(&file.message_type) {
        lint_message(message, &[4, index], &comments, found);
    }
    for (index, item) in (0..).zip(&file.enum_type) {
        lint_enum(item, &[5, index], &comments, found);
    }
    for (index, service) in (0..).zip(&file.service) {
        let name = service.name();
        found.unless(name.ends_with("Service"), || format!("service {name} does not end in Service"));
        found.unless(comments.contains(&vec![6, index]), || format!("service {name} has no comment"));
        for (number, method) in (0..).zip(&service.method) {
            let call = method.name();
            let type_name = |kind: &str| format!(".{}.{call}{kind}", file.package());
            found.unless(comments.contains(&vec![6, index, 2, number]), || format!("{name}.{call} has no comment"));
            found.unless(method.input_type() == type_name("Request"), || format!("{call} takes no {call}Request"));
            found.unless(method.output_type() == type_name("Response"), || format!("{call} answers no {call}Response"));
        }
    }
}

#[test]
fn the_protos_keep_to_the_style() {
    let mut found = Complaints::default();
    let set = current();
    assert_eq!(ours(&set).count(), 4);
    ours(&set).for_each(|file| lint_file(file, &mut found));
    assert!(found.0.is_empty(), "{:#?}", found.0);
}

/// Everything a caller may depend on, one line each: what it is called → what must not change about it.
fn promises(set: &FileDescriptorSet) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    for file in ours(set) {
        let package = file.package();
        for message in &file.message_type {
            lines.insert(format!("{package}.{}", message.name()), "message".to_owned());
            for field in &message.field {
                let kind: Type = field.r#type();
                let label: Label = field.label();
                let choice = field.oneof_index.map(|index| message.oneof_decl[index as usize].name().to_owned());
                lines.insert(
                    format!("{package}.{}#{}", message.name(), field.number()),
                    format!("{} {label:?} {kind:?} {} {choice:?}", field.name(), field.type_name()),
                );
            }
        }
        for item in &file.enum_type {
            for value in &item.value {
                lines.insert(format!("{package}.{}#{}", item.name(), value.number()), value.name().to_owned());
            }
        }
        for service in &file.service {
            for method in &service.method {
                let streams = (method.client_streaming(), method.server_streaming());
                lines.insert(format!("{package}.{}/{}", service.name(), method.name()), format!("{streams:?}"));
            }
        }
    }
    lines
}

fn broken(released: &FileDescriptorSet, now: &FileDescriptorSet) -> Vec<String> {
    let now = promises(now);
    let change = |(name, promise): (String, String)| match now.get(&name) {
        None => Some(format!("{name} is gone; it was {promise}")),
        Some(found) if *found != promise => Some(format!("{name} was {promise} and is {found}")),
        Some(_) => None,
    };
    promises(released).into_iter().filter_map(change).collect()
}

fn without_comments(mut set: FileDescriptorSet) -> FileDescriptorSet {
    set.file.retain(|file| file.package().starts_with("pgconvoy."));
    set.file.iter_mut().for_each(|file| file.source_code_info = None);
    set
}

#[test]
fn nothing_released_changes() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("released.protoset");
    let now = without_comments(current());
    let released = FileDescriptorSet::decode(std::fs::read(&path).unwrap().as_slice()).unwrap();
    let breaks = broken(&released, &now);
    assert!(breaks.is_empty(), "{breaks:#?}");
    if std::env::var_os("PGCONVOY_BLESS").is_some() {
        std::fs::write(&path, now.encode_to_vec()).unwrap();
    } else {
        let (released, now) = (promises(&released), promises(&now));
        let new: Vec<_> = now.keys().filter(|name| !released.contains_key(*name)).collect();
        assert!(new.is_empty(), "additions that released.protoset lacks, run with PGCONVOY_BLESS=1: {new:#?}");
    }
}

#[test]
fn a_renumbered_field_and_a_removed_call_are_noticed() {
    let released = current();
    let mut now = current();
    let file = now.file.iter_mut().find(|file| file.package() == "pgconvoy.store.v1").unwrap();
    file.message_type.iter_mut().find(|message| message.name() == "Store").unwrap().field[1].number = Some(9);
    file.service[0].method.pop();
    let breaks = broken(&released, &now);
    assert_eq!(breaks.len(), 2, "{breaks:#?}");
}
