//! Many waiting uploads, one commit.
//!
//! While one transaction is being synced, the uploads that arrive wait together and go into the next one: under load one
//! sync acknowledges many, and a lone upload never waits for company.
//!
//! Always: each upload is answered by the commit that held it. Never: an upload's failure reaches the others of its batch.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use super::{Accepted, Backend, Record, unavailable};
use crate::error::{Error, Result};
use crate::upload::{Upload, UploadId};

/// Uploads in one transaction at most.
const BATCH_UPLOADS_MAX: usize = 256;
/// Uploads that may wait for a commit at most; beyond that the queue is as good as away.
const WAITING_UPLOADS_MAX: usize = 4096;
/// The longest a device is kept waiting for the queue.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub(super) struct Accepting {
    waiting: mpsc::Sender<Waiting>,
}

struct Waiting {
    upload: Arc<Upload>,
    answer: oneshot::Sender<Result<Accepted>>,
}

impl Accepting {
    pub(super) async fn accept(&self, upload: Arc<Upload>) -> Result<Accepted> {
        let (answer, answered) = oneshot::channel();
        self.waiting
            .try_send(Waiting { upload, answer })
            .map_err(|_| Error::Unavailable("too many uploads wait for the queue".to_owned()))?;
        match tokio::time::timeout(COMMIT_TIMEOUT, answered).await {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(_)) => Err(Error::Unavailable("the queue was closed".to_owned())),
            Err(_) => {
                Err(Error::Unavailable(format!("the queue did not commit within {} s", COMMIT_TIMEOUT.as_secs())))
            }
        }
    }
}

/// Starts the task that commits. It ends when the last [`Accepting`] is dropped.
pub(super) fn start(backend: Backend, arrivals: Arc<Notify>) -> Accepting {
    let (waiting, mut receiver) = mpsc::channel::<Waiting>(WAITING_UPLOADS_MAX);
    tokio::spawn(async move {
        let mut batch = Vec::new();
        while receiver.recv_many(&mut batch, BATCH_UPLOADS_MAX).await > 0 {
            let uploads: Vec<Arc<Upload>> = batch.iter().map(|w| w.upload.clone()).collect();
            let mut inserted = insert(&backend, &uploads).await;
            if inserted.is_err() && batch.len() > 1 {
                // one of them may be to blame; each gets its own answer
                for Waiting { upload, answer } in batch.drain(..) {
                    let one = insert(&backend, std::slice::from_ref(&upload)).await;
                    let _ = answer.send(accepted(&backend, upload, one.map(|new| !new.is_empty())).await);
                }
                arrivals.notify_one();
                continue;
            }
            for Waiting { upload, answer } in batch.drain(..) {
                // of the same upload twice in one batch, one is new
                let new = inserted.as_mut().map(|ids| ids.remove(&upload.id)).map_err(|e| e.clone());
                let _ = answer.send(accepted(&backend, upload, new).await);
            }
            arrivals.notify_one();
        }
    });
    Accepting { waiting }
}

/// Tries once more when the connection broke: the reply to a commit that was made may have been lost, and the second time
/// the record is simply there.
async fn insert(backend: &Backend, uploads: &[Arc<Upload>]) -> Result<HashSet<UploadId>> {
    let mut tries_left = 1;
    loop {
        let inserted = match backend {
            Backend::Postgres(queue) => queue.insert(uploads).await,
            Backend::Sqlite(queue) => queue.insert(uploads).await,
        };
        match inserted {
            Ok(ids) => return Ok(ids.into_iter().collect()),
            Err(sqlx::Error::Io(_) | sqlx::Error::Protocol(_)) if tries_left > 0 => tries_left -= 1,
            Err(error) => return Err(unavailable(error)),
        }
    }
}

async fn accepted(backend: &Backend, upload: Arc<Upload>, new: Result<bool>) -> Result<Accepted> {
    if new? {
        return Ok(Accepted { record: Record::queued(upload), new: true });
    }
    let held = match backend {
        Backend::Postgres(queue) => queue.get(upload.id).await,
        Backend::Sqlite(queue) => queue.get(upload.id).await,
    };
    match held.map_err(unavailable)? {
        Some(row) => Ok(Accepted { record: Record::try_from(row)?, new: false }),
        None => Err(Error::Unavailable("the record was purged in this very moment; try again".to_owned())),
    }
}
