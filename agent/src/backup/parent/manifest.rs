//! The parent's manifest on local disk, read as often as needed, line by line.
//!
//! It names files in the order in which backups copy them, and so does ours: both are walked side by side, and memory does
//! not grow with the number of files. A line out of that order is passed over, whereupon its file is copied whole.

use std::cmp::Ordering;
use std::fs::File as DiskFile;
use std::path::Path;
use std::sync::Arc;

use repository::backup::manifest::{File, Line, ManifestDamage, ManifestReader};

use crate::backup::plan;
use crate::from_start::FromStart;

/// A manifest that was compared with what the root says of it.
#[derive(Clone, Debug)]
pub struct ParentManifest {
    file: Arc<DiskFile>,
}

impl ParentManifest {
    /// Of a verified file.
    pub fn new(file: DiskFile) -> Self {
        Self { file: Arc::new(file) }
    }

    /// Its lines after the head, from the first one.
    pub fn lines(&self) -> Result<ManifestReader<FromStart>, ManifestDamage> {
        ManifestReader::new(FromStart::of(&self.file))
    }

    /// Its files, to be asked for in the order of a plan.
    pub fn files(&self) -> Result<ParentFiles<ManifestReader<FromStart>>, ManifestDamage> {
        Ok(ParentFiles::new(self.lines()?))
    }
}

/// File lines of a manifest beside a plan's files.
pub struct ParentFiles<I> {
    lines: I,
    next: Option<Box<File>>,
}

impl<I: Iterator<Item = Result<Line, ManifestDamage>>> ParentFiles<I> {
    /// Over lines of a manifest.
    pub fn new(lines: I) -> Self {
        Self { lines, next: None }
    }

    /// What it says of a file. Paths must be asked for in ascending order of [`plan::compare`].
    pub fn find(&mut self, path: &Path) -> Result<Option<File>, ManifestDamage> {
        loop {
            if self.next.is_none() {
                self.next = self.next_file()?;
            }
            let Some(next) = self.next.take() else { return Ok(None) };
            match plan::compare(next.path.as_path(), path) {
                Ordering::Less => {}
                Ordering::Equal => return Ok(Some(*next)),
                Ordering::Greater => {
                    self.next = Some(next);
                    return Ok(None);
                }
            }
        }
    }

    fn next_file(&mut self) -> Result<Option<Box<File>>, ManifestDamage> {
        for line in self.lines.by_ref() {
            if let Line::File(file) = line? {
                return Ok(Some(Box::new(file)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use repository::backup::manifest::FileKind;
    use repository::backup::pack::FileNumber;
    use repository::byte_text::RelativePath;

    use super::*;

    fn line(path: &str) -> Result<Line, ManifestDamage> {
        Ok(Line::File(File {
            number: FileNumber(0),
            path: RelativePath::new(path).unwrap(),
            kind: FileKind::Relation,
            mode: 0o600,
            mtime: 0,
            size: 0,
            crc32c: Some(0),
            layers: Vec::new(),
        }))
    }

    #[test]
    fn files_are_found_in_the_order_of_plans() {
        let lines = ["base/1/9", "base/1/9.2", "base/1/9.10", "base/1/10", "global/1"];
        let mut files = ParentFiles::new(lines.into_iter().map(line));
        let mut found = |path: &str| files.find(Path::new(path)).unwrap().is_some();
        assert!(found("base/1/9"));
        assert!(!found("base/1/9.1"));
        assert!(found("base/1/9.10"));
        assert!(!found("base/1/11"));
        assert!(found("global/1"));
        assert!(!found("global/2"));
    }

    #[test]
    fn what_is_out_of_order_is_passed_over() {
        let lines = ["base/1/9", "base/1/8", "base/1/10"];
        let mut files = ParentFiles::new(lines.into_iter().map(line));
        let found: Vec<bool> = ["base/1/8", "base/1/9", "base/1/10"]
            .into_iter()
            .map(|path| files.find(Path::new(path)).unwrap().is_some())
            .collect();
        assert_eq!(found, [false, true, true]);
    }
}
