//! Files that are read and written past the page cache, where the file system can (`O_DIRECT`).
//!
//! Always: a file system that cannot, or takes only larger blocks than ours, is used by way of the page cache; a file that is open is
//! never opened anew for it, as another may have its name by then.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Opens a file past the page cache. None where the file system cannot; one that was to be made may be there then.
pub(super) fn open(options: &OpenOptions, path: &Path) -> io::Result<Option<File>> {
    match options.clone().custom_flags(OFlags::DIRECT.bits() as i32).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if is_not_taken(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a file to be read, past the page cache where the file system can; whether it goes past it. That it was read is not noted in it,
/// which would be a write for each photo, unless it is another user's.
pub(super) fn open_to_read(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true);
    let with = |flags: OFlags| options.clone().custom_flags(flags.bits() as i32).open(path);
    let unnoted = |flags: OFlags| match with(flags | OFlags::NOATIME) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::PERM) => with(flags),
        opened => opened,
    };
    match unnoted(OFlags::DIRECT) {
        Err(error) if is_not_taken(&error) => Ok((unnoted(OFlags::empty())?, false)),
        opened => Ok((opened?, true)),
    }
}

/// Does `work` with a file, and once more by way of the page cache if it turns out that the file system cannot do without.
/// `direct` says whether the file goes past it, before and after.
pub(super) fn or_cached<T>(file: &File, direct: &mut bool, mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match work() {
        Err(error) if *direct && is_not_taken(&error) => {
            let flags = rustix::fs::fcntl_getfl(file)?;
            rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?;
            *direct = false;
            work()
        }
        done => done,
    }
}

fn is_not_taken(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::OPNOTSUPP))
}
