//! A photo's bytes in memory, placed so that a disk takes them from where they are.
//!
//! Disks take whole blocks from whole blocks of memory (`O_DIRECT`), without a copy in the page cache that nobody would read:
//! in a backlog a photo is read hours later, and pages that it would fill are taken from everything else. Always: the bytes
//! begin at a block's border, but for memory that had to grow, which is brought back by a copy before it is written.

use std::fs::File;
use std::io;

/// Whole numbers of this are what every disk in use takes; most take less.
pub(super) const BLOCK_BYTES: usize = 4096;
/// What stands behind a photo in its file: a record of usual size, filled up to whole blocks.
pub(super) const BEHIND_BYTES: usize = 2 * BLOCK_BYTES;

/// A photo's bytes so far.
#[derive(Default)]
pub struct Buffer {
    /// The bytes, behind as many as it takes to the border.
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// Memory for `len` bytes and what stands behind them in a file.
    pub fn with_capacity(len: usize) -> Buffer {
        let mut bytes: Vec<u8> = Vec::with_capacity(BLOCK_BYTES + len + BEHIND_BYTES);
        let start = bytes.as_ptr().align_offset(BLOCK_BYTES);
        bytes.resize(start, 0);
        Buffer { bytes, start }
    }

    /// Makes place for a photo of about `len` bytes, if nothing has come yet.
    pub fn reserve(&mut self, len: usize) {
        if self.bytes.capacity() == 0 {
            *self = Buffer::with_capacity(len);
        }
    }

    /// To be appended to; what is there already is not to be touched.
    pub fn appended_to(&mut self) -> &mut Vec<u8> {
        self.reserve(0);
        &mut self.bytes
    }

    /// Reads up to `len` bytes of a file from a place on behind those that are there, into memory that nobody has to zero
    /// before; how many.
    pub(super) fn read_at(&mut self, file: &File, len: usize, at: u64) -> io::Result<usize> {
        self.reserve(len);
        self.bytes.reserve(len);
        let read = rustix::io::pread(file, &mut self.bytes.spare_capacity_mut()[..len], at)?.0.len();
        // SAFETY: so many bytes behind those that were there have just been read.
        unsafe { self.bytes.set_len(self.bytes.len() + read) };
        Ok(read)
    }

    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.bytes.truncate(self.start + len);
    }

    /// Brings the bytes back to a border if they have moved.
    pub(super) fn align(&mut self) {
        if !(self.as_slice().as_ptr() as usize).is_multiple_of(BLOCK_BYTES) {
            *self = Buffer::from(self.as_slice());
        }
    }

    /// The first `len` bytes, without a copy.
    pub(super) fn into_bytes(self, len: usize) -> bytes::Bytes {
        let (start, end) = (self.start, self.start + len);
        bytes::Bytes::from(self.bytes).slice(start..end)
    }
}

impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Self {
        let mut buffer = Buffer::with_capacity(bytes.len());
        buffer.bytes.extend_from_slice(bytes);
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_aligned(buffer: &Buffer) -> bool {
        (buffer.as_slice().as_ptr() as usize).is_multiple_of(BLOCK_BYTES)
    }

    #[test]
    fn bytes_begin_at_a_border_however_many_are_expected() {
        for len in [0, 1, 20, 4096, 250_000] {
            let mut buffer = Buffer::with_capacity(len);
            buffer.appended_to().extend(std::iter::repeat_n(7, len));
            assert!(is_aligned(&buffer), "{len} bytes");
            assert_eq!(buffer.as_slice(), vec![7; len]);
        }
    }

    #[test]
    fn bytes_that_moved_because_more_came_are_brought_back_to_a_border() {
        let mut buffer = Buffer::default();
        for n in 0..100_000u32 {
            buffer.appended_to().extend_from_slice(&n.to_le_bytes());
        }
        let before = buffer.as_slice().to_vec();
        buffer.align();
        assert!(is_aligned(&buffer));
        assert_eq!(buffer.as_slice(), before);
    }

    #[test]
    fn its_first_bytes_are_given_away_without_what_stands_behind_them() {
        let mut buffer = Buffer::from(b"photo and what stands behind it".as_slice());
        buffer.truncate(20);
        assert!(is_aligned(&buffer));
        assert_eq!(buffer.into_bytes(5), "photo");
    }
}
