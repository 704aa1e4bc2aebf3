//! Many uploads that are done, one commit.
//!
//! While one transaction is being synced, the uploads that end wait together and go into the next one, as those that are
//! accepted do (`group_commit.rs`). Always: each is told whether its own fence held. Never: one that waits for company.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::{Backend, Lease, unavailable};
use crate::error::{Error, Result};

/// Uploads in one transaction at most, and uploads that may wait for one.
const BATCH_MAX: usize = 256;
/// The longest that one transaction may take: behind a connection that died without a word all the others wait.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub(super) struct Finishing {
    waiting: mpsc::Sender<Waiting>,
}

struct Waiting {
    /// The upload and its fence.
    held: (Uuid, i32),
    answer: oneshot::Sender<Result<bool>>,
}

impl Finishing {
    /// True when the lease still held.
    pub(super) async fn finish(&self, lease: &Lease) -> Result<bool> {
        let closed = || Error::Unavailable("the queue was closed".to_owned());
        let (answer, answered) = oneshot::channel();
        let held = (lease.upload.id.0, lease.attempt);
        self.waiting.send(Waiting { held, answer }).await.map_err(|_| closed())?;
        answered.await.unwrap_or_else(|_| Err(closed()))
    }
}

/// Starts the task that commits. It ends when the last [`Finishing`] is dropped.
pub(super) fn start(backend: Backend) -> Finishing {
    let (waiting, mut receiver) = mpsc::channel::<Waiting>(BATCH_MAX);
    tokio::spawn(async move {
        let mut batch = Vec::new();
        while receiver.recv_many(&mut batch, BATCH_MAX).await > 0 {
            let held: Vec<(Uuid, i32)> = batch.iter().map(|waiting| waiting.held).collect();
            let finishing = tokio::time::timeout(COMMIT_TIMEOUT, async {
                match &backend {
                    Backend::Postgres(queue) => queue.finish(&held).await,
                    Backend::Sqlite(queue) => queue.finish(&held).await,
                }
            });
            let finished: Result<HashSet<(Uuid, i32)>> = match finishing.await {
                Ok(done) => done.map(HashSet::from_iter).map_err(unavailable),
                Err(_) => {
                    Err(Error::Unavailable(format!("the queue did not commit within {} s", COMMIT_TIMEOUT.as_secs())))
                }
            };
            for Waiting { held, answer } in batch.drain(..) {
                let _ = answer.send(finished.as_ref().map(|all| all.contains(&held)).map_err(Clone::clone));
            }
        }
    });
    Finishing { waiting }
}
