//! What S3 has confirmed, told to the queue: several uploads in one commit, which is much of what an upload costs.
//!
//! Their places are free meanwhile. Always: an upload that has landed waits a moment for others, for long only while some are
//! on their way; a queue that does not answer is given up in time for the attempts to try again. Never: told as finished before
//! the commit that says so; what a crash keeps from being told, a later attempt finds in the bucket.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::underway::Sending;
use crate::error::{Error, Result};
use crate::queue::{Lease, Queue};

/// So many are enough for a commit…
const ENOUGH: usize = 32;
/// …when the first has waited for so long…
const COMPANY: Duration = Duration::from_millis(100);
/// …and fewer when it has waited for so long.
const COMPANY_OF_FEW: Duration = Duration::from_secs(1);
/// When no other has landed for so long, and none is on its way, none is waited for.
const QUIET: Duration = Duration::from_millis(200);
/// Uploads in one commit at most.
const TOGETHER_MAX: usize = 64;
/// The longest that one commit may take: an attempt waits for longer, and the next may go over a connection that works.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Where attempts are brought that have landed. Cheap to clone; its task ends with the last of its clones.
#[derive(Clone)]
pub struct Finishes {
    landed: mpsc::Sender<Brought>,
}

struct Brought {
    lease: Lease,
    at: Instant,
    told: oneshot::Sender<Result<bool>>,
}

impl Finishes {
    /// Must be called in a tokio runtime.
    pub fn start(queue: Queue, sending: Sending) -> Finishes {
        let (landed, brought) = mpsc::channel(TOGETHER_MAX);
        tokio::spawn(finish_all(queue, sending, brought));
        Finishes { landed }
    }

    /// Records that S3 has the photo of this lease, like [`Queue::finish`].
    pub async fn finish(&self, lease: &Lease) -> Result<bool> {
        let closed = || Error::Unavailable("nobody tells the queue any more".to_owned());
        let (told, answered) = oneshot::channel();
        self.landed.send(Brought { lease: lease.clone(), at: Instant::now(), told }).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }
}

/// Waits for others to be told together with the first, which was brought then.
async fn company<T>(brought: &mut mpsc::Receiver<T>, together: &mut Vec<T>, first_at: Instant, sending: &Sending) {
    while together.len() < TOGETHER_MAX {
        let longest = first_at + if together.len() < ENOUGH { COMPANY_OF_FEW } else { COMPANY };
        let quiet = Instant::now() + QUIET;
        match timeout_at(quiet.min(longest), brought.recv()).await {
            Ok(Some(one)) => together.push(one),
            Err(_) if quiet < longest && !sending.is_nobody() => {}
            Ok(None) | Err(_) => break,
        }
    }
}

async fn finish_all(queue: Queue, sending: Sending, mut brought: mpsc::Receiver<Brought>) {
    let mut together = Vec::new();
    while let Some(first) = brought.recv().await {
        let first_at = first.at;
        together.push(first);
        company(&mut brought, &mut together, first_at, &sending).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// How many are told together, and after how long, when they land so many milliseconds after the first, and the last on its way
    /// ends `sent_ms` after it.
    async fn told_together(landing_ms: &[u64], sent_ms: u64) -> (usize, u64) {
        let (landed, mut brought) = mpsc::channel(TOGETHER_MAX);
        let (began, mut together, sending) = (Instant::now(), vec![()], Sending::default());
        let landings = async {
            for ms in landing_ms {
                tokio::time::sleep_until(began + Duration::from_millis(*ms)).await;
                landed.send(()).await.unwrap();
            }
            std::future::pending::<()>().await
        };
        let one = sending.one();
        tokio::spawn(async move {
            tokio::time::sleep_until(began + Duration::from_millis(sent_ms)).await;
            drop(one);
        });
        tokio::select! {
            () = company(&mut brought, &mut together, began, &sending) => {}
            () = landings => unreachable!(),
        }
        (together.len(), began.elapsed().as_millis() as u64)
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_waits_long_for_a_few_and_less_for_many() {
        assert_eq!(told_together(&[], 5000).await, (1, 1000));
        assert_eq!(told_together(&[50, 100, 300, 999, 1001], 5000).await, (5, 1000));
        assert_eq!(told_together(&[&[1; 31][..], &[99, 101]].concat(), 5000).await, (33, 100));
        assert_eq!(told_together(&[&[10; 30][..], &[150, 160]].concat(), 5000).await, (32, 150));
        assert_eq!(told_together(&[1; 100], 5000).await, (TOGETHER_MAX, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_long_while_none_is_on_its_way() {
        assert_eq!(told_together(&[], 0).await, (1, 200));
        assert_eq!(told_together(&[300, 320], 320).await, (3, 520));
        assert_eq!(told_together(&[150, 300, 450, 600, 750, 900], 0).await, (7, 1000), "others began in time");
        assert_eq!(told_together(&[], 500).await, (1, 600), "the other has failed");
        assert_eq!(told_together(&[1; 31], 0).await, (32, 100), "many do not wait longer than they did");
    }
}
