//! The ballast: some megabytes of the spool's disk that are held in order to be given up.
//!
//! On a disk that is full to the last byte (a reserve of nothing, or another program's doing) an embedded queue cannot write
//! that a photo may leave, and so none ever would. Always: given up when the disk is as good as full, and held again when
//! there is room to spare. Never: counted as room for photos.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

/// What an embedded queue needs until the first photos have left.
const BYTES_MAX: u64 = 16 * 1024 * 1024;
/// No more than this part of a small disk.
const PART_MAX: u64 = 8;

pub(super) struct Ballast {
    pub(super) path: PathBuf,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tended {
    Left,
    GivenUp,
    HeldAgain,
}

impl Ballast {
    /// Bytes that must stay free for it on a disk of this size: none while it is held.
    pub(super) fn missing_bytes(&self, total_bytes: u64) -> u64 {
        if self.is_held(total_bytes) { 0 } else { bytes(total_bytes) }
    }

    /// Whether `more` bytes find room that is not the ballast's. Where there is plenty, nobody asks whether it is held.
    pub(super) fn leaves_room(&self, total_bytes: u64, free_bytes: u64, more: u64) -> bool {
        let bytes = bytes(total_bytes);
        bytes == 0 || free_bytes >= bytes + more || self.is_held(total_bytes)
    }

    /// A name without the room behind it, which a crash may have left, is not it.
    fn is_held(&self, total_bytes: u64) -> bool {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(&self.path).is_ok_and(|file| file.blocks() * 512 >= bytes(total_bytes) / 2)
    }

    /// Gives it up or holds it again, as the room on the disk wants it.
    pub(super) fn tend(&self, total_bytes: u64, free_bytes: u64) -> io::Result<Tended> {
        let bytes = bytes(total_bytes);
        let held = self.is_held(total_bytes);
        if held && free_bytes < bytes / 4 {
            fs::remove_file(&self.path)?;
            return Ok(Tended::GivenUp);
        }
        if !held && free_bytes > 3 * bytes {
            let held = rustix::fs::fallocate(File::create(&self.path)?, rustix::fs::FallocateFlags::empty(), 0, bytes);
            return match held {
                Ok(()) => Ok(Tended::HeldAgain),
                Err(error) => {
                    fs::remove_file(&self.path)?;
                    match error {
                        // a file system that cannot set room aside does without
                        rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSPC => Ok(Tended::Left),
                        error => Err(error.into()),
                    }
                }
            };
        }
        Ok(Tended::Left)
    }
}

fn bytes(total_bytes: u64) -> u64 {
    (total_bytes / PART_MAX).min(BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_held_while_there_is_room_and_given_up_when_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let ballast = Ballast { path: folder.path().join("ballast") };
        let (total, plenty) = (1 << 40, 1 << 30);
        assert_eq!(ballast.missing_bytes(total), BYTES_MAX);
        assert_eq!(ballast.tend(total, plenty).unwrap(), Tended::HeldAgain);
        assert_eq!(fs::metadata(&ballast.path).unwrap().len(), BYTES_MAX);
        assert_eq!((ballast.missing_bytes(total), ballast.tend(total, BYTES_MAX).unwrap()), (0, Tended::Left));
        assert!(ballast.leaves_room(total, 2000, 1000), "it is held beside that");
        assert_eq!(ballast.tend(total, 4096).unwrap(), Tended::GivenUp);
        assert_eq!(
            ballast.tend(total, BYTES_MAX).unwrap(),
            Tended::Left,
            "what was given up is not taken back at once"
        );
        assert!(!ballast.path.exists());
        assert!(ballast.leaves_room(total, BYTES_MAX + 1000, 1000));
        assert!(!ballast.leaves_room(total, BYTES_MAX + 999, 1000), "what is left is the ballast's");
    }
}
