//! Which of all drains pours: the allowance is one, however many run.
//!
//! Always: the lead is a lease on the queue's clock, and whoever has it stops relying on it well before it runs out, by its
//! own clock, which keeps running while a process is held; the pacer knows that moment, and lets no byte out after it.
//! Never: two that pour.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::pacer::Pacer;
use crate::queue::Queue;

/// How long the lead holds: what a leader that was killed costs the next.
const LEAD: Duration = Duration::from_secs(7);
/// The part of it that is relied upon without a renewal.
const RELIED_UPON: Duration = Duration::from_secs(5);
const RENEW_EVERY: Duration = Duration::from_secs(2);

/// What one drain knows of the lead.
pub struct Leadership {
    queue: Queue,
    pacer: Pacer,
    owner: String,
    held_until: Option<Instant>,
    asked_at: Option<Instant>,
}

impl Leadership {
    pub fn new(queue: Queue, pacer: Pacer, owner: String) -> Self {
        // until the lead is taken, nothing goes out
        pacer.pour_until(Instant::now());
        Leadership { queue, pacer, owner, held_until: None, asked_at: None }
    }

    /// Whether this drain has the lead now; asks the queue when it is time to.
    pub async fn held(&mut self) -> Result<bool> {
        let due = self.asked_at.is_none_or(|at| at.elapsed() >= RENEW_EVERY);
        if due {
            // from before the question: the queue's lease begins no earlier
            let asked_at = Instant::now();
            let led = tokio::time::timeout(RENEW_EVERY, self.queue.lead(&self.owner, LEAD)).await;
            match led.unwrap_or_else(|_| Err(Error::Unavailable("the queue does not answer".to_owned()))) {
                Ok(true) => self.rely_until(asked_at + RELIED_UPON),
                Ok(false) => self.rely_until(Instant::now()),
                // until the lease is over nobody else can have it
                Err(error) if !self.is_held() => return Err(error),
                Err(_) => {}
            }
            self.asked_at = Some(asked_at);
        }
        Ok(self.is_held())
    }

    fn is_held(&self) -> bool {
        self.held_until.is_some_and(|until| Instant::now() < until)
    }

    fn rely_until(&mut self, until: Instant) {
        self.held_until = Some(until);
        self.pacer.pour_until(until);
    }

    /// Lets another one lead at once.
    pub async fn resign(&mut self) {
        self.rely_until(Instant::now());
        // when the queue does not hear of it, the lease ends by itself
        let _ = tokio::time::timeout(RENEW_EVERY, self.queue.resign(&self.owner)).await;
    }
}
