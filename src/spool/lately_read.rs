//! The photo files that were read whole a moment ago, and are those of their uploads.
//!
//! A photo is mostly removed soon after the drain has read it, and to read its record once more from the disk, only to see that the
//! file is still that photo's, costs as much as the removal. Always: a file is known again by its inode and the moment of that one's
//! last change, so that another in its place is not. Never: more than [`FILES_MAX`]; what is forgotten is read again.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use crate::upload::{Sha256, UploadId};

/// More than are removed in two seconds, and some 180 KiB.
const FILES_MAX: usize = 1024;

#[derive(Default)]
pub(super) struct LatelyRead {
    files: Mutex<HashMap<UploadId, (Sha256, Stamp)>>,
}

/// Which file it is, and that nothing has happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(file: &Metadata) -> Stamp {
        let changed = (file.ctime(), file.ctime_nsec());
        Stamp { device: file.dev(), inode: file.ino(), bytes: file.len(), changed }
    }
}

impl LatelyRead {
    /// The file of this upload was read whole, and holds a photo of this digest.
    pub(super) fn note(&self, id: UploadId, sha256: Sha256, stamp: Stamp) {
        let mut files = self.files();
        if files.len() >= FILES_MAX {
            // they stay for longer than a moment, so that nothing is won by them
            files.clear();
        }
        files.insert(id, (sha256, stamp));
    }

    /// Whether what is at `path` is still the file that was read for this upload, with a photo of this digest. It is asked
    /// once.
    pub(super) fn is_still(&self, id: UploadId, sha256: Sha256, path: &Path) -> bool {
        let Some((read, stamp)) = self.files().remove(&id) else { return false };
        // opened, as a network file system looks itself only then
        let file = || File::open(path).and_then(|file| file.metadata());
        read == sha256 && file().is_ok_and(|file| Stamp::of(&file) == stamp)
    }

    fn files(&self) -> MutexGuard<'_, HashMap<UploadId, (Sha256, Stamp)>> {
        self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn sha256(photo: &[u8]) -> Sha256 {
        Sha256::of(photo)
    }

    #[test]
    fn a_file_is_known_again_once_and_only_for_its_own_photo() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("photo");
        fs::write(&path, b"one").unwrap();
        let (id, stamp) = (UploadId::new(), Stamp::of(&fs::metadata(&path).unwrap()));
        let lately_read = LatelyRead::default();
        assert!(!lately_read.is_still(id, sha256(b"one"), &path));
        lately_read.note(id, sha256(b"one"), stamp);
        assert!(!lately_read.is_still(id, sha256(b"two"), &path));
        lately_read.note(id, sha256(b"one"), stamp);
        assert!(lately_read.is_still(id, sha256(b"one"), &path));
        assert!(!lately_read.is_still(id, sha256(b"one"), &path));
    }

    #[test]
    fn another_file_in_its_place_is_not_known() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("photo"), folder.path().join("other"));
        fs::write(&path, b"one").unwrap();
        fs::write(&other, b"one").unwrap();
        let id = UploadId::new();
        let lately_read = LatelyRead::default();
        lately_read.note(id, sha256(b"one"), Stamp::of(&fs::metadata(&path).unwrap()));
        fs::rename(&other, &path).unwrap();
        assert!(!lately_read.is_still(id, sha256(b"one"), &path));
    }

    #[test]
    fn no_more_are_known_than_may_be() {
        let folder = tempfile::tempdir().unwrap();
        let stamp = Stamp::of(&fs::metadata(folder.path()).unwrap());
        let lately_read = LatelyRead::default();
        for _ in 0..2 * FILES_MAX + 1 {
            lately_read.note(UploadId::new(), sha256(b"one"), stamp);
        }
        assert_eq!(lately_read.files().len(), 1);
    }
}
