//! A photo file: the photo's bytes as they were sent, then its record as JSON, then a footer of 20 bytes, which are the
//! record's length, its CRC-32 and the photo's (all u32, little-endian) and `FOREBAY2`. Spaces behind the JSON, which are
//! part of the record, make it whole blocks.
//!
//! Image viewers ignore what follows the image. The CRC tells what the disk has damaged at a small part of the cost of the
//! digest, which the bucket checks anyway. Always: what is read back was written whole, by its CRCs and its size. Never: a
//! record that is believed because its file has the right name.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;

use super::buffer::{BEHIND_BYTES, BLOCK_BYTES, Buffer};
use super::direct;
use super::lately_read::Stamp;
use crate::error::{Error, Result};
use crate::upload::Upload;

const MAGIC: &[u8; 8] = b"FOREBAY2";
const FOOTER_BYTES: usize = 20;
const SHORTER: &str = "it became shorter while it was read";
/// A record is a few hundred bytes; metadata and names are limited, so this is beyond any that was written here.
const RECORD_BYTES_MAX: usize = 64 * 1024;

/// What stands behind a photo of this CRC in its file: record, length, CRCs, magic.
pub(super) fn trailer(upload: &Upload, photo_crc: u32) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(upload).unwrap_or_default();
    let file_bytes = upload.size_bytes as usize + bytes.len() + FOOTER_BYTES;
    bytes.resize(bytes.len() + file_bytes.next_multiple_of(BLOCK_BYTES) - file_bytes, b' ');
    let footer = [bytes.len() as u32, crc32fast::hash(&bytes), photo_crc];
    footer.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    bytes.extend_from_slice(MAGIC);
    bytes
}

/// The record at the end of a photo file.
pub(super) fn read_record(path: &Path) -> Result<Upload> {
    let file = File::open(path).map_err(|error| failed(path, error))?;
    let size = file.metadata().map_err(|error| failed(path, error))?.len();
    let last = |bytes: usize| {
        let bytes = (bytes as u64).min(size);
        let mut last = vec![0; bytes as usize];
        match file.read_exact_at(&mut last, size - bytes) {
            Ok(()) => Ok(last),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(damaged(path, SHORTER)),
            Err(error) => Err(failed(path, error)),
        }
    };
    // in one go, if it is of usual size and the disk can read what stands before it
    let mut end = last(BEHIND_BYTES).or_else(|_| last(FOOTER_BYTES))?;
    let footer = Footer::read(&end, size, path)?;
    if footer.end_bytes() > end.len() {
        end = last(footer.end_bytes())?;
    }
    footer.record(&end, size, path)
}

/// The record and the photo of the file at `path`, whose bytes are those that were written. Read past the page cache, where the
/// file system can: nobody reads it again soon. With them the stamp of the file before it was read. `not_opened` says what it
/// means that the file cannot be opened.
pub(super) fn read_photo(path: &Path, not_opened: impl FnOnce(io::Error) -> Error) -> Result<(Upload, Bytes, Stamp)> {
    let (file, direct) = direct::open_to_read(path).map_err(not_opened)?;
    let metadata = file.metadata().map_err(|error| failed(path, error))?;
    let size = metadata.len();
    let whole = read_whole(&file, direct, size, path)?;
    let footer = Footer::read(whole.as_slice(), size, path)?;
    let record = footer.record(whole.as_slice(), size, path)?;
    let photo = whole.into_bytes(record.size_bytes as usize); // no more than what was read, as its end says
    if crc32fast::hash(&photo) != footer.photo_crc {
        return Err(damaged(path, "the photo does not match its checksum"));
    }
    Ok((record, photo, Stamp::of(&metadata)))
}

/// All of its `size` bytes.
fn read_whole(file: &File, mut direct: bool, size: u64, path: &Path) -> Result<Buffer> {
    let size = usize::try_from(size).map_err(|_| damaged(path, "its size is beyond memory"))?;
    // whole blocks are asked for; there may be less
    let blocks = size.next_multiple_of(BLOCK_BYTES);
    let mut whole = Buffer::with_capacity(blocks);
    while whole.len() < size {
        let (read, rest) = (whole.len(), blocks - whole.len());
        match direct::or_cached(file, &mut direct, || whole.read_at(file, rest, read as u64)) {
            Ok(0) => return Err(damaged(path, SHORTER)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(path, error)),
        }
    }
    whole.truncate(size);
    Ok(whole)
}

/// The last bytes of a photo file.
struct Footer {
    record_bytes: usize,
    record_crc: u32,
    photo_crc: u32,
}

impl Footer {
    /// From the last bytes, or all, of a file of `size` bytes.
    fn read(end: &[u8], size: u64, path: &Path) -> Result<Footer> {
        let Some(footer) = end.last_chunk::<FOOTER_BYTES>() else {
            return Err(damaged(path, "too short to hold a record"));
        };
        let word = |at: usize| u32::from_le_bytes([footer[at], footer[at + 1], footer[at + 2], footer[at + 3]]);
        let read = Footer { record_bytes: word(0) as usize, record_crc: word(4), photo_crc: word(8) };
        let fits = read.record_bytes <= RECORD_BYTES_MAX && read.end_bytes() as u64 <= size;
        match &footer[12..] == MAGIC && fits {
            true => Ok(read),
            false => Err(damaged(path, "its end is not that of a photo file")),
        }
    }

    /// Bytes of record and footer.
    fn end_bytes(&self) -> usize {
        self.record_bytes + FOOTER_BYTES
    }

    /// The record in `end`, which are the file's last bytes, or all, and hold it whole.
    fn record(&self, end: &[u8], size: u64, path: &Path) -> Result<Upload> {
        let record = end.len().checked_sub(self.end_bytes()).map(|at| &end[at..at + self.record_bytes]);
        let Some(record) = record.filter(|record| crc32fast::hash(record) == self.record_crc) else {
            return Err(damaged(path, "its record does not match its checksum"));
        };
        let upload: Upload =
            serde_json::from_slice(record).map_err(|e| damaged(path, &format!("its record cannot be read: {e}")))?;
        if upload.size_bytes != size - self.end_bytes() as u64 {
            return Err(damaged(path, "it does not have the size that its record gives"));
        }
        Ok(upload)
    }
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::Damaged(format!("{}: {what}", path.display()))
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::unavailable(format_args!("cannot read {}", path.display()), error)
}
