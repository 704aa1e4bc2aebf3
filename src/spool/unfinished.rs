//! A photo on its way in: in memory, or begun on disk when memory is short.
//!
//! Always: what was begun on disk is deleted with the photo, unless it became one of the spool's. Never: synced here, or worth
//! anything before it has its own name.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::buffer::Buffer;
use super::direct;
use crate::upload::{Sha256, Sha256Hasher};

/// The bytes of a photo so far: those that were written out, and behind them those in memory.
#[derive(Default)]
pub struct Unfinished {
    pub(super) begun: Option<Part>,
    pub(super) written_bytes: u64,
    pub(super) rest: Buffer,
    /// Both of what was written out, and of the first so many of the rest.
    sha256: Sha256Hasher,
    crc: crc32fast::Hasher,
    digested_bytes: usize,
}

impl Unfinished {
    /// All bytes of the photo so far.
    pub fn size_bytes(&self) -> u64 {
        self.written_bytes + self.rest.len() as u64
    }

    /// Those that are in memory, to be added to.
    pub fn rest(&mut self) -> &mut Buffer {
        &mut self.rest
    }

    /// The whole photo, if all of it is in memory.
    pub fn in_memory(&self) -> Option<&[u8]> {
        self.begun.is_none().then_some(self.rest.as_slice())
    }

    /// Takes digest and checksum of what has come so far.
    pub fn digest(&mut self) {
        let new = &self.rest.as_slice()[self.digested_bytes..];
        self.sha256.update(new);
        self.crc.update(new);
        self.digested_bytes = self.rest.len();
    }

    /// Bytes of it whose digest is still to be taken.
    pub fn undigested_bytes(&self) -> usize {
        self.rest.len() - self.digested_bytes
    }

    /// The digest of all of it.
    pub fn sha256(&mut self) -> Sha256 {
        self.digest();
        self.sha256.clone().finish()
    }

    /// The CRC-32 of all of it.
    pub(super) fn crc(&self) -> u32 {
        let mut crc = self.crc.clone();
        crc.update(&self.rest.as_slice()[self.digested_bytes..]);
        crc.finalize()
    }

    /// Writes out what is in memory, to a file in `folder`.
    pub(super) fn write_out(&mut self, folder: &Path) -> io::Result<()> {
        let part = match &mut self.begun {
            Some(part) => part,
            // in pieces of any size, which go through the page cache
            none => none.insert(Part::create(folder, false)?),
        };
        part.file.write_all_at(self.rest.as_slice(), self.written_bytes)?;
        self.digest();
        self.written_bytes += self.rest.len() as u64;
        // not just emptied: a thousand of them would hold on to what each had in hand at most
        self.rest = Buffer::default();
        self.digested_bytes = 0;
        Ok(())
    }
}

impl From<Vec<u8>> for Unfinished {
    fn from(photo: Vec<u8>) -> Self {
        Unfinished { rest: Buffer::from(photo.as_slice()), ..Unfinished::default() }
    }
}

/// A file being written. It is deleted when dropped, unless it was kept.
pub(super) struct Part {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// What is written goes to the disk at once, past the page cache.
    pub(super) direct: bool,
    kept: bool,
}

impl Part {
    /// One that is written `direct`, where the file system can.
    pub(super) fn create(folder: &Path, direct: bool) -> io::Result<Part> {
        let path = folder.join(format!("{:032x}.part", rand::random::<u128>()));
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        if direct {
            match direct::open(&options, &path)? {
                Some(file) => return Ok(Part { file, path, direct: true, kept: false }),
                None => drop(fs::remove_file(&path)),
            }
        }
        Ok(Part { file: options.open(&path)?, path, direct: false, kept: false })
    }

    /// Writes at a place of the file; whole blocks from and to a border, if it is direct.
    pub(super) fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        direct::or_cached(&self.file, &mut self.direct, || self.file.write_all_at(bytes, at))
    }

    /// Its first `bytes` again.
    pub(super) fn read_back(&self, bytes: u64) -> io::Result<Vec<u8>> {
        let mut read = Vec::new();
        File::open(&self.path)?.take(bytes).read_to_end(&mut read)?;
        Ok(read)
    }

    pub(super) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// `AlreadyExists` when `to` is taken.
pub(super) fn rename_without_overwriting(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // some network file systems do not know the flag
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
            done => return done.map_err(io::Error::from),
        }
    }
    fs::hard_link(from, to)?;
    let _ = fs::remove_file(from); // a second name in incoming/ is swept later
    Ok(())
}

/// Each gets the other's name, at once.
pub(super) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_and_checksum_are_of_all_bytes_whenever_they_were_taken() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut photo = Unfinished::default();
        for (n, piece) in bytes.chunks(9_999).enumerate() {
            photo.rest().appended_to().extend_from_slice(piece);
            match n % 3 {
                0 => photo.digest(),
                1 => photo.write_out(folder.path()).unwrap(),
                _ => {}
            }
        }
        assert_eq!(photo.crc(), crc32fast::hash(&bytes));
        assert_eq!((photo.sha256(), photo.size_bytes()), (Sha256::of(&bytes), 100_000));
        assert_eq!(photo.crc(), crc32fast::hash(&bytes));
    }

    #[test]
    fn what_a_disk_does_not_take_past_the_page_cache_is_written_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut part = Part::create(folder.path(), true).unwrap();
        // no disk takes three bytes from an odd place
        part.write_at(&b"photo"[1..4], 1).unwrap();
        assert_eq!(fs::read(&part.path).unwrap(), b"\0hot");
    }
}
