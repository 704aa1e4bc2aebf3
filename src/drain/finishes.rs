//! What S3 has confirmed, told to the queue: several uploads in one commit, which is much of what an upload costs.
//!
//! Their places are free meanwhile. Always: an upload that has landed waits only a moment for others; a queue that does not
//! answer is given up in time for the attempts to try again. Never: told as finished before the commit that says so; what a
//! crash keeps from being told, a later attempt finds in the bucket.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{Error, Result};
use crate::queue::{Lease, Queue};

/// How long the first waits for others…
const COMPANY: Duration = Duration::from_millis(100);
/// …and while there are not so many…
const ENOUGH: usize = 8;
/// …for how long.
const COMPANY_OF_FEW: Duration = Duration::from_millis(300);
/// Uploads in one commit at most.
const TOGETHER_MAX: usize = 64;
/// The longest that one commit may take: an attempt waits for longer, and the next may go over a connection that works.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Where attempts are brought that have landed. Cheap to clone; its task ends with the last of its clones.
#[derive(Clone)]
pub struct Finishes {
    landed: mpsc::Sender<Landed>,
}

struct Landed {
    lease: Lease,
    told: oneshot::Sender<Result<bool>>,
}

impl Finishes {
    /// Must be called in a tokio runtime.
    pub fn start(queue: Queue) -> Finishes {
        let (landed, brought) = mpsc::channel(TOGETHER_MAX);
        tokio::spawn(finish_all(queue, brought));
        Finishes { landed }
    }

    /// Records that S3 has the photo of this lease, like [`Queue::finish`].
    pub async fn finish(&self, lease: &Lease) -> Result<bool> {
        let closed = || Error::Unavailable("nobody tells the queue any more".to_owned());
        let (told, answered) = oneshot::channel();
        self.landed.send(Landed { lease: lease.clone(), told }).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }
}

async fn finish_all(queue: Queue, mut brought: mpsc::Receiver<Landed>) {
    let mut together = Vec::new();
    while let Some(first) = brought.recv().await {
        together.push(first);
        let first_came = Instant::now();
        while together.len() < TOGETHER_MAX {
            let company = if together.len() < ENOUGH { COMPANY_OF_FEW } else { COMPANY };
            match timeout_at(first_came + company, brought.recv()).await {
                Ok(Some(one)) => together.push(one),
                Ok(None) | Err(_) => break,
            }
        }
        // who was tired of waiting comes again
        together.retain(|one| !one.told.is_closed());
        let leases: Vec<&Lease> = together.iter().map(|one| &one.lease).collect();
        let finished = timeout(COMMIT_TIMEOUT, queue.finish_all(&leases)).await.unwrap_or_else(|_| {
            let late = format!("the queue did not commit within {} s", COMMIT_TIMEOUT.as_secs());
            vec![Err(Error::Unavailable(late)); leases.len()]
        });
        for (one, finished) in together.drain(..).zip(finished) {
            let _ = one.told.send(finished);
        }
    }
}
