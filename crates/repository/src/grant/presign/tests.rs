//! Against what AWS publishes and what botocore 1.44.5 signs.

use jiff::Timestamp;

use super::*;
use crate::config::{Checksums, SecretSource};
use crate::key::ObjectKey;

const ID: &str = "AKIAIOSFODNN7EXAMPLE";
const NODE_PREFIX: &str = "drop/main/db-1/000102030405060708090a0b0c0d0e0f";

fn secret() -> Secret {
    Secret::new("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
}

fn store(endpoint: Option<&str>, region: &str, prefix: &str) -> S3Config {
    S3Config {
        endpoint: endpoint.map(str::to_owned),
        region: region.to_owned(),
        bucket: "backups".to_owned(),
        prefix: prefix.to_owned(),
        path_style: endpoint.is_some(),
        access_key_id: ID.to_owned(),
        secret_access_key: SecretSource::Given(secret()),
        ca_file: None,
        checksums: Checksums::Auto,
    }
}

fn signer(store: &S3Config) -> SlotSigner {
    SlotSigner::new(store, &secret(), "2026-11-24T03:30:00Z".parse().unwrap()).unwrap()
}

fn key(slot: &str) -> ObjectKey {
    ObjectKey::parse(&format!("{NODE_PREFIX}/{slot}")).unwrap()
}

/// The example of "Authenticating Requests: Using Query Parameters" in the documentation of Amazon S3.
#[test]
fn the_published_example_is_signed_as_published() {
    let dated: Timestamp = "2013-05-24T00:00:00Z".parse().unwrap();
    let day_key = DayKey::new(&secret(), dated, "us-east-1");
    let query = query(ID, &day_key, Duration::from_secs(86400), "host");
    let request = format!("GET\n/test.txt\n{query}\nhost:examplebucket.s3.amazonaws.com\n\nhost\nUNSIGNED-PAYLOAD");
    let signature = to_hex(&day_key.sign(&request));
    assert_eq!(signature, "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404");
}

#[test]
fn slots_are_signed_as_botocore_signs_them() {
    let cases = [
        (
            store(Some("https://s3.example.net:9000"), "eu-central-1", "fleet"),
            (key("0000"), SizeClass::Tiny),
            "https://s3.example.net:9000/backups/fleet/",
            "aa3260619a1c1904238e5f70c106415211b3881cac3a09330c20b948c4aaa2f7",
        ),
        (
            store(None, "eu-central-1", ""),
            (key("2fff"), SizeClass::Huge),
            "https://backups.s3.eu-central-1.amazonaws.com/",
            "36c6d4cb97f8cae3ae77f51881e3b0f1cfb7add440bd527a4870fa5854a06c4a",
        ),
        (
            store(Some("http://127.0.0.1:9000/"), "garage", ""),
            (key("0001"), SizeClass::Small),
            "http://127.0.0.1:9000/backups/",
            "018478fe74def276534055a566f184f18f6ded8b3489b7858d5189377402c513",
        ),
    ];
    for (store, (key, class), start, signature) in cases {
        let signer = signer(&store);
        let expected = format!(
            "{start}{key}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={ID}%2F20261124%2F{}%2Fs3%2Faws4_request\
             &X-Amz-Date=20261124T032500Z&X-Amz-Expires=604800\
             &X-Amz-SignedHeaders=content-length%3Bhost%3Bif-none-match&X-Amz-Signature={signature}",
            store.region,
        );
        assert_eq!(signer.template().url(&key, &signer.sign(&key, class)), expected);
    }
}

#[test]
fn a_signature_is_good_for_one_key_and_one_length() {
    let signer = signer(&store(None, "eu-central-1", ""));
    let signature = signer.sign(&key("0000"), SizeClass::Tiny);
    assert_ne!(signature, signer.sign(&key("0001"), SizeClass::Tiny));
    assert_ne!(signature, signer.sign(&key("0000"), SizeClass::Small));
}

#[test]
fn a_port_that_the_scheme_implies_is_not_in_the_signed_host() {
    let named = signer(&store(Some("https://s3.example.net:443"), "r", ""));
    assert_eq!(named.template(), signer(&store(Some("https://s3.example.net"), "r", "")).template());
}

#[test]
fn slots_end_seven_days_after_a_date_before_the_stores() {
    let signer = signer(&store(None, "eu-central-1", ""));
    assert_eq!(signer.not_after(), "2026-12-01T03:25:00Z".parse().unwrap());
    assert!(SlotSigner::new(&store(None, "r", ""), &secret(), Timestamp::MAX).is_none());
}

#[test]
fn an_endpoint_with_a_path_has_no_slots() {
    let store = store(Some("https://example.net/s3"), "r", "");
    assert!(SlotSigner::new(&store, &secret(), Timestamp::UNIX_EPOCH).is_none());
}

#[test]
fn neither_secret_nor_key_is_printed() {
    let signer = signer(&store(None, "eu-central-1", ""));
    let printed = format!("{signer:?}");
    assert!(printed.contains(ID), "{printed}");
    assert!(!printed.contains("wJalr") && !printed.contains("DayKey"), "{printed}");
}

#[test]
fn a_content_goes_into_the_smallest_class_that_holds_it() {
    assert_eq!(SizeClass::ALL.map(SizeClass::bytes), [256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]);
    for class in SizeClass::ALL {
        assert_eq!(SizeClass::holding(class.bytes()), Some(class));
        let next = SizeClass::ALL.into_iter().find(|other| *other > class);
        assert_eq!(SizeClass::holding(class.bytes() + 1), next);
    }
}

/// RFC 4231, test cases 2 and 6.
#[test]
fn authentication_codes_are_those_of_the_rfc() {
    let short = hmac(b"Jefe", b"what do ya want for nothing?");
    assert_eq!(to_hex(&short), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    let long = hmac(&[0xaa; 131], b"Test Using Larger Than Block-Size Key - Hash Key First");
    assert_eq!(to_hex(&long), "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}
