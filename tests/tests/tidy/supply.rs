//! What the programs are built from: licences that may be shipped, and libraries that may not be linked.
//!
//! `.deny.toml` holds the same rules for `cargo deny`; this needs nothing but cargo itself, so that it runs with every test.

use std::process::Command;

use crate::source::{self, root};

/// Licences that ask for no more than their notice.
const ALLOWED_LICENCES: [&str; 11] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Libraries that must not come in, by the back door of some feature either. One TLS stack, one provider of its cryptography.
const BANNED: [(&str, &str); 6] = [
    ("openssl-sys", "one TLS stack: rustls"),
    ("native-tls", "one TLS stack: rustls"),
    ("aws-lc-sys", "one cryptography provider: ring"),
    ("aws-lc-rs", "one cryptography provider: ring"),
    ("aws-config", "settings come from our configuration, never from the SDK's default chain, which asks the network"),
    ("reqwest", "one HTTP stack: hyper through tonic and the SDK"),
];

/// Libraries of which two major versions at once would be two stacks.
const SINGLE: [&str; 8] = ["rustls", "ring", "tokio", "hyper", "tonic", "prost", "zstd-sys", "libsqlite3-sys"];

struct Package {
    name: String,
    version: String,
    licence: Option<String>,
}

fn check_licence(expression: &str) -> Result<(), String> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let allowed = any_of(&tokens, &mut at);
    match allowed {
        Some(true) if at == tokens.len() => Ok(()),
        Some(false) if at == tokens.len() => Err(format!("{expression} is not allowed")),
        _ => Err(format!("{expression} is no licence expression")),
    }
}

/// `a OR b`, each of `AND`ed terms; `None` if it cannot be read.
fn any_of(tokens: &[&str], at: &mut usize) -> Option<bool> {
    let mut any = all_of(tokens, at)?;
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        any |= all_of(tokens, at)?;
    }
    Some(any)
}

fn all_of(tokens: &[&str], at: &mut usize) -> Option<bool> {
    let mut all = term(tokens, at)?;
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        all &= term(tokens, at)?;
    }
    Some(all)
}

fn term(tokens: &[&str], at: &mut usize) -> Option<bool> {
    let first = *tokens.get(*at)?;
    *at += 1;
    if first == "(" {
        let inside = any_of(tokens, at)?;
        let closed = tokens.get(*at) == Some(&")");
        *at += 1;
        return closed.then_some(inside);
    }
    let mut name = first.to_owned();
    if tokens.get(*at) == Some(&"WITH") {
        name = format!("{name} WITH {}", tokens.get(*at + 1)?);
        *at += 2;
    }
    Some(ALLOWED_LICENCES.contains(&name.as_str()))
}

fn check_packages(packages: &[Package]) -> Vec<String> {
    let mut findings = Vec::new();
    for Package { name, version, licence } in packages {
        match licence.as_deref().map(check_licence) {
            None => findings.push(format!("{name} {version} names no licence")),
            Some(Err(reason)) => findings.push(format!("{name} {version}: {reason}")),
            Some(Ok(())) => {}
        }
        findings.extend(
            BANNED.iter().filter(|(banned, _)| banned == name).map(|(_, reason)| format!("{name} {version}: {reason}")),
        );
    }
    for single in SINGLE {
        let versions: Vec<&str> =
            packages.iter().filter(|package| package.name == single).map(|package| package.version.as_str()).collect();
        if versions.len() > 1 {
            findings.push(format!("{single} comes in {} versions: {}", versions.len(), versions.join(", ")));
        }
    }
    findings
}

/// What is built for the platform that we ship for, as cargo resolves it from the lock file.
fn resolved() -> Vec<Package> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--format-version", "1", "--filter-platform", &platform])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| Package {
            name: text(&package["name"]).unwrap(),
            version: text(&package["version"]).unwrap(),
            licence: text(&package["license"]),
        })
        .collect()
}

/// Every package of the lock file, for all platforms and features, by name.
fn locked(lock: &str) -> Vec<String> {
    let table: toml::Table = lock.parse().unwrap();
    let packages = table["package"].as_array().unwrap().iter();
    packages.map(|package| package["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn licences_and_libraries_may_be_shipped() {
    let packages = resolved();
    assert!(packages.len() > 100, "only {} packages were resolved", packages.len());
    assert_eq!(check_packages(&packages), [""; 0]);
}

#[test]
fn banned_libraries_are_not_even_locked() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let names = locked(&lock);
    let banned: Vec<_> = BANNED.iter().filter(|(banned, _)| names.iter().any(|name| name == banned)).collect();
    assert!(banned.is_empty(), "{banned:?}");
}

#[test]
fn deny_settings_say_the_same() {
    let text = std::fs::read_to_string(root().join(".deny.toml")).unwrap();
    let settings: toml::Table = text.parse().unwrap();
    let allowed: Vec<&str> =
        settings["licenses"]["allow"].as_array().unwrap().iter().filter_map(toml::Value::as_str).collect();
    assert_eq!(allowed, ALLOWED_LICENCES);
    let denied = settings["bans"]["deny"].as_array().unwrap();
    for (banned, _) in BANNED {
        assert!(denied.iter().any(|entry| entry["crate"].as_str() == Some(banned)), "{banned} is not in .deny.toml");
    }
    for entry in denied.iter().chain(settings["advisories"]["ignore"].as_array().unwrap()) {
        assert!(entry["reason"].as_str().is_some_and(|reason| reason.len() > 10), "without a reason: {entry}");
    }
}

#[test]
fn the_rules_bite() {
    for good in [
        "MIT",
        "MIT OR GPL-3.0",
        "MIT/Apache-2.0",
        "(MIT OR GPL-2.0) AND ISC",
        "Apache-2.0 WITH LLVM-exception OR X",
        "GPL-3.0 OR MIT AND ISC",
    ] {
        assert_eq!(check_licence(good), Ok(()), "{good}");
    }
    for bad in [
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "(MIT OR ISC) AND AGPL-3.0",
        "",
        "MIT OR",
        "(MIT",
        "MIT ISC",
        "Apache-2.0 WITH X",
    ] {
        assert!(check_licence(bad).is_err(), "{bad}");
    }
    let package = |name: &str, version: &str, licence: Option<&str>| Package {
        name: name.to_owned(),
        version: version.to_owned(),
        licence: licence.map(str::to_owned),
    };
    let mit = Some("MIT");
    let bad = [
        package("a", "1.0.0", None),
        package("openssl-sys", "0.9.0", mit),
        package("rustls", "0.22.0", mit),
        package("rustls", "0.23.0", mit),
    ];
    assert_eq!(check_packages(&bad).len(), 3);
    assert_eq!(check_packages(&[package("rustls", "0.23.0", mit)]), [""; 0]);
    assert_eq!(locked("[[package]]\nname = \"x\"\nversion = \"1.0.0\"\n"), ["x"]);
    assert!(source::root().join("Cargo.toml").exists());
}
