//! The room for photos: what the disk has, what of it is kept in reserve, and what the spool may hold.
//!
//! Always: what a photo's head declares is held against the reserve, the ballast and the spool's own limit before its body is read;
//! against the ballast once more when it is written. Never: touches a photo.

use std::sync::atomic::Ordering;

use rustix::fs::StatVfs;

use super::Spool;
use super::ballast::Tended;
use crate::error::{Error, Result};
use crate::units::{ByteSize, Reserve};

/// What a photo on its way in takes, to tell whether there is room for any.
const PHOTO_BYTES_USUAL: u64 = 256 * 1024;

/// The room on the spool's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    /// What an unprivileged process may still write.
    pub free_bytes: u64,
    /// Free bytes below which photos are refused: the reserve as it was set, and the ballast while it is given up.
    pub reserve_bytes: u64,
    pub total_inodes: u64,
    pub free_inodes: u64,
    pub reserve_inodes: u64,
}

impl Space {
    /// Bytes that may still be accepted before the reserve is reached.
    pub fn usable_bytes(&self) -> u64 {
        self.free_bytes.saturating_sub(self.reserve_bytes)
    }

    /// Bytes in photos of so many each for which there are inodes before their reserve is reached; none where the file system does not
    /// count them.
    pub fn usable_by_inodes(&self, photo_bytes: u64) -> Option<u64> {
        let inodes = self.free_inodes.saturating_sub(self.reserve_inodes);
        (self.total_inodes > 0).then(|| inodes.saturating_mul(photo_bytes))
    }
}

impl Spool {
    /// Why photos are refused now, if they are: one of usual size would find no room, or the disk is not trusted.
    pub fn refusing(&self) -> Result<()> {
        self.admit(PHOTO_BYTES_USUAL)
    }

    /// Refuses when a photo of `bytes` would eat into the reserve or go beyond the spool's own limit.
    pub fn admit(&self, bytes: u64) -> Result<()> {
        self.check_fault()?;
        let stat = self.stat()?;
        let (total_bytes, free_bytes) = room(&stat);
        let beside_reserve_bytes = free_bytes.saturating_sub(self.inner.limits.reserve.of(total_bytes));
        let ballast = &self.inner.ballast;
        let fits = beside_reserve_bytes >= bytes && ballast.leaves_room(total_bytes, beside_reserve_bytes, bytes);
        let space = self.space_by(&stat, if fits { 0 } else { ballast.missing_bytes(total_bytes) });
        if !fits {
            return Err(Error::Full(format!(
                "{} are free on the disk, and {} are kept in reserve",
                ByteSize(space.free_bytes),
                ByteSize(space.reserve_bytes)
            )));
        }
        if space.total_inodes > 0 && space.free_inodes <= space.reserve_inodes {
            return Err(Error::Full(format!("{} inodes are free on the disk, all in reserve", space.free_inodes)));
        }
        if let Some(max) = self.inner.limits.max {
            let held = self.held_bytes();
            if held + bytes > max.0 {
                return Err(Error::Full(format!("the spool holds {} of the {max} it may", ByteSize(held))));
            }
        }
        Ok(())
    }

    /// The room on the disk now.
    pub fn space(&self) -> Result<Space> {
        let stat = self.stat()?;
        Ok(self.space_by(&stat, self.inner.ballast.missing_bytes(room(&stat).0)))
    }

    fn space_by(&self, stat: &StatVfs, ballast_missing_bytes: u64) -> Space {
        let (total_bytes, free_bytes) = room(stat);
        Space {
            total_bytes,
            free_bytes,
            reserve_bytes: self.inner.limits.reserve.of(total_bytes) + ballast_missing_bytes,
            total_inodes: stat.f_files,
            free_inodes: stat.f_favail,
            reserve_inodes: match self.inner.limits.reserve {
                share @ Reserve::Share(_) => share.of(stat.f_files),
                Reserve::Bytes(_) => 0,
            },
        }
    }

    fn stat(&self) -> Result<StatVfs> {
        rustix::fs::statvfs(&self.inner.root).map_err(|e| {
            Error::unavailable(format_args!("cannot ask for the room on {}", self.inner.root.display()), e)
        })
    }

    /// Gives the ballast up when the disk is as good as full, so that an embedded queue can say that photos may leave, and
    /// holds it again when there is room to spare. Blocks.
    pub fn tend_ballast(&self) -> Result<()> {
        let space = self.space()?;
        let tended = self.inner.ballast.tend(space.total_bytes, space.free_bytes);
        match tended.map_err(|e| Error::unavailable("cannot tend the spool's ballast", e))? {
            Tended::Left => {}
            Tended::GivenUp => {
                tracing::warn!(
                    "the disk is full to the last megabytes; the ballast is given up so that the drain can go on"
                )
            }
            Tended::HeldAgain => tracing::info!("the disk has room; the ballast is held"),
        }
        Ok(())
    }

    /// What was admitted a moment ago may find that the ballast was given up since, and that is not its room.
    pub(super) fn check_ballast(&self, photo_bytes: usize) -> Result<()> {
        let (total_bytes, free_bytes) = room(&self.stat()?);
        match self.inner.ballast.leaves_room(total_bytes, free_bytes, photo_bytes as u64) {
            true => Ok(()),
            false => Err(Error::Full("the disk is full".to_owned())),
        }
    }

    /// Bytes that may still be accepted, by the disk's room and the spool's own limit.
    pub fn usable_bytes(&self, space: &Space) -> u64 {
        let own = self.inner.limits.max.map_or(u64::MAX, |max| max.0.saturating_sub(self.held_bytes()));
        space.usable_bytes().min(own)
    }

    /// Bytes of photos that are on disk.
    pub fn held_bytes(&self) -> u64 {
        self.inner.held_bytes.load(Ordering::Relaxed)
    }

    /// Takes over what the queue's books say is on disk, for every process together.
    pub fn set_held_bytes(&self, bytes: u64) {
        self.inner.held_bytes.store(bytes, Ordering::Relaxed);
    }
}

/// Bytes of a file system in all, and those that an unprivileged process may still write.
fn room(stat: &StatVfs) -> (u64, u64) {
    (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_with_few_inodes_has_room_for_as_many_photos() {
        let disk = Space {
            total_bytes: 1_000_000_000,
            free_bytes: 1_000_000_000,
            reserve_bytes: 0,
            total_inodes: 1000,
            free_inodes: 900,
            reserve_inodes: 50,
        };
        assert_eq!(disk.usable_by_inodes(250_000), Some(850 * 250_000));
        assert_eq!(Space { total_inodes: 0, ..disk }.usable_by_inodes(250_000), None);
    }
}
