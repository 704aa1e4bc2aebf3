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
/// How long after a question the next is asked: by a leader, by a leader whom the queue did not answer, so that one answer that stays
/// out does not cost the lead, and by whoever waits for it.
const RENEW_EVERY: Duration = Duration::from_secs(2);
const RETRY_EVERY: Duration = Duration::from_millis(500);
const STANDBY_EVERY: Duration = Duration::from_millis(1500);
/// The longest that the queue is waited for.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);

/// What one drain knows of the lead.
pub struct Leadership {
    queue: Queue,
    pacer: Pacer,
    owner: String,
    held_until: Option<Instant>,
    /// None at first: at once.
    ask_at: Option<Instant>,
}

impl Leadership {
    pub fn new(queue: Queue, pacer: Pacer, owner: String) -> Self {
        // until the lead is taken, nothing goes out
        pacer.pour_until(Instant::now());
        Leadership { queue, pacer, owner, held_until: None, ask_at: None }
    }

    /// Whether this drain has the lead now; asks the queue when it is time to.
    pub async fn held(&mut self) -> Result<bool> {
        if self.ask_at.is_none_or(|at| at <= Instant::now()) {
            // from before the question: the queue's lease begins no earlier
            let asked_at = Instant::now();
            let led = tokio::time::timeout(ANSWER_TIMEOUT, self.queue.lead(&self.owner, LEAD)).await;
            let again = match led.unwrap_or_else(|_| Err(Error::Unavailable("the queue does not answer".to_owned()))) {
                Ok(true) => {
                    self.rely_until(asked_at + RELIED_UPON);
                    RENEW_EVERY
                }
                Ok(false) => {
                    self.rely_until(Instant::now());
                    STANDBY_EVERY
                }
                // until the lease is over nobody else can have it
                Err(_) if self.is_held() => RETRY_EVERY,
                // asked again the next time
                Err(error) => return Err(error),
            };
            self.ask_at = Some(asked_at + again);
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
        let _ = tokio::time::timeout(ANSWER_TIMEOUT, self.queue.resign(&self.owner)).await;
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, SqliteConnection};

    use super::*;
    use crate::config::QueueUrl;
    use crate::units::Rate;

    #[tokio::test]
    async fn a_leader_that_is_not_answered_asks_again_at_once_and_stays_the_leader() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.sqlite");
        let queue = Queue::open(&QueueUrl::Sqlite(path.clone())).unwrap();
        queue.migrate().await.unwrap();
        let mut leadership = Leadership::new(queue, Pacer::new(Rate(1_000_000)), "a".to_owned());
        assert!(leadership.held().await.unwrap());
        let first = leadership.held_until;
        // another process holds the database, so that no answer comes
        let mut other = SqliteConnection::connect(&path.display().to_string()).await.unwrap();
        let writing = other.begin_with("BEGIN IMMEDIATE").await.unwrap();
        leadership.ask_at = None;
        assert!(leadership.held().await.unwrap(), "nobody else can have it yet");
        assert_eq!(leadership.held_until, first);
        drop(writing);
        other.close().await.unwrap();
        assert!(leadership.held().await.unwrap());
        assert!(leadership.held_until > first, "it was asked for anew");
    }

    #[test]
    fn a_question_that_is_late_and_not_answered_leaves_time_for_another() {
        // whoever has uploads on their way looks up from them every second, so that a question may be asked so much later
        let asked = RENEW_EVERY + Duration::from_secs(1);
        let again = asked + ANSWER_TIMEOUT.max(RETRY_EVERY);
        assert!(again < RELIED_UPON && RELIED_UPON < LEAD);
    }
}
