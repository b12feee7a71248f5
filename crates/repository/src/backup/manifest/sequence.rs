//! What must hold between the lines of a manifest. Asked by who writes and by who reads.

use std::collections::HashMap;

use super::{End, File, Head, LAYERS, Layer, Line, ManifestDamage, Pack};
use crate::backup::pack::FileNumber;
use crate::name::BackupId;

/// The lines so far, as far as later ones depend on them.
pub(super) struct Sequence {
    backup: BackupId,
    block_size: u32,
    /// Whether the head says that files may have layers.
    layered: bool,
    /// Age of each backup that is referred to: the oldest has 0.
    ages: HashMap<BackupId, usize>,
    packs: Packs,
    last_file: Option<FileNumber>,
    rank: u8,
    line: u64,
    counts: End,
}

impl Sequence {
    /// After the head.
    pub(super) fn new(head: &Head) -> Result<Self, ManifestDamage> {
        let mut ages = HashMap::new();
        for (age, backup) in head.references.iter().enumerate() {
            if *backup == head.backup || ages.insert(*backup, age).is_some() {
                return Err(ManifestDamage::Reference { line: 1, what: "one backup twice or to itself" });
            }
        }
        Ok(Self {
            backup: head.backup,
            block_size: head.block_size,
            layered: head.critical.iter().any(|name| name == LAYERS),
            ages,
            packs: Packs::default(),
            last_file: None,
            rank: 0,
            line: 1,
            counts: End::default(),
        })
    }

    /// What came so far.
    pub(super) fn counts(&self) -> End {
        self.counts
    }

    /// Size of a pack that came, in bytes.
    pub(super) fn pack_bytes(&self, backup: Option<BackupId>, number: u32) -> Option<u64> {
        self.packs.size(backup, number)
    }

    /// Takes the next line, or says what is wrong with it.
    pub(super) fn admit(&mut self, line: &Line) -> Result<(), ManifestDamage> {
        self.line += 1;
        let order = |reason| Err(ManifestDamage::Order { line: self.line, reason });
        if line.rank() < self.rank.max(1) {
            return match line {
                Line::Head(_) => order("a second head"),
                _ => order("kinds come as head, tablespace, directory, link, pack, file, end"),
            };
        }
        self.rank = line.rank();
        match line {
            Line::Pack(pack) => self.admit_pack(pack)?,
            Line::File(file) => self.admit_file(file)?,
            Line::End(end) if *end != self.counts => return Err(ManifestDamage::Counts),
            _ => {}
        }
        self.counts.count(line);
        Ok(())
    }

    fn admit_pack(&mut self, pack: &Pack) -> Result<(), ManifestDamage> {
        self.check_backup(pack.backup)?;
        match self.packs.push(pack) {
            true => Ok(()),
            false => {
                let reason = "packs come by number, this backup's first and then others' by backup";
                Err(ManifestDamage::Order { line: self.line, reason })
            }
        }
    }

    /// Refuses a reference to a backup that the head does not name.
    fn check_backup(&self, backup: Option<BackupId>) -> Result<(), ManifestDamage> {
        let wrong = |what| Err(ManifestDamage::Reference { line: self.line, what });
        match backup {
            None => Ok(()),
            Some(backup) if backup == self.backup => wrong("its own backup by name"),
            Some(backup) if !self.ages.contains_key(&backup) => wrong("a backup that the head does not name"),
            Some(_) if !self.layered => wrong("another backup, and the head says nothing of layers"),
            Some(_) => Ok(()),
        }
    }

    fn admit_file(&mut self, file: &File) -> Result<(), ManifestDamage> {
        if self.last_file.is_some_and(|last| last >= file.number) {
            return Err(ManifestDamage::Order { line: self.line, reason: "files come in order of their numbers" });
        }
        self.last_file = Some(file.number);
        file.check_layers(self.block_size)?;
        if file.is_layered() && !self.layered {
            return Err(ManifestDamage::Reference { line: self.line, what: "layers, and the head does not" });
        }
        let wrong = |what| Err(ManifestDamage::Layers { path: file.path.to_string(), what });
        let mut younger = usize::MAX;
        for (index, layer) in file.layers.iter().enumerate() {
            self.check_backup(layer.backup)?;
            let age = match layer.backup {
                None if index > 0 => return wrong("a layer of this backup below another one"),
                None => continue,
                Some(backup) => self.ages[&backup],
            };
            if age >= younger {
                return wrong("layers that are not in the order of the head's references, newest first");
            }
            younger = age;
        }
        file.layers.iter().try_for_each(|layer| self.check_extents(file, layer))
    }

    fn check_extents(&self, file: &File, layer: &Layer) -> Result<(), ManifestDamage> {
        for extent in &layer.extents {
            if self.packs.size(layer.backup, extent.pack).is_none_or(|size| extent.end() > size) {
                let pack = match layer.backup {
                    None => extent.pack.to_string(),
                    Some(backup) => format!("{} of backup {backup}", extent.pack),
                };
                let path = file.path.to_string();
                return Err(ManifestDamage::Unlisted { path, pack, from: extent.offset, to: extent.end() });
            }
        }
        Ok(())
    }
}

/// Numbers and sizes of the packs of one backup.
type Sizes = Vec<(u32, u64)>;

/// Sizes of all packs, by backup and number.
#[derive(Default)]
struct Packs {
    by_backup: Vec<(Option<BackupId>, Sizes)>,
}

impl Packs {
    /// Adds a pack; not if it is out of order.
    fn push(&mut self, pack: &Pack) -> bool {
        match self.by_backup.last_mut() {
            Some((backup, packs)) if *backup == pack.backup => {
                if packs.last().is_some_and(|(number, _)| *number >= pack.number) {
                    return false;
                }
                packs.push((pack.number, pack.size));
                true
            }
            // None comes before every backup.
            Some((backup, _)) if *backup > pack.backup => false,
            _ => {
                self.by_backup.push((pack.backup, vec![(pack.number, pack.size)]));
                true
            }
        }
    }

    fn size(&self, backup: Option<BackupId>, number: u32) -> Option<u64> {
        let at = self.by_backup.binary_search_by_key(&backup, |(backup, _)| *backup).ok()?;
        let packs = &self.by_backup[at].1;
        packs.binary_search_by_key(&number, |(number, _)| *number).ok().map(|at| packs[at].1)
    }
}
