//! What S3 has confirmed, told to the queue: several uploads in one commit.
//!
//! Nobody but the books waits for it, and a commit is much of what an upload costs. Always: an upload that has arrived waits
//! only a moment for others. Never: told as finished before the commit that says so; what a crash keeps from being told, a
//! later attempt finds in the bucket.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, Result};
use crate::queue::{Lease, Queue};

/// How long the first waits for others.
const COMPANY: Duration = Duration::from_millis(100);
/// Uploads in one commit at most.
const TOGETHER_MAX: usize = 64;

/// Where attempts that have arrived are brought. Cheap to clone; its task ends with the last of its clones.
#[derive(Clone)]
pub struct Finishes {
    arrived: mpsc::Sender<Arrived>,
}

struct Arrived {
    lease: Lease,
    told: oneshot::Sender<Result<bool>>,
}

impl Finishes {
    /// Must be called in a tokio runtime.
    pub fn start(queue: Queue) -> Finishes {
        let (arrived, mut brought) = mpsc::channel::<Arrived>(TOGETHER_MAX);
        tokio::spawn(async move {
            let mut together = Vec::new();
            while let Some(first) = brought.recv().await {
                together.push(first);
                let company = tokio::time::sleep(COMPANY);
                tokio::pin!(company);
                while together.len() < TOGETHER_MAX {
                    tokio::select! {
                        Some(one) = brought.recv() => together.push(one),
                        () = &mut company => break,
                    }
                }
                let leases: Vec<&Lease> = together.iter().map(|one| &one.lease).collect();
                let finished = queue.finish_all(&leases).await;
                for (at, one) in together.drain(..).enumerate() {
                    let own = finished.as_ref().map(|finished| finished[at]).map_err(Error::clone);
                    // an attempt that is tired of waiting tries again
                    let _ = one.told.send(own);
                }
            }
        });
        Finishes { arrived }
    }

    /// Records that S3 has the photo of this lease, like [`Queue::finish`].
    pub async fn finish(&self, lease: &Lease) -> Result<bool> {
        let closed = || Error::Unavailable("nobody tells the queue any more".to_owned());
        let (told, answered) = oneshot::channel();
        self.arrived.send(Arrived { lease: lease.clone(), told }).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }
}
