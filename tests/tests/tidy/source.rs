//! The project's own files, and Rust source taken apart into code, comments and literals.
//!
//! The lexer knows just enough Rust for the rules: comments, string literals of all kinds, character literals versus lifetimes, and where
//! a `#[cfg(test)]` module begins and ends. It does not parse.

use std::fmt;
use std::path::{Path, PathBuf};

/// Directories of the top level that hold nothing of ours.
const NOT_OURS: [&str; 2] = ["target", ".git"];
/// Larger files are samples and lock files, not text of ours.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// All text files of the project.
pub(crate) struct Project {
    pub(crate) files: Vec<File>,
    /// Names of the top level, with directories.
    pub(crate) top: Vec<String>,
}

/// One text file.
pub(crate) struct File {
    /// From the top of the project, with `/`.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// Something that a rule does not allow.
#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) path: String,
    pub(crate) line: usize,
    pub(crate) what: String,
}

/// Rust source, taken apart. All three texts have the lines of the original.
pub(crate) struct Rust {
    /// Code with literals emptied and comments blanked.
    pub(crate) code: String,
    /// The content of every string literal, with the line it begins on.
    pub(crate) literals: Vec<(usize, String)>,
    /// Lines, from 1, that belong to a `#[cfg(test)]` module.
    test_lines: Vec<std::ops::RangeInclusive<usize>>,
}

impl Project {
    /// The project that this test is part of.
    pub(crate) fn whole() -> Self {
        let root = root();
        let mut files = Vec::new();
        let mut top = Vec::new();
        for entry in std::fs::read_dir(&root).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !NOT_OURS.contains(&name.as_str()) {
                collect(&root, &root.join(&name), &mut files);
                top.push(name);
            }
        }
        files.sort_by(|a: &File, b: &File| a.path.cmp(&b.path));
        assert!(files.len() > 100, "only {} files were found below {}", files.len(), root.display());
        Self { files, top }
    }

    /// A made-up project.
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        let files = files.iter().map(|(path, text)| File { path: (*path).to_owned(), text: (*text).to_owned() });
        Self { files: files.collect(), top: Vec::new() }
    }

    /// The Rust files.
    pub(crate) fn rust(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| file.path.ends_with(".rs"))
    }
}

impl File {
    pub(crate) fn find(&self, line: usize, what: impl Into<String>) -> Finding {
        Finding { path: self.path.clone(), line, what: what.into() }
    }

    /// Whether the whole file is test code.
    pub(crate) fn is_test(&self) -> bool {
        let path = self.path.as_str();
        path.starts_with("tests/")
            || path.contains("/tests/")
            || path.ends_with("/tests.rs")
            || path.ends_with("/samples.rs")
            || path.ends_with("/testing.rs")
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.what)
    }
}

/// The directory of the workspace.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn collect(root: &Path, path: &Path, files: &mut Vec<File>) {
    // Symbolic links are not followed, and what is no UTF-8 is no text.
    let kind = std::fs::symlink_metadata(path).unwrap();
    if kind.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            collect(root, &entry.unwrap().path(), files);
        }
    } else if kind.is_file()
        && kind.len() <= MAX_TEXT_BYTES
        && let Ok(text) = std::fs::read_to_string(path)
    {
        let path = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        files.push(File { path, text });
    }
}

impl Rust {
    pub(crate) fn read(text: &str) -> Self {
        let mut lexer = Lexer { rest: text, line: 1, code: String::with_capacity(text.len()), literals: Vec::new() };
        lexer.run();
        let test_lines = test_modules(&lexer.code);
        Self { code: lexer.code, literals: lexer.literals, test_lines }
    }

    pub(crate) fn is_test_line(&self, line: usize) -> bool {
        self.test_lines.iter().any(|lines| lines.contains(&line))
    }

    /// Lines of code with their numbers.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.code.lines())
    }
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    code: String,
    literals: Vec<(usize, String)>,
}

impl Lexer<'_> {
    fn run(&mut self) {
        while let Some(next) = self.rest.chars().next() {
            let identifier_before =
                self.code.chars().next_back().is_some_and(|last| last.is_alphanumeric() || last == '_');
            match next {
                '/' if self.rest.starts_with("//") => {
                    let end = self.rest.find('\n').unwrap_or(self.rest.len());
                    self.blank(end);
                }
                '/' if self.rest.starts_with("/*") => self.blank(comment_length(self.rest)),
                '"' => self.string(0, 1, "\"", true),
                'r' | 'b' | 'c' if !identifier_before => self.prefixed(),
                '\'' => self.quote(),
                _ => self.keep(next.len_utf8()),
            }
        }
    }

    /// Takes bytes over as code.
    fn keep(&mut self, bytes: usize) {
        let (kept, rest) = self.rest.split_at(bytes);
        self.line += kept.matches('\n').count();
        self.code.push_str(kept);
        self.rest = rest;
    }

    /// Drops bytes, but not their line ends.
    fn blank(&mut self, bytes: usize) {
        let (dropped, rest) = self.rest.split_at(bytes);
        let ends = dropped.matches('\n').count();
        self.line += ends;
        self.code.extend(std::iter::repeat_n('\n', ends));
        self.rest = rest;
    }

    /// A literal that opens with `prefix` and `open` bytes and ends with `close`.
    fn string(&mut self, prefix: usize, open: usize, close: &str, escapes: bool) {
        let body = &self.rest[prefix + open..];
        let mut end = 0;
        while end < body.len() && !body[end..].starts_with(close) {
            let step = if escapes && body[end..].starts_with('\\') { 1 } else { 0 };
            end += body[end..].chars().take(step + 1).map(char::len_utf8).sum::<usize>();
        }
        self.literals.push((self.line, body[..end].to_owned()));
        self.code.push_str("\"\"");
        self.blank((prefix + open + end + close.len()).min(self.rest.len()));
    }

    /// `r"…"`, `r#"…"#`, `b"…"`, `br"…"`, `b'…'`, `c"…"`, or an identifier.
    fn prefixed(&mut self) {
        let letters = self.rest.len() - self.rest.trim_start_matches(['r', 'b', 'c']).len();
        let after = &self.rest[letters..];
        let hashes = after.len() - after.trim_start_matches('#').len();
        let raw = self.rest[..letters].contains('r');
        if letters <= 2 && after[hashes..].starts_with('"') && (raw || hashes == 0) {
            let close = format!("\"{}", "#".repeat(hashes));
            self.string(letters, hashes + 1, &close, !raw);
        } else if letters == 1 && self.rest.starts_with("b'") {
            self.keep(1);
            self.quote();
        } else {
            self.keep(1);
        }
    }

    /// A character literal, or the mark of a lifetime.
    fn quote(&mut self) {
        let inside = &self.rest[1..];
        let length = match inside.chars().next() {
            Some('\\') => inside[2..].find('\'').map(|end| end + 4),
            Some(character) if inside[character.len_utf8()..].starts_with('\'') => Some(character.len_utf8() + 2),
            _ => None,
        };
        match length {
            Some(length) => {
                self.code.push_str("' '");
                self.blank(length);
            }
            None => self.keep(1),
        }
    }
}

fn comment_length(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The lines of modules behind `#[cfg(test)]` and the like, from their attribute to their closing brace.
fn test_modules(code: &str) -> Vec<std::ops::RangeInclusive<usize>> {
    let line_of = |at: usize| code[..at].matches('\n').count() + 1;
    let mut modules = Vec::new();
    for (start, attribute) in code.match_indices("#[cfg(") {
        let Some(close) = code[start..].find(']') else { continue };
        let condition = &code[start + attribute.len()..start + close];
        let behind = code[start + close + 1..].trim_start();
        let is_module = behind.starts_with("mod ") || behind.starts_with("pub(crate) mod ");
        let (brace, semicolon) = (behind.find('{'), behind.find(';'));
        if !condition.contains("test") || !is_module || semicolon < brace && semicolon.is_some() {
            continue;
        }
        let open = code.len() - behind.len() + brace.unwrap_or(0);
        let mut depth = 0;
        for (at, character) in code[open..].char_indices() {
            depth += i32::from(character == '{') - i32::from(character == '}');
            if depth == 0 {
                modules.push(line_of(start)..=line_of(open + at));
                break;
            }
        }
    }
    modules
}

#[test]
fn rust_is_taken_apart() {
    let text = "//! \"not\" code\nfn a<'x>(b: &'x str) -> char { '\"' } // \"no\"\nconst C: &str = \"c // \\\" d\"; /* \" /* */ */\n\
        const R: &str = r#\"raw \" one\"#; let b = b\"bytes\"; let e = '\\''; let z = bar\"\";\n\
        #[cfg(test)]\nmod tests {\n    fn t() { \"t{\" }\n}\nfn after() { \"end\" }\n";
    let rust = Rust::read(text);
    let literals: Vec<_> = rust.literals.iter().map(|(line, text)| (*line, text.as_str())).collect();
    assert_eq!(literals, [(3, "c // \\\" d"), (4, "raw \" one"), (4, "bytes"), (4, ""), (7, "t{"), (9, "end")]);
    assert_eq!(rust.code.lines().count(), text.lines().count());
    assert!(!rust.code.contains("not") && !rust.code.contains("raw"));
    assert_eq!((5..=9).map(|line| rust.is_test_line(line)).collect::<Vec<_>>(), [true, true, true, true, false]);
}
