//! Reads the text of `/metrics` strictly, for tests: what a scraper would refuse or misread is an error here.
//!
//! Every sample belongs to a family that was announced with type and help before it, families do not come twice, a counter's
//! sample ends with `_total`, no two samples are alike, values are numbers, and the text ends with `# EOF`.

use std::collections::{BTreeMap, BTreeSet};

/// One line with a value.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Its name, suffix included.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// A text that was read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Exposition {
    /// The type of each family.
    pub families: BTreeMap<String, String>,
    /// The samples.
    pub samples: Vec<Sample>,
}

impl Exposition {
    /// The names under which samples are found; a histogram's is its family's.
    pub fn names(&self) -> BTreeSet<String> {
        let suffix = |kind: &str| match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        self.families.iter().map(|(name, kind)| format!("{name}{}", suffix(kind))).collect()
    }

    /// The value of the sample with this name and exactly these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels: BTreeMap<String, String> =
            labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut found = self.samples.iter().filter(|sample| sample.name == name && sample.labels == labels);
        found.next().map(|sample| sample.value)
    }
}

/// The names in the first column of the tables below a heading of a page.
pub fn documented(page: &str, heading: &str) -> BTreeSet<String> {
    let below = page.lines().skip_while(|line| *line != heading).skip(1).take_while(|line| !line.starts_with("## "));
    let cells = below.filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    cells.map(|cell| cell.split('{').next().unwrap_or(cell).to_owned()).collect()
}

/// Reads a whole text.
///
/// # Errors
/// The first line that is wrong, and why.
pub fn read(text: &str) -> Result<Exposition, String> {
    let body = text.strip_suffix("# EOF\n").ok_or("the text does not end with # EOF")?;
    let mut read = Exposition::default();
    let mut helped = BTreeSet::new();
    let mut current = String::new();
    for line in body.lines() {
        let wrong = |why: &str| format!("{why}: {line}");
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let (word, name, value) = (words.next(), words.next().unwrap_or_default(), words.next());
            let value = value.filter(|value| !value.is_empty()).ok_or_else(|| wrong("nothing is said"))?;
            match word {
                Some("HELP") if helped.insert(name.to_owned()) => current = name.to_owned(),
                Some("TYPE") if read.families.insert(name.to_owned(), value.to_owned()).is_none() => {}
                Some("UNIT") if name.ends_with(&format!("_{value}")) => {}
                _ => return Err(wrong("said twice, or not understood")),
            }
            continue;
        }
        let sample = sample(line).ok_or_else(|| wrong("no sample"))?;
        let kind = read.families.get(&current).ok_or_else(|| wrong("no type"))?;
        let suffix = sample.name.strip_prefix(&current).ok_or_else(|| wrong("not of the family before it"))?;
        let suffixes: &[&str] = match kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => return Err(wrong("a type we do not use")),
        };
        if !suffixes.contains(&suffix) || sample.value.is_nan() {
            return Err(wrong("not a sample of its type"));
        }
        if read.samples.iter().any(|other| other.name == sample.name && other.labels == sample.labels) {
            return Err(wrong("twice"));
        }
        read.samples.push(sample);
    }
    if read.families.keys().any(|name| !helped.contains(name) || !is_name(name)) {
        return Err("a family without help, or with a wrong name".to_owned());
    }
    Ok(read)
}

fn is_name(name: &str) -> bool {
    name.starts_with("pgconvoy_") && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

fn sample(line: &str) -> Option<Sample> {
    let (place, value) = line.rsplit_once(' ')?;
    let (name, labels) = match place.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}')?),
        None => (place, ""),
    };
    let mut found = BTreeMap::new();
    let mut rest = labels;
    while !rest.is_empty() {
        let (label, after) = rest.split_once("=\"")?;
        let end = after.find('"')?;
        found.insert(label.to_owned(), after[..end].to_owned()).is_none().then_some(())?;
        rest = match &after[end + 1..] {
            "" => "",
            more => more.strip_prefix(',')?,
        };
    }
    Some(Sample { name: name.to_owned(), labels: found, value: value.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_scraper_would_misread_is_refused() {
        let good = "# HELP pgconvoy_a A.\n# TYPE pgconvoy_a counter\npgconvoy_a_total{b=\"c\",d=\"e\"} 3\n# EOF\n";
        let read_good = read(good).unwrap();
        assert_eq!(read_good.value("pgconvoy_a_total", &[("b", "c"), ("d", "e")]), Some(3.0));
        assert_eq!(read_good.names(), BTreeSet::from(["pgconvoy_a_total".to_owned()]));
        for (from, to) in [
            ("# EOF\n", ""),
            ("# TYPE pgconvoy_a counter\n", ""),
            ("# HELP pgconvoy_a A.\n", ""),
            ("pgconvoy_a_total{", "pgconvoy_a{"),
            ("pgconvoy_a_total{", "pgconvoy_b_total{"),
            ("} 3", "} three"),
            ("} 3", "} NaN"),
            ("d=\"e\"", "b=\"e\""),
            ("# EOF\n", "pgconvoy_a_total{b=\"c\",d=\"e\"} 4\n# EOF\n"),
            ("# EOF\n", "# TYPE pgconvoy_a counter\n# EOF\n"),
            ("counter", "counted"),
        ] {
            assert!(read(&good.replacen(from, to, 1)).is_err(), "{from} -> {to}");
        }
    }

    #[test]
    fn a_page_tells_names_below_a_heading() {
        let page = "## A\n| metric | meaning |\n|---|---|\n| `pgconvoy_a{b}` | c |\n## B\n| `pgconvoy_d` | e |\n";
        assert_eq!(documented(page, "## A"), BTreeSet::from(["pgconvoy_a".to_owned()]));
        assert_eq!(documented(page, "## C"), BTreeSet::new());
    }
}
