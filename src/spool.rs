//! The spool: photos on disk. The only writer and the only reader of photo files.
//!
//! ```text
//! <data dir>/spool/incoming/<random>.part   a photo being written; worth nothing until it is renamed
//! <data dir>/spool/<xx>/<id>                a photo, durable; xx is the id's last byte in hex
//! <data dir>/spool/damaged/<id>.<random>    what was damaged on disk and replaced when its device sent it again
//! <data dir>/spool/journal/<id>             an empty mark: this photo was acknowledged while the queue was away
//! <data dir>/spool/ballast                  room that is given up when the disk is full, see `ballast.rs`
//! ```
//!
//! A photo file is the photo, then its record (`photo_file.rs`). With the record in the same file there is one file to sync, a
//! photo is never without its record, and the queue can be rebuilt from here alone. A photo that comes slowly is written out
//! as it comes when memory is short (`unfinished.rs`). Whether there is room for it says `room.rs`; which photos
//! the queue does not know yet, `journal.rs`.
//!
//! Always: [`Spool::store`] returns only after write, fdatasync, rename and fsync of the folder, in that order; a name, once
//! there, is never overwritten; a photo is checked against its checksum before it is handed out for upload.
//! Never: a second fsync of a file whose first one failed. The kernel may have marked its lost pages clean, so the disk is
//! reported faulty and nothing more is accepted.

mod ballast;
mod buffer;
mod direct;
mod journal;
mod lately_read;
mod photo_file;
mod room;
mod unfinished;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustix::fs::OFlags;
use tokio::sync::Semaphore;

use crate::config::SpoolLimits;
use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::outage::Outage;
use crate::upload::{Sha256, Upload, UploadId};

use self::ballast::Ballast;
use self::lately_read::LatelyRead;
use self::photo_file::{read_photo, read_record, trailer};
pub use self::room::Space;
pub use self::unfinished::Unfinished;
use self::unfinished::{Part, exchange, rename_without_overwriting};

/// Photos that are written at once.
const WRITERS_MAX: usize = 64;

/// The photos of one site. Cheap to clone; any number of processes may share one on a shared volume.
#[derive(Clone)]
pub struct Spool {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    limits: SpoolLimits,
    ballast: Ballast,
    lately_read: LatelyRead,
    /// The 256 photo folders, held open to be synced.
    folders: Vec<File>,
    /// The disk takes photos past the page cache, as far as is known.
    direct: AtomicBool,
    /// Places for those who write: more at once would not make it faster, and each holds a thread with its stack and heap.
    writers: Semaphore,
    /// Bytes of photos on disk, as last heard from the queue's books plus what was stored here since.
    held_bytes: AtomicU64,
    /// Journaled photos that cannot be read; they are found again at every look.
    unreadable: Outage,
    /// Why the disk cannot be trusted any more.
    fault: OnceLock<String>,
}

/// What became of a photo handed to [`Spool::store`].
#[derive(Debug, PartialEq, Eq)]
pub enum Stored {
    /// It is on disk, durably, under its own name, which was free.
    New,
    /// The same, in the place of what the disk had damaged.
    Replaced,
    /// A photo with this id was there already, durably; this is its record. The bytes just sent were dropped.
    Held(Box<Upload>),
}

impl Spool {
    /// Opens the spool in `data_dir`, making its folders durable if they are not there yet. Blocks.
    pub fn open(data_dir: &Path, limits: SpoolLimits) -> Result<Spool> {
        let root = data_dir.join("spool");
        let failed = |error: io::Error| {
            Error::unavailable(format_args!("cannot open the spool in {}", data_dir.display()), error)
        };
        fs::create_dir_all(root.join("incoming")).map_err(failed)?;
        fs::create_dir_all(root.join("journal")).map_err(failed)?;
        fs::create_dir_all(root.join("damaged")).map_err(failed)?;
        let mut folders = Vec::with_capacity(256);
        for shard in 0..=255u8 {
            let path = root.join(format!("{shard:02x}"));
            let folder = match open_folder(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir_all(&path).and_then(|()| open_folder(&path))
                }
                opened => opened,
            };
            folders.push(folder.map_err(failed)?);
        }
        // the new folders' own names must survive a power cut too
        for folder in
            [root.as_path(), data_dir, data_dir.parent().filter(|p| *p != Path::new("")).unwrap_or(Path::new("."))]
        {
            File::open(folder).and_then(|f| f.sync_all()).map_err(failed)?;
        }
        let ballast = Ballast { path: root.join("ballast") };
        let inner = Inner {
            root,
            limits,
            ballast,
            lately_read: LatelyRead::default(),
            folders,
            direct: AtomicBool::new(true),
            writers: Semaphore::new(WRITERS_MAX),
            held_bytes: AtomicU64::new(0),
            unreadable: Outage::new(),
            fault: OnceLock::new(),
        };
        let spool = Spool { inner: Arc::new(inner) };
        if let Err(error) = spool.tend_ballast() {
            // no reason not to drain
            tracing::warn!(%error, "the spool has no ballast");
        }
        Ok(spool)
    }

    /// Makes `photo` and its record durable under the upload's id.
    pub async fn store(&self, upload: Arc<Upload>, photo: impl Into<Unfinished>) -> Result<Stored> {
        let (spool, photo) = (self.clone(), photo.into());
        let _place = self.inner.writers.acquire().await; // it is never closed
        blocking(move || spool.store_now(&upload, photo)).await
    }

    /// Writes out what of a photo is in memory before all of it is there, so that it takes none.
    pub async fn write_out(&self, mut photo: Unfinished) -> Result<Unfinished> {
        let spool = self.clone();
        let _place = self.inner.writers.acquire().await;
        blocking(move || {
            spool.check_ballast(photo.rest.len())?;
            photo.write_out(&spool.inner.root.join("incoming")).map_err(|error| match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full("the disk is full".to_owned()),
                _ => Error::unavailable("cannot write a photo that is coming", error),
            })?;
            Ok(photo)
        })
        .await
    }

    fn store_now(&self, upload: &Upload, mut photo: Unfinished) -> Result<Stored> {
        self.check_fault()?;
        self.check_ballast(photo.rest.len())?;
        let failed = |doing: &str, error: io::Error| self.write_error(doing, upload, error);
        crash_points::pass_blocking(Point::SpoolCreate).map_err(|e| failed("create", e))?;
        let trailer = trailer(upload, photo.crc());
        let mut part = match photo.begun {
            Some(part) => part,
            None => self.create_part().map_err(|e| failed("create", e))?,
        };
        crash_points::pass_blocking(Point::SpoolWrite).map_err(|e| failed("write", e))?;
        photo.rest.appended_to().extend_from_slice(&trailer);
        if part.direct {
            photo.rest.align();
        }
        let direct = part.direct;
        part.write_at(photo.rest.as_slice(), photo.written_bytes)
            .map_err(|e| self.file_write_error(upload, e, direct))?;
        if !part.direct && photo.written_bytes == 0 {
            self.inner.direct.store(false, Ordering::Relaxed);
        }
        crash_points::pass_blocking(Point::SpoolSync).map_err(|e| self.file_sync_error(upload, e))?;
        part.file.sync_data().map_err(|e| self.file_sync_error(upload, e))?;
        let path = self.path(upload.id);
        crash_points::pass_blocking(Point::SpoolRename).map_err(|e| failed("rename", e))?;
        match rename_without_overwriting(&part.path, &path) {
            Ok(()) => part.keep(),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let held = match self.check(&path) {
                    Err(Error::Damaged(why)) => match self.replace(upload, &mut part, &path, &why)? {
                        None => {
                            self.sync_folder(upload)?;
                            return Ok(Stored::Replaced);
                        }
                        Some(held) => held,
                    },
                    held => held?,
                };
                // its bytes were synced before it had this name; its name may not be durable yet
                self.sync_folder(upload)?;
                return Ok(Stored::Held(Box::new(held)));
            }
            Err(error) => return Err(failed("rename", error)),
        }
        self.sync_folder(upload)?;
        self.inner.held_bytes.fetch_add(upload.size_bytes, Ordering::Relaxed);
        crash_points::pass_blocking(Point::SpoolStored).map_err(|e| failed("keep", e))?;
        Ok(Stored::New)
    }

    fn create_part(&self) -> io::Result<Part> {
        Part::create(&self.inner.root.join("incoming"), self.inner.direct.load(Ordering::Relaxed))
    }

    /// Puts a photo that was just written in the place of the same photo that the disk has damaged, in one step, so that
    /// there is always one under the name. Some when the one that is there is not to be replaced.
    fn replace(&self, upload: &Upload, part: &mut Part, path: &Path, why: &str) -> Result<Option<Upload>> {
        let failed = |error: io::Error| self.write_error("replace", upload, error);
        match read_record(path) {
            Ok(held) if held.sha256 != upload.sha256 => return Ok(Some(held)), // another photo; this one is refused
            Ok(_) => {}
            // whose it is cannot be told but by its bytes
            Err(Error::Damaged(_)) if holds_photo_of(path, part, upload.size_bytes).map_err(failed)? => {}
            Err(error) => return Err(error),
        }
        exchange(&part.path, path).map_err(failed)?;
        if let Ok(held) = self.check(&part.path) {
            // somebody else has replaced it meanwhile
            exchange(&part.path, path).map_err(failed)?;
            return Ok(Some(held));
        }
        tracing::error!(upload = %upload.id, why, "a photo was damaged on disk; what its device sent again takes its place");
        let name = format!("{}.{:08x}", upload.id, rand::random::<u32>());
        fs::rename(&part.path, self.inner.root.join("damaged").join(name)).map_err(failed)?;
        part.keep();
        Ok(None)
    }

    fn sync_folder(&self, upload: &Upload) -> Result<()> {
        crash_points::pass_blocking(Point::SpoolSyncFolder).map_err(|e| self.sync_error(upload, e))?;
        let shard = shard(upload.id);
        let folder = &self.inner.folders[usize::from(shard)];
        // by its number and not by the name that was given: one that is under a mount may have that name from before
        let found = is_at(folder, &self.folder(shard)).map_err(|e| self.disk_error("find the folder of", upload, e))?;
        if !found {
            let root = self.inner.root.display();
            return Err(self.distrust(format!(
                "{root} is not what it was at the start, as if a disk was mounted there since; restart"
            )));
        }
        sync_names(folder).map_err(|e| self.sync_error(upload, e))
    }

    fn write_error(&self, doing: &str, upload: &Upload, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full("the disk is full".to_owned()),
            _ => Error::unavailable(format_args!("cannot {doing} the photo of upload {}", upload.id), error),
        }
    }

    /// What goes to the disk past the page cache fails when it is written, and not when it is synced.
    fn file_write_error(&self, upload: &Upload, error: io::Error, direct: bool) -> Error {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => self.write_error("write", upload, error),
            _ if direct => self.disk_error("write", upload, error),
            _ => self.write_error("write", upload, error),
        }
    }

    /// A failed sync is the disk's last word in this process, but for a photo's file that found no room: that file is given
    /// up, and the disk is sound. A folder's sync may not fail for that, as the folder cannot be given up.
    fn file_sync_error(&self, upload: &Upload, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full("the disk is full".to_owned()),
            _ => self.sync_error(upload, error),
        }
    }

    fn sync_error(&self, upload: &Upload, error: io::Error) -> Error {
        self.disk_error("sync", upload, error)
    }

    fn disk_error(&self, doing: &str, upload: &Upload, error: io::Error) -> Error {
        let id = upload.id;
        self.distrust(format!(
            "the disk failed to {doing} the photo of upload {id}: {error}; check the disk, then restart"
        ))
    }

    /// Takes no more photos, for this reason.
    fn distrust(&self, reason: String) -> Error {
        if self.inner.fault.set(reason.clone()).is_ok() {
            tracing::error!(reason, "nothing more is accepted until a restart");
        }
        Error::Unavailable(reason)
    }

    /// Why the disk is not trusted, if it is not.
    pub fn check_fault(&self) -> Result<()> {
        self.inner.fault.get().map_or(Ok(()), |reason| Err(Error::Unavailable(reason.clone())))
    }

    /// The photo's bytes, as they were written; that they have the digest is for the bucket to check.
    ///
    /// [`Error::Missing`] when there is no file, [`Error::Damaged`] when the bytes are not those that were accepted.
    pub async fn read(&self, upload: Arc<Upload>) -> Result<Bytes> {
        let spool = self.clone();
        blocking(move || {
            let path = spool.path(upload.id);
            let (record, photo, stamp) = read_photo(&path, |error| not_opened(&upload, error))?;
            if record.sha256 != upload.sha256 {
                return Err(Error::Damaged(format!(
                    "its file holds a photo with the digest {}, not {}",
                    record.sha256, upload.sha256
                )));
            }
            spool.inner.lately_read.note(upload.id, upload.sha256, stamp);
            Ok(photo)
        })
        .await
    }

    /// There is no photo at all in it, as where its disk is not mounted. What cannot be listed holds none that can be read.
    pub async fn holds_nothing(&self) -> bool {
        let spool = self.clone();
        let look = move || {
            let nothing_in = |shard: u8| {
                fs::read_dir(spool.folder(shard)).map_or(true, |mut photos| photos.next().is_none_or(|p| p.is_err()))
            };
            Ok((0..=255).all(nothing_in))
        };
        blocking(look).await.unwrap_or(false)
    }

    /// The photo's file, to be streamed: its first `size_bytes` are the photo.
    pub async fn stream(&self, upload: Arc<Upload>) -> Result<impl tokio::io::AsyncRead + use<>> {
        let spool = self.clone();
        let size = upload.size_bytes;
        let file = blocking(move || spool.open_photo(&upload)).await?;
        Ok(tokio::io::AsyncReadExt::take(tokio::fs::File::from_std(file), size))
    }

    /// The record of a file whose bytes are those that were accepted.
    fn check(&self, path: &Path) -> Result<Upload> {
        let not_opened = |error| Error::unavailable(format_args!("cannot read {}", path.display()), error);
        let (record, photo, _) = read_photo(path, not_opened)?;
        match Sha256::of(&photo) == record.sha256 {
            true => Ok(record),
            // it changed before it was written: the checksum is that of what was written
            false => Err(Error::Damaged(format!("{}: the photo is not that of its digest", path.display()))),
        }
    }

    fn open_photo(&self, upload: &Upload) -> Result<File> {
        File::open(self.path(upload.id)).map_err(|error| not_opened(upload, error))
    }

    /// Removes the photo. One that is not there is no error: a crash may have come between removing it and saying so. Then
    /// another may have been acknowledged under its id while the queue was away, and that one stays.
    pub async fn remove(&self, upload: Arc<Upload>) -> Result<()> {
        let spool = self.clone();
        blocking(move || spool.remove_now(&upload)).await
    }

    /// The same. Blocks.
    pub fn remove_now(&self, upload: &Upload) -> Result<()> {
        let path = self.path(upload.id);
        let is_its = self.inner.lately_read.is_still(upload.id, upload.sha256, &path);
        if !is_its && read_record(&path).is_ok_and(|found| found.sha256 != upload.sha256) {
            return Ok(());
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::unavailable(format_args!("cannot remove the photo of upload {}", upload.id), error))
            }
            _ => Ok(()),
        }
    }

    /// Removes what writers left unfinished more than `age` ago; how many files that were. Blocks.
    pub fn sweep_incoming(&self, age: Duration) -> Result<u64> {
        let folder = self.inner.root.join("incoming");
        let failed = |error| Error::unavailable("cannot sweep the spool's incoming folder", error);
        let mut swept = 0;
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let modified = entry.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::now());
            let old = SystemTime::now().duration_since(modified).is_ok_and(|since| since >= age);
            if old && fs::remove_file(entry.path()).is_ok() {
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// Calls `found` with every photo file's path and record, in no order. Blocks; a file that comes or goes meanwhile may
    /// or may not be seen.
    pub fn walk(&self, mut found: impl FnMut(&Path, Result<Upload>)) -> Result<()> {
        self.walk_while(|path, record| {
            found(path, record());
            true
        })
    }

    /// Like [`Spool::walk`], until `found` says no. The record is read from the disk when it is asked for, as there may be millions of
    /// them.
    pub fn walk_while(&self, mut found: impl FnMut(&Path, &dyn Fn() -> Result<Upload>) -> bool) -> Result<()> {
        let failed = |error| Error::unavailable("cannot walk the spool", error);
        for shard in 0..=255u8 {
            for entry in fs::read_dir(self.folder(shard)).map_err(failed)? {
                let path = entry.map_err(failed)?.path();
                if !found(&path, &|| read_record(&path)) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Files that are being written, or were left when their writer died. Blocks.
    pub fn incoming_count(&self) -> Result<usize> {
        fs::read_dir(self.inner.root.join("incoming"))
            .map(Iterator::count)
            .map_err(|e| Error::unavailable("cannot list the spool's incoming folder", e))
    }

    /// Where the photo of an upload is. Its name is the id alone, so that two photos under one id meet, whatever they are.
    pub fn path(&self, id: UploadId) -> PathBuf {
        self.folder(shard(id)).join(id.to_string())
    }

    fn folder(&self, shard: u8) -> PathBuf {
        self.inner.root.join(format!("{shard:02x}"))
    }
}

fn not_opened(upload: &Upload, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::Missing("its photo is not on disk".to_owned()),
        _ => Error::unavailable(format_args!("cannot open the photo of upload {}", upload.id), error),
    }
}

/// The last byte is random in both kinds of id.
fn shard(id: UploadId) -> u8 {
    id.0.as_bytes()[15]
}

/// Opens what is a folder, and nothing else.
fn open_folder(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(OFlags::DIRECTORY.bits() as i32).open(path)
}

/// What is open is what has this name now.
fn is_at(folder: &File, path: &Path) -> io::Result<bool> {
    let (open, named) = (folder.metadata()?, fs::metadata(path)?);
    Ok((open.dev(), open.ino()) == (named.dev(), named.ino()))
}

/// Makes the names in `folder` durable.
fn sync_names(folder: &File) -> io::Result<()> {
    folder.sync_all()?;
    // a sync that is under way when XFS shuts down, as it does when its log cannot be written, may say that all is well; what is
    // asked after that fails
    folder.metadata().map(drop)
}

/// True when the file at `path` begins with the photo of so many bytes that was just written.
fn holds_photo_of(path: &Path, part: &Part, size_bytes: u64) -> io::Result<bool> {
    let photo = part.read_back(size_bytes)?;
    Ok(fs::read(path).is_ok_and(|found| found.starts_with(&photo)))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(Error::unavailable("a disk task ended early", e)))
}
