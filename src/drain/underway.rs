//! The uploads on their way: how many there are, which of them stand still, how they end.
//!
//! One that has landed is in the bucket, and the queue has yet to hear of it: its place is free, but it has not ended. Always:
//! one that stands still keeps its connection for a while, longer with each attempt, and makes room for another when one that
//! began after it stood still has passed, which proves that link and store work. Never: one cut for waiting for the pacer.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::{Id, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Drain;
use super::attempt::{Outcome, attempt};
use crate::pacer::Turn;
use crate::queue::Lease;

/// When the other side has not moved for this long, an upload stands still.
const STILL: Duration = Duration::from_secs(4);
/// A first attempt that stands still is given so long while others pass, and so long when nothing else could probe. Each
/// further attempt of the upload is given twice as long, so that a store that is merely slow gets its time.
const PATIENCE: Duration = STILL;
const PATIENCE_ALONE: Duration = Duration::from_secs(8);
/// The pace is that of so many: those that began together land together, so it is more than may usually be on their way.
const PACE_OF: usize = 32;

/// All that one drain has on their way.
#[derive(Default)]
pub struct Underway {
    tasks: JoinSet<Outcome>,
    uploads: HashMap<Id, OnItsWay>,
    landings: Landings,
}

struct OnItsWay {
    began: Instant,
    bytes: u64,
    attempt: i32,
    turn: Turn,
    cut: Cut,
    landed: Arc<AtomicBool>,
}

/// That the bucket has the photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landed {
    /// It was sent.
    Sent,
    /// It was there already, which says nothing of the way for photos.
    Found,
}

/// How many of one drain's attempts have neither landed nor failed; one that only has to tell the queue is not counted. Cheap
/// to clone.
#[derive(Debug, Clone, Default)]
pub struct Sending(Arc<AtomicUsize>);

impl Sending {
    /// Nobody does.
    pub fn is_nobody(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    /// Counts one more until that is dropped.
    pub fn one(&self) -> OneSending {
        self.0.fetch_add(1, Ordering::Relaxed);
        OneSending(self.clone())
    }
}

/// One that is counted.
pub struct OneSending(Sending);

impl Drop for OneSending {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// By which an attempt tells that it has landed; dropped without that, it has failed.
pub struct Landing {
    began: Instant,
    landed: Arc<AtomicBool>,
    landings: Landings,
    _sending: OneSending,
}

/// What has landed so far.
#[derive(Clone, Default)]
struct Landings {
    latest: Arc<Mutex<Latest>>,
    /// One has landed since somebody last waited for it.
    any: Arc<Notify>,
}

#[derive(Default)]
struct Latest {
    /// When the latest landed, [`PACE_OF`] of them.
    landed_at: VecDeque<Instant>,
    /// When that of those that were sent began that began last.
    passed_began: Option<Instant>,
}

impl Landings {
    fn latest(&self) -> MutexGuard<'_, Latest> {
        self.latest.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Latest {
    /// One landed then.
    fn note(&mut self, at: Instant) {
        self.landed_at.push_back(at);
        if self.landed_at.len() > PACE_OF {
            self.landed_at.pop_front();
        }
    }

    /// How many land in a second; none as long as too few have.
    fn pace(&self, now: Instant) -> f64 {
        match self.landed_at.front() {
            Some(first) if self.landed_at.len() == PACE_OF => {
                PACE_OF as f64 / (now - *first).max(Duration::from_millis(1)).as_secs_f64()
            }
            _ => 0.0,
        }
    }
}

impl Landing {
    pub fn tell(self, landed: Landed) {
        self.landed.store(true, Ordering::Relaxed);
        let mut latest = self.landings.latest();
        latest.note(Instant::now());
        if landed == Landed::Sent {
            latest.passed_began = latest.passed_began.max(Some(self.began));
        }
        drop(latest);
        self.landings.any.notify_one();
    }
}

/// The two ways to end an attempt early.
#[derive(Clone, Default)]
pub struct Cut {
    /// It is given up, by no fault of anyone's.
    pub given_up: CancellationToken,
    /// It has stood still for too long.
    pub stood_still: CancellationToken,
}

impl OnItsWay {
    /// It stands still, and has for longer than it is given.
    fn is_dead(&self, patience: Duration) -> bool {
        let given = patience.saturating_mul(1 << (self.attempt - 1).clamp(0, 10));
        self.still_since().is_some_and(|since| since.elapsed() >= given)
    }

    /// Since when it stands still, if it does.
    fn still_since(&self) -> Option<Instant> {
        self.turn.theirs_since().filter(|since| since.elapsed() >= STILL)
    }
}

impl Underway {
    /// All have ended.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// How many have not landed.
    pub fn sending(&self) -> usize {
        self.not_landed().count()
    }

    /// Bytes of their photos, which are in memory.
    pub fn bytes(&self) -> u64 {
        self.not_landed().map(|upload| upload.bytes).sum()
    }

    /// How many have landed without the queue having heard of it.
    pub fn untold(&self) -> usize {
        self.uploads.len() - self.sending()
    }

    fn not_landed(&self) -> impl Iterator<Item = &OnItsWay> {
        self.uploads.values().filter(|upload| !upload.landed.load(Ordering::Relaxed))
    }

    /// Resolves when one has landed since the last call.
    pub fn landing(&self) -> impl Future<Output = ()> + use<> {
        let any = self.landings.any.clone();
        async move { any.notified().await }
    }

    /// How many land in a second, by the latest [`PACE_OF`]; none as long as fewer have.
    pub fn pace(&self, now: Instant) -> f64 {
        self.landings.latest().pace(now)
    }

    /// When the latest of all landed.
    pub fn landed_at(&self) -> Option<Instant> {
        self.landings.latest().landed_at.back().copied()
    }

    /// How many do not stand still, those that have landed included.
    pub fn moving(&self) -> usize {
        self.uploads.values().filter(|upload| upload.still_since().is_none()).count()
    }

    /// How many take up a place among those that may be on their way: all but those that stand still where others pass.
    pub fn occupying(&self) -> usize {
        self.not_landed().filter(|upload| !self.stands_alone(upload)).count()
    }

    /// It stands still, and one that began later has passed.
    fn stands_alone(&self, upload: &OnItsWay) -> bool {
        let others_passed = |since| self.landings.latest().passed_began.is_some_and(|began| since < began);
        upload.still_since().is_some_and(others_passed)
    }

    /// Of those that do not stand still, how many began at this moment or later.
    pub fn moving_since(&self, moment: Instant) -> usize {
        self.uploads.values().filter(|upload| upload.began >= moment && upload.still_since().is_none()).count()
    }

    /// Sends one more.
    pub fn start(&mut self, drain: &Drain, lease: Lease) {
        let (began, turn, cut) = (Instant::now(), Turn::default(), Cut::default());
        let bytes = lease.upload.size_bytes;
        let landed = Arc::new(AtomicBool::new(false));
        let (landings, _sending) = (self.landings.clone(), drain.sending.one());
        let landing = Landing { began, landed: landed.clone(), landings, _sending };
        let on_its_way =
            OnItsWay { began, bytes, attempt: lease.attempt, turn: turn.clone(), cut: cut.clone(), landed };
        let drain = drain.clone();
        let task = self.tasks.spawn(async move { attempt(&drain, lease, turn, cut, landing).await });
        self.uploads.insert(task.id(), on_its_way);
    }

    /// How the next ends; none when none is on its way. May be dropped while waiting.
    pub async fn next_ended(&mut self) -> Option<Outcome> {
        let ended = self.tasks.join_next_with_id().await?;
        let (id, outcome) = match ended {
            Ok((id, outcome)) => (id, outcome),
            Err(error) => {
                tracing::error!(%error, "an attempt ended in a panic; its lease will run out");
                (error.id(), Outcome::GivenUp)
            }
        };
        self.uploads.remove(&id);
        Some(outcome)
    }

    /// Cuts those that have stood still for longer than they are given while others passed.
    pub fn cut_dead(&self) {
        let dead = self.uploads.values().filter(|upload| self.stands_alone(upload) && upload.is_dead(PATIENCE));
        dead.for_each(|upload| upload.cut.stood_still.cancel());
    }

    /// Cuts one that has stood still for longer than it is given when nothing else is there, so that its next attempt is a
    /// probe.
    pub fn cut_for_a_probe(&self) {
        if let Some(upload) = self.uploads.values().find(|upload| upload.is_dead(PATIENCE_ALONE)) {
            upload.cut.stood_still.cancel();
        }
    }

    /// Cuts all and waits until they have given their leases back.
    pub async fn cut_all(&mut self) {
        self.uploads.values().for_each(|upload| upload.cut.given_up.cancel());
        while self.next_ended().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_known_from_enough_landings_and_falls_while_none_lands() {
        let (now, ms) = (Instant::now(), Duration::from_millis);
        let mut latest = Latest::default();
        (0..31).for_each(|n| latest.note(now + ms(n * 50)));
        assert_eq!(latest.pace(now + ms(1_600)), 0.0);
        (31..40).for_each(|n| latest.note(now + ms(n * 50)));
        assert_eq!(latest.pace(now + ms(2_000)), 20.0);
        assert_eq!(latest.pace(now + ms(3_600)), 10.0);
    }

    #[test]
    fn who_has_landed_or_failed_is_sending_no_more() {
        let (sending, landings) = (Sending::default(), Landings::default());
        let [lands, fails] = [(); 2].map(|()| {
            let _sending = sending.one();
            Landing { began: Instant::now(), landed: Arc::default(), landings: landings.clone(), _sending }
        });
        lands.tell(Landed::Sent);
        assert!(!sending.is_nobody());
        drop(fails);
        assert!(sending.is_nobody());
    }

    #[test]
    fn photos_that_land_together_after_a_long_way_are_no_high_pace() {
        let (now, mut latest) = (Instant::now(), Latest::default());
        // eight at a time, every 20 s
        (0..40).for_each(|n| latest.note(now + Duration::from_secs(n / 8 * 20)));
        assert!(latest.pace(now + Duration::from_secs(80)) < 1.0);
    }
}
