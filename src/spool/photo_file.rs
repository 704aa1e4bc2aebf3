//! A photo file: the photo's bytes as they were sent, then its record as JSON, then a footer of 16 bytes, which are the
//! record's length and CRC-32 (both u32, little-endian) and `FOREBAY1`.
//!
//! Image viewers ignore what follows the image. Always: what is read back was written whole, by its CRC and its size. Never: a
//! record that is believed because its file has the right name.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{Error, Result};
use crate::upload::{Sha256, Upload};

const MAGIC: &[u8; 8] = b"FOREBAY1";
pub(super) const FOOTER_BYTES: usize = 16;
/// A record is a few hundred bytes; metadata and names are limited, so this is beyond any that was written here.
const RECORD_BYTES_MAX: usize = 64 * 1024;

/// What stands behind the photo in its file: record, length, CRC, magic.
pub(super) fn trailer(upload: &Upload) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(upload).unwrap_or_default();
    let (length, crc) = (bytes.len() as u32, crc32fast::hash(&bytes));
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(MAGIC);
    bytes
}

/// The record at the end of a photo file.
pub(super) fn read_record(path: &Path) -> Result<Upload> {
    let damaged = |what: &str| Error::Damaged(format!("{}: {what}", path.display()));
    let failed = |error: io::Error| Error::unavailable(format_args!("cannot read {}", path.display()), error);
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    if size < FOOTER_BYTES as u64 {
        return Err(damaged("too short to hold a record"));
    }
    let mut footer = [0; FOOTER_BYTES];
    file.seek(SeekFrom::End(-(FOOTER_BYTES as i64))).map_err(failed)?;
    file.read_exact(&mut footer).map_err(failed)?;
    let word = |at: usize| u32::from_le_bytes([footer[at], footer[at + 1], footer[at + 2], footer[at + 3]]);
    let (length, crc) = (word(0) as usize, word(4));
    if &footer[8..] != MAGIC || length > RECORD_BYTES_MAX || (length + FOOTER_BYTES) as u64 > size {
        return Err(damaged("its end is not that of a photo file"));
    }
    let mut record = vec![0; length];
    file.seek(SeekFrom::End(-((FOOTER_BYTES + length) as i64))).map_err(failed)?;
    file.read_exact(&mut record).map_err(failed)?;
    if crc32fast::hash(&record) != crc {
        return Err(damaged("its record does not match its checksum"));
    }
    let upload: Upload =
        serde_json::from_slice(&record).map_err(|e| damaged(&format!("its record cannot be read: {e}")))?;
    if upload.size_bytes != size - (FOOTER_BYTES + length) as u64 {
        return Err(damaged("it does not have the size that its record gives"));
    }
    Ok(upload)
}

/// The record at the end of a photo file whose bytes are those of its digest.
pub(super) fn read_checked(path: &Path) -> Result<Upload> {
    let record = read_record(path)?;
    let failed = |error: io::Error| Error::unavailable(format_args!("cannot read {}", path.display()), error);
    let mut photo = fs::read(path).map_err(failed)?;
    photo.truncate(usize::try_from(record.size_bytes).unwrap_or(usize::MAX));
    let sha256 = Sha256::of(&photo);
    if sha256 != record.sha256 {
        return Err(Error::Damaged(format!("its bytes on disk have the digest {sha256}, not {}", record.sha256)));
    }
    Ok(record)
}
