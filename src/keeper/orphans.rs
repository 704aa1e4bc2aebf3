//! Photos on disk that the queue does not know: after a crash between the two, or after the queue was lost.
//!
//! Always: the queue's own record wins over the spool's. Never: a photo removed here; what cannot be read is left for people.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::queue::Queue;
use crate::spool::Spool;
use crate::upload::Upload;

/// Uploads that wait for the queue at once: as many as it commits together.
const AT_ONCE: usize = 256;

/// What a look at the spool found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Adopted {
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
    progress: impl Fn(Adopted),
) -> Result<Adopted> {
    let (found, mut uploads) = mpsc::channel::<Result<Upload>>(AT_ONCE);
    let walker = spool.clone();
    let walk = tokio::task::spawn_blocking(move || {
        walker.walk(|path, record| {
            let in_time = |(from, until): (SystemTime, SystemTime)| {
                let modified = path.metadata().and_then(|m| m.modified());
                modified.is_ok_and(|at| at >= from && at <= until)
            };
            if written.is_none_or(in_time) && path.exists() {
                // nobody listens any more when the queue went away; then the walk is for nothing
                let _ = found.blocking_send(record);
            }
        })
    });
    let mut total = Adopted::default();
    let mut batch = Vec::new();
    while uploads.recv_many(&mut batch, AT_ONCE).await > 0 {
        let accepting = batch.drain(..).map(|record| async {
            match record {
                Ok(upload) => {
                    let upload = Arc::new(upload);
                    let accepted = queue.accept(upload.clone()).await?;
                    spool.unjournal(&upload).await?;
                    Ok::<_, Error>(Some(accepted.new))
                }
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
