//! The journal: which photos were acknowledged while the queue was away, as an empty mark for each beside the spool's photos.
//!
//! Always: a mark is durable before its photo is acknowledged. Never: the only way to such a photo; a look through the spool finds
//! those too whose mark is gone.

use std::fs::{self, File};
use std::io;
use std::sync::Arc;

use super::photo_file::read_record;
use super::{Spool, blocking, sync_names};
use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::upload::Upload;

impl Spool {
    /// Marks a photo that is on disk as not yet in the queue, durably.
    pub async fn journal(&self, upload: Arc<Upload>) -> Result<()> {
        let spool = self.clone();
        blocking(move || {
            spool.check_fault()?;
            let folder = spool.inner.root.join("journal");
            let mark = folder.join(upload.id.to_string());
            crash_points::pass_blocking(Point::JournalMark).map_err(|e| spool.write_error("journal", &upload, e))?;
            File::create(mark).map_err(|e| spool.write_error("journal", &upload, e))?;
            crash_points::pass_blocking(Point::JournalSync).map_err(|e| spool.sync_error(&upload, e))?;
            File::open(folder).and_then(|f| sync_names(&f)).map_err(|e| spool.sync_error(&upload, e))?;
            crash_points::pass_blocking(Point::JournalMarked).map_err(|e| spool.write_error("journal", &upload, e))
        })
        .await
    }

    /// Up to `limit` photos that were acknowledged while the queue was away. A mark whose photo is gone is dropped.
    pub async fn journaled(&self, limit: usize) -> Result<Vec<Upload>> {
        let spool = self.clone();
        blocking(move || {
            let failed = |error| Error::unavailable("cannot read the spool's journal", error);
            let mut uploads = Vec::new();
            for entry in fs::read_dir(spool.inner.root.join("journal")).map_err(failed)? {
                if uploads.len() == limit {
                    break;
                }
                let mark = entry.map_err(failed)?;
                let Ok(id) = mark.file_name().to_string_lossy().parse() else { continue };
                let path = spool.path(id);
                match read_record(&path) {
                    Ok(upload) => uploads.push(upload),
                    // not where nothing can be said of it
                    Err(Error::Unavailable(_)) if matches!(path.try_exists(), Ok(false)) => {
                        drop(fs::remove_file(mark.path()))
                    }
                    Err(error) if spool.inner.unreadable.failed() => {
                        tracing::error!(photo = %path.display(), %error, "a journaled photo cannot be read");
                    }
                    Err(_) => {}
                }
            }
            Ok(uploads)
        })
        .await
    }

    /// Takes the mark off a photo that the queue has now. That it comes back after a power cut does no harm.
    pub async fn unjournal(&self, upload: &Upload) -> Result<()> {
        let mark = self.inner.root.join("journal").join(upload.id.to_string());
        blocking(move || match fs::remove_file(mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::unavailable("cannot take a mark off the spool's journal", error))
            }
            _ => Ok(()),
        })
        .await
    }
}
