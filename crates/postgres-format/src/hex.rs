//! Strict hexadecimal fields, as PostgreSQL writes them in file names and LSNs.
//!
//! `u64::from_str_radix` accepts a leading `+`, so it is not used on input. Nothing here allocates or panics.

/// The value of 1 to 16 hexadecimal digits of either case, or `None` for anything else.
pub(crate) fn any_case(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    digits.iter().try_fold(0u64, |value, &digit| Some(value << 4 | u64::from(nibble(digit)?)))
}

/// The value of exactly eight upper-case hexadecimal digits (`%08X`), or `None` for anything else.
pub(crate) fn upper8(digits: &[u8]) -> Option<u32> {
    if digits.len() != 8 || digits.iter().any(u8::is_ascii_lowercase) {
        return None;
    }
    u32::try_from(any_case(digits)?).ok()
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_strict() {
        assert_eq!(any_case(b"fF"), Some(255));
        assert_eq!(any_case(b"FFFFFFFFFFFFFFFF"), Some(u64::MAX));
        for refused in [&b""[..], b"+1", b"0x1", b"-1", b" 1", b"00000000000000000", "١".as_bytes()] {
            assert_eq!(any_case(refused), None, "{refused:?}");
        }
        assert_eq!(upper8(b"0000001A"), Some(26));
        for refused in [&b"0000001a"[..], b"1A", b"00000001A", b"+000001A"] {
            assert_eq!(upper8(refused), None, "{refused:?}");
        }
    }
}
