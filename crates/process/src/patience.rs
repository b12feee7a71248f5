//! Patiences that are constants of the program and longer than a test may wait.
//!
//! With the feature `crash-points`, the environment variable `PGCONVOY_PATIENCE` shortens them: `NAME=SECONDS`, several
//! separated by commas. Without the feature a patience is what the program says.

use std::time::Duration;

/// How long to wait: `longest`, unless a test wants less.
#[must_use]
pub fn patience(name: &'static str, longest: Duration) -> Duration {
    #[cfg(feature = "crash-points")]
    return shortened::all().and_then(|text| wanted(text, name)).map_or(longest, |wanted| wanted.min(longest));
    #[cfg(not(feature = "crash-points"))]
    {
        let _ = name;
        longest
    }
}

/// What a text of `NAME=SECONDS` says of a name.
#[cfg(any(test, feature = "crash-points"))]
fn wanted(text: &str, name: &str) -> Option<Duration> {
    let named = text.split(',').filter_map(|one| one.split_once('=')).find(|(known, _)| *known == name);
    named.and_then(|(_, seconds)| seconds.parse().ok()).map(Duration::from_secs)
}

#[cfg(feature = "crash-points")]
mod shortened {
    use std::sync::OnceLock;

    static WANTED: OnceLock<Option<String>> = OnceLock::new();

    pub(super) fn all() -> Option<&'static str> {
        WANTED.get_or_init(|| std::env::var_os("PGCONVOY_PATIENCE")?.into_string().ok()).as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_has_its_seconds() {
        let text = "agent/one=5,agent/other=12";
        assert_eq!(wanted(text, "agent/one"), Some(Duration::from_secs(5)));
        assert_eq!(wanted(text, "agent/other"), Some(Duration::from_secs(12)));
        assert_eq!(wanted(text, "agent"), None);
        assert_eq!(wanted("agent/one=soon", "agent/one"), None);
        assert_eq!(patience("tests/never", Duration::from_secs(7)), Duration::from_secs(7));
    }
}
