//! The uploads on their way: how many there are, which of them stand still, how they end.
//!
//! Always: one that stands still keeps its connection, and makes room for another to try; it is cut when one that began
//! after it stood still has passed, which proves that link and store work and its connection does not. Never: one cut for
//! waiting for the pacer.

use std::collections::HashMap;
use std::time::Duration;

use tokio::task::{Id, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Drain;
use super::attempt::{Outcome, attempt};
use super::paced_body::Turn;
use crate::queue::Lease;

/// When the other side has not moved for this long, an upload stands still.
const STILL: Duration = Duration::from_secs(4);
/// With nothing else that could probe, a first attempt that stands still for this long is begun anew; each further attempt
/// of the upload is given twice as long, so that a store that is merely slow gets its time.
const PATIENCE: Duration = Duration::from_secs(8);

/// All that one drain has on their way.
#[derive(Default)]
pub struct Underway {
    tasks: JoinSet<Outcome>,
    uploads: HashMap<Id, OnItsWay>,
}

struct OnItsWay {
    began: Instant,
    attempt: i32,
    turn: Turn,
    cut: CancellationToken,
}

impl OnItsWay {
    /// Since when it stands still, if it does.
    fn still_since(&self) -> Option<Instant> {
        self.turn.theirs_since().filter(|since| since.elapsed() >= STILL)
    }
}

/// How one upload ended.
pub struct Ended {
    pub outcome: Outcome,
    pub began: Instant,
}

impl Underway {
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// How many do not stand still.
    pub fn moving(&self) -> usize {
        self.uploads.values().filter(|upload| upload.still_since().is_none()).count()
    }

    /// Of those that do not stand still, how many began at this moment or later.
    pub fn moving_since(&self, moment: Instant) -> usize {
        self.uploads.values().filter(|upload| upload.began >= moment && upload.still_since().is_none()).count()
    }

    /// Sends one more.
    pub fn start(&mut self, drain: &Drain, lease: Lease) {
        let (began, turn, cut) = (Instant::now(), Turn::default(), CancellationToken::new());
        let on_its_way = OnItsWay { began, attempt: lease.attempt, turn: turn.clone(), cut: cut.clone() };
        let drain = drain.clone();
        let task = self.tasks.spawn(async move { attempt(&drain, lease, turn, cut).await });
        self.uploads.insert(task.id(), on_its_way);
    }

    /// The next that ends; none when none is on its way. May be dropped while waiting.
    pub async fn next_ended(&mut self) -> Option<Ended> {
        let ended = self.tasks.join_next_with_id().await?;
        let (id, outcome) = match ended {
            Ok((id, outcome)) => (id, outcome),
            Err(error) => {
                tracing::error!(%error, "an attempt ended in a panic; its lease will run out");
                (error.id(), Outcome::GivenUp)
            }
        };
        let began = self.uploads.remove(&id).map_or_else(Instant::now, |upload| upload.began);
        Some(Ended { outcome, began })
    }

    /// Cuts those that stood still already when an upload began that has passed since.
    pub fn cut_still_before(&self, passed_began: Instant) {
        let dead =
            self.uploads.values().filter(|upload| upload.still_since().is_some_and(|since| since < passed_began));
        dead.for_each(|upload| upload.cut.cancel());
    }

    /// Cuts one that has stood still for longer than it is given, so that its next attempt is a probe.
    pub fn cut_for_a_probe(&self) {
        let given = |attempt: i32| PATIENCE.saturating_mul(1 << (attempt - 1).clamp(0, 10));
        let dead = self
            .uploads
            .values()
            .find(|upload| upload.still_since().is_some_and(|since| since.elapsed() >= given(upload.attempt)));
        if let Some(upload) = dead {
            upload.cut.cancel();
        }
    }

    /// Cuts all and waits until they have given their leases back.
    pub async fn cut_all(&mut self) {
        self.uploads.values().for_each(|upload| upload.cut.cancel());
        while self.next_ended().await.is_some() {}
    }
}
