//! Sizes and spans of time as people write them in configuration files and on the command line.
//!
//! Sizes follow PostgreSQL: `kB`, `MB`, `GB`, `TB` are powers of 1024 and mean the same as `KiB`, `MiB`, `GiB`, `TiB`
//! ("Numeric with Unit" in the manual). A bare number is refused, except `0`, because it does not say what it counts.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes, written with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Size(u64);

/// A span of time, written with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span(Duration);

/// Why a text is no size or span.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// No number where one belongs.
    #[error("\"{0}\" does not start with a whole number; write a number with its unit, such as 16MiB or 60s")]
    NoNumber(String),
    /// A number that does not say what it counts.
    #[error("\"{text}\" has no unit; write one of {units}")]
    NoUnit {
        /// What was written.
        text: String,
        /// What may be written.
        units: &'static str,
    },
    /// A unit that does not exist.
    #[error("\"{unit}\" is not a unit; write one of {units}")]
    UnknownUnit {
        /// What was written.
        unit: String,
        /// What may be written.
        units: &'static str,
    },
    /// More than fits.
    #[error("\"{0}\" is too large; at most 2^64 - 1 bytes or microseconds fit")]
    TooLarge(String),
}

const SIZE_UNITS: &str = "B, kB, KiB, MB, MiB, GB, GiB, TB, TiB";
const SPAN_UNITS: &str = "us, ms, s, min, h, d";

impl Size {
    /// A size of this many bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// A size of this many MiB.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// Bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl Span {
    /// A span of this length.
    pub const fn from_duration(duration: Duration) -> Self {
        Self(duration)
    }

    /// A span of this many seconds.
    pub const fn from_seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// The length.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for Size {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = number_and_unit(text)?;
        let factor: u64 = match unit {
            "" if number == 0 => 1,
            "" => return Err(UnitError::NoUnit { text: text.to_owned(), units: SIZE_UNITS }),
            "B" => 1,
            "kB" | "KB" | "KiB" => 1 << 10,
            "MB" | "MiB" => 1 << 20,
            "GB" | "GiB" => 1 << 30,
            "TB" | "TiB" => 1 << 40,
            other => return Err(UnitError::UnknownUnit { unit: other.to_owned(), units: SIZE_UNITS }),
        };
        number.checked_mul(factor).map(Self).ok_or_else(|| UnitError::TooLarge(text.to_owned()))
    }
}

impl FromStr for Span {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = number_and_unit(text)?;
        let microseconds: u64 = match unit {
            "" if number == 0 => 1,
            "" => return Err(UnitError::NoUnit { text: text.to_owned(), units: SPAN_UNITS }),
            "us" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "min" => 60_000_000,
            "h" => 3_600_000_000,
            "d" => 86_400_000_000,
            other => return Err(UnitError::UnknownUnit { unit: other.to_owned(), units: SPAN_UNITS }),
        };
        number
            .checked_mul(microseconds)
            .map(|micros| Self(Duration::from_micros(micros)))
            .ok_or_else(|| UnitError::TooLarge(text.to_owned()))
    }
}

fn number_and_unit(text: &str) -> Result<(u64, &str), UnitError> {
    let trimmed = text.trim();
    let end = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (digits, unit) = trimmed.split_at(end);
    if digits.is_empty() {
        return Err(UnitError::NoNumber(text.to_owned()));
    }
    let number = digits.parse().map_err(|_| UnitError::TooLarge(text.to_owned()))?;
    Ok((number, unit.trim_start()))
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const STEPS: [(u64, &str); 4] = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        for (factor, unit) in STEPS {
            if self.0 >= factor && self.0.is_multiple_of(factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const STEPS: [(u128, &str); 5] =
            [(86_400_000_000, "d"), (3_600_000_000, "h"), (60_000_000, "min"), (1_000_000, "s"), (1_000, "ms")];
        let micros = self.0.as_micros();
        for (factor, unit) in STEPS {
            if micros >= factor && micros.is_multiple_of(factor) {
                return write!(f, "{}{unit}", micros / factor);
            }
        }
        if micros == 0 { f.write_str("0s") } else { write!(f, "{micros}us") }
    }
}

impl From<Span> for Duration {
    fn from(span: Span) -> Self {
        span.0
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer, "a size such as \"16MiB\"")
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer, "a span of time such as \"60s\" or \"5min\"")
    }
}

fn from_text<'de, D, T>(deserializer: D, expected: &'static str) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = UnitError>,
{
    struct Text<T>(&'static str, std::marker::PhantomData<T>);
    impl<T: FromStr<Err = UnitError>> de::Visitor<'_> for Text<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }
    }
    deserializer.deserialize_str(Text(expected, std::marker::PhantomData))
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_postgresql() {
        for (text, bytes) in [
            ("16MiB", 16 << 20),
            ("16MB", 16 << 20),
            ("16 MB", 16 << 20),
            ("8kB", 8192),
            ("1GB", 1 << 30),
            ("2TiB", 2 << 40),
            ("5B", 5),
            ("0", 0),
        ] {
            assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes, "{text}");
        }
        for text in ["", "MiB", "16", "-1MB", "16mb", "1.5GB", "99999999999999999999B", "99999999TB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn spans_carry_units() {
        for (text, millis) in
            [("60s", 60_000), ("5min", 300_000), ("1h", 3_600_000), ("2 d", 172_800_000), ("10ms", 10), ("0", 0)]
        {
            assert_eq!(text.parse::<Span>().unwrap().duration(), Duration::from_millis(millis), "{text}");
        }
        for text in ["", "60", "5m", "1 hour", "99999999999999d"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_shown_can_be_read() {
        for bytes in [0, 1, 1023, 1024, 16 << 20, (16 << 20) + 1, 3 << 40] {
            let size = Size::from_bytes(bytes);
            assert_eq!(size.to_string().parse(), Ok(size));
        }
        for micros in [0, 1, 1_000, 90_000_000, 3_600_000_000, 86_400_000_000] {
            let span = Span::from_duration(Duration::from_micros(micros));
            assert_eq!(span.to_string().parse(), Ok(span));
        }
    }
}
