//! Photos on disk that the queue does not know: after a crash between the two, or after the queue was lost.
//!
//! Always: the queue's own record wins over the spool's. Never: a photo removed that is not in the bucket; what cannot be
//! read is left for people.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::mpsc;

use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::queue::{Accepted, Queue, Record};
use crate::spool::{Spool, Stored};
use crate::upload::{State, Upload, UploadId};

/// Uploads that wait for the queue at once: as many as it commits together.
const AT_ONCE: usize = 256;

/// What a look at the spool found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Adoption {
    /// Photos looked at.
    pub photos: u64,
    /// Of those, the ones that the queue did not know and knows now.
    pub adopted: u64,
    /// Files that are no whole photo; each is named in the log.
    pub damaged: u64,
}

/// Puts every photo on disk into the queue that is not there, or only those written between two moments. `progress` is told
/// from time to time.
pub async fn adopt(
    spool: &Spool,
    queue: &Queue,
    written: Option<(SystemTime, SystemTime)>,
    progress: impl Fn(Adoption),
) -> Result<Adoption> {
    let (found, mut uploads) = mpsc::channel::<Result<Upload>>(AT_ONCE);
    let walker = spool.clone();
    let walk = tokio::task::spawn_blocking(move || {
        walker.walk_while(|path, record| {
            let in_time = |(from, until): (SystemTime, SystemTime)| {
                let modified = path.metadata().and_then(|m| m.modified());
                modified.is_ok_and(|at| at >= from && at <= until)
            };
            if !written.is_none_or(in_time) {
                return true;
            }
            let record = record();
            // nobody listens any more when the process stops or the queue went away
            !path.exists() || found.blocking_send(record).is_ok()
        })
    });
    let mut total = Adoption::default();
    let mut batch = Vec::new();
    while uploads.recv_many(&mut batch, AT_ONCE).await > 0 {
        let accepting = batch.drain(..).map(|record| async {
            match record {
                Ok(upload) => Ok::<_, Error>(Some(take_in(spool, queue, Arc::new(upload)).await?)),
                Err(error) => {
                    tracing::error!(%error, "a file in the spool is no whole photo; it is left where it is");
                    Ok(None)
                }
            }
        });
        for accepted in futures_util::future::join_all(accepting).await {
            match accepted? {
                Some(new) => {
                    total.photos += 1;
                    total.adopted += u64::from(new);
                }
                None => total.damaged += 1,
            }
        }
        progress(total);
    }
    walk.await.map_err(|e| Error::unavailable("the walk over the spool ended early", e))??;
    Ok(total)
}

/// Its photo is not wanted on disk any more.
fn is_over(record: &Record) -> bool {
    record.removed_at.is_some() || record.state == State::Shed
}

/// Puts one photo of the spool into the queue and takes its mark off the journal. True when the queue did not know it.
pub async fn take_in(spool: &Spool, queue: &Queue, upload: Arc<Upload>) -> Result<bool> {
    let cut_short = |e| Error::unavailable(format_args!("cannot take in upload {}", upload.id), e);
    crash_points::pass(Point::JournalTakeIn).await.map_err(cut_short)?;
    let Accepted { record, new } = queue.accept(upload.clone()).await?;
    if !new && record.upload.sha256 != upload.sha256 {
        // acknowledged while the queue was away and could not say that the id was taken: it gets an id of its own, which
        // its bytes decide, so that a crash in the midst of this makes no second one
        let id = UploadId::of_device(&upload.device_id, &format!("{}\u{1}{}", upload.id, upload.sha256));
        let object_key = upload.object_key.replace(&upload.id.to_string(), &id.to_string());
        let renamed = Arc::new(Upload { id, object_key, ..(*upload).clone() });
        tracing::warn!(upload = %upload.id, device = %upload.device_id, renamed = %id, "two photos have one upload_id; both are kept");
        let photo = spool.read(upload.clone()).await?;
        crash_points::pass(Point::JournalRename).await.map_err(cut_short)?;
        let stored = spool.store(renamed.clone(), Vec::from(photo)).await?;
        crash_points::pass(Point::JournalRenamed).await.map_err(cut_short)?;
        let record = queue.accept(renamed.clone()).await?.record;
        // this was begun before, and it was given up since, or uploaded and taken off the disk, which its record may not say yet
        if is_over(&record) || (stored == Stored::New && record.state == State::Uploaded) {
            spool.remove(renamed).await?;
        }
        crash_points::pass(Point::JournalRenamedTold).await.map_err(cut_short)?;
        spool.remove(upload.clone()).await?;
    } else if !new && is_over(&record) {
        // uploaded and removed before, or given up; what was sent again is not needed
        if record.state == State::Shed {
            tracing::warn!(upload = %upload.id, "sent again while the queue was away, but it was given up before");
        }
        spool.remove(upload.clone()).await?;
    }
    crash_points::pass(Point::JournalTakenIn).await.map_err(cut_short)?;
    spool.unjournal(&upload).await?;
    Ok(new)
}
