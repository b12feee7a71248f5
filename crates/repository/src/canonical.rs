//! Canonical JSON: one text for one value, so that equal values have equal digests.
//!
//! Keys in byte order, no white space, UTF-8 with only the escapes that JSON demands, numbers only as integers. A
//! program in any language that writes JSON with sorted keys and without white space produces the same bytes.

use serde::Serialize;
use serde_json::Value;

/// The canonical text of a value. Fails for values that JSON cannot hold, such as maps with keys that are no text.
pub fn canonical_json(value: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = Vec::new();
    append(&serde_json::to_value(value)?, &mut text)?;
    Ok(text)
}

fn append(value: &Value, text: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    match value {
        Value::Object(fields) => {
            // The map keeps insertion order if any crate of the build asks serde_json for that.
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_by(|(left, _), (right, _)| left.as_bytes().cmp(right.as_bytes()));
            text.push(b'{');
            for (index, (name, value)) in fields.into_iter().enumerate() {
                if index > 0 {
                    text.push(b',');
                }
                serde_json::to_writer(&mut *text, name)?;
                text.push(b':');
                append(value, text)?;
            }
            text.push(b'}');
        }
        Value::Array(values) => {
            text.push(b'[');
            for (index, value) in values.iter().enumerate() {
                if index > 0 {
                    text.push(b',');
                }
                append(value, text)?;
            }
            text.push(b']');
        }
        plain => serde_json::to_writer(&mut *text, plain)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sorted_at_every_depth() {
        let value: Value = serde_json::from_str(r#" {"b": [1, {"z": null, "a": "ä\n"}], "a": true} "#).unwrap();
        let text = String::from_utf8(canonical_json(&value).unwrap()).unwrap();
        assert_eq!(text, r#"{"a":true,"b":[1,{"a":"ä\n","z":null}]}"#);
    }
}
