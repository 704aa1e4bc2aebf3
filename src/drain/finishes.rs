//! What S3 has confirmed, told to the queue: several uploads in one commit, which is much of what an upload costs.
//!
//! Their places are free meanwhile. Always: an upload that has landed waits a moment for others that are on their way; a queue that does not
//! answer is given up in time for the attempts to try again. Never: told as finished before the commit that says so; what a
//! crash keeps from being told, a later attempt finds in the bucket.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{Error, Result};
use crate::queue::{Lease, Queue};

/// So many are enough for a commit…
const ENOUGH: usize = 32;
/// …when the first has waited for so long…
const COMPANY: Duration = Duration::from_millis(100);
/// …and fewer when it has waited for so long.
const COMPANY_OF_FEW: Duration = Duration::from_secs(1);
/// When no other was on its way as the latest landed, others may begin within so long; none is to be waited for beyond that.
const COMPANY_OF_NONE: Duration = Duration::from_millis(200);
/// Uploads in one commit at most.
const TOGETHER_MAX: usize = 64;
/// The longest that one commit may take: an attempt waits for longer, and the next may go over a connection that works.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Where attempts are brought that have landed. Cheap to clone; its task ends with the last of its clones.
#[derive(Clone)]
pub struct Finishes {
    landed: mpsc::Sender<Brought<Untold>>,
}

/// What has landed, when, and whether it was the last on its way.
struct Brought<T> {
    at: Instant,
    last: bool,
    what: T,
}

struct Untold {
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

    /// Records that S3 has the photo of this lease, like [`Queue::finish`]; `last` when no other was on its way as it landed.
    pub async fn finish(&self, lease: &Lease, last: bool) -> Result<bool> {
        let closed = || Error::Unavailable("nobody tells the queue any more".to_owned());
        let (told, answered) = oneshot::channel();
        let what = Untold { lease: lease.clone(), told };
        self.landed.send(Brought { at: Instant::now(), last, what }).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }
}

/// The first, and others that it waited for; none when nobody brings any more.
async fn company<T>(brought: &mut mpsc::Receiver<Brought<T>>) -> Option<Vec<T>> {
    let mut latest = brought.recv().await?;
    let first_at = latest.at;
    let mut together = Vec::new();
    loop {
        let longest = if together.len() + 1 < ENOUGH { COMPANY_OF_FEW } else { COMPANY };
        let mut until = first_at + longest;
        if latest.last {
            until = until.min(latest.at + COMPANY_OF_NONE);
        }
        together.push(latest.what);
        if together.len() == TOGETHER_MAX {
            return Some(together);
        }
        match timeout_at(until, brought.recv()).await {
            Ok(Some(another)) => latest = another,
            Ok(None) | Err(_) => return Some(together),
        }
    }
}

async fn finish_all(queue: Queue, mut brought: mpsc::Receiver<Brought<Untold>>) {
    while let Some(mut together) = company(&mut brought).await {
        // who was tired of waiting comes again
        together.retain(|one| !one.told.is_closed());
        let leases: Vec<&Lease> = together.iter().map(|one| &one.lease).collect();
        let finished = timeout(COMMIT_TIMEOUT, queue.finish_all(&leases)).await.unwrap_or_else(|_| {
            let late = format!("the queue did not commit within {} s", COMMIT_TIMEOUT.as_secs());
            vec![Err(Error::Unavailable(late)); leases.len()]
        });
        for (one, finished) in together.into_iter().zip(finished) {
            let _ = one.told.send(finished);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many are told together, and how long after the first, when they land at these milliseconds; `last` is the number of the
    /// one that lands while no other is on its way.
    async fn told_together(landing_ms: &[u64], last: Option<usize>) -> (usize, u64) {
        let (landed, mut brought) = mpsc::channel(TOGETHER_MAX);
        let began = Instant::now();
        let landings = async {
            for (number, ms) in landing_ms.iter().enumerate() {
                tokio::time::sleep_until(began + Duration::from_millis(*ms)).await;
                let landing = Brought { at: Instant::now(), last: last == Some(number), what: () };
                landed.send(landing).await.unwrap();
            }
            std::future::pending::<()>().await
        };
        let together = tokio::select! {
            together = company(&mut brought) => together.unwrap().len(),
            () = landings => unreachable!(),
        };
        (together, began.elapsed().as_millis() as u64 - landing_ms[0])
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_waits_long_for_a_few_and_less_for_many() {
        assert_eq!(told_together(&[0], None).await, (1, 1000));
        assert_eq!(told_together(&[0, 50, 100, 300, 999, 1001], None).await, (5, 1000));
        assert_eq!(told_together(&[&[0], &[1; 31][..], &[99, 101]].concat(), None).await, (33, 100));
        assert_eq!(told_together(&[&[0], &[10; 30][..], &[150, 160]].concat(), None).await, (32, 150));
        assert_eq!(told_together(&[1; 100], None).await, (TOGETHER_MAX, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_lands_last_waits_only_for_those_that_may_begin_in_a_moment() {
        assert_eq!(told_together(&[0], Some(0)).await, (1, 200));
        assert_eq!(told_together(&[0, 500], Some(1)).await, (2, 700));
        assert_eq!(told_together(&[0, 900], Some(1)).await, (2, 1000));
        // another has begun and landed in the meantime, and more are on their way
        assert_eq!(told_together(&[0, 150, 600], Some(0)).await, (3, 1000));
    }
}
