//! A photo on its way in: in memory, or begun on disk when memory is short.
//!
//! Always: what was begun on disk is deleted with the photo, unless it became one of the spool's. Never: synced here, or worth
//! anything before it has its own name.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::upload::{Sha256, Sha256Hasher};

/// The bytes of a photo so far: those that were written out, and behind them those in memory.
#[derive(Default)]
pub struct Unfinished {
    pub(super) begun: Option<Part>,
    written_bytes: u64,
    written_crc: crc32fast::Hasher,
    written_sha256: Sha256Hasher,
    pub(super) rest: Vec<u8>,
}

impl Unfinished {
    /// All bytes of the photo so far.
    pub fn size_bytes(&self) -> u64 {
        self.written_bytes + self.rest.len() as u64
    }

    /// Those that are in memory, to be added to.
    pub fn rest(&mut self) -> &mut Vec<u8> {
        &mut self.rest
    }

    /// The whole photo, if all of it is in memory.
    pub fn in_memory(&self) -> Option<&[u8]> {
        self.begun.is_none().then_some(&self.rest)
    }

    /// The digest of all of it.
    pub fn sha256(&self) -> Sha256 {
        let mut hasher = self.written_sha256.clone();
        hasher.update(&self.rest);
        hasher.finish()
    }

    /// The CRC-32 of all of it.
    pub(super) fn crc(&self) -> u32 {
        let mut crc = self.written_crc.clone();
        crc.update(&self.rest);
        crc.finalize()
    }

    /// Writes out what is in memory, to a file in `folder`.
    pub(super) fn write_out(&mut self, folder: &Path) -> io::Result<()> {
        let part = match &mut self.begun {
            Some(part) => part,
            none => none.insert(Part::create(folder)?),
        };
        part.file.write_all(&self.rest)?;
        self.written_crc.update(&self.rest);
        self.written_sha256.update(&self.rest);
        self.written_bytes += self.rest.len() as u64;
        self.rest.clear();
        Ok(())
    }
}

impl From<Vec<u8>> for Unfinished {
    fn from(photo: Vec<u8>) -> Self {
        Unfinished { rest: photo, ..Unfinished::default() }
    }
}

/// A file being written. It is deleted when dropped, unless it was kept.
pub(super) struct Part {
    pub(super) file: File,
    pub(super) path: PathBuf,
    kept: bool,
}

impl Part {
    pub(super) fn create(folder: &Path) -> io::Result<Part> {
        let path = folder.join(format!("{:032x}.part", rand::random::<u128>()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Part { file, path, kept: false })
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
