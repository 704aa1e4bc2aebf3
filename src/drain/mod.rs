//! The way out: claims uploads, paces them, puts them to S3.
//!
//! Always: of all drains one pours, and the others stand by; bytes are paid for before they leave; when the environment is at fault the whole drain pauses, and a single
//! upload probes whether it is over. Never: an upload charged for the environment, or set aside because of it.

mod attempt;
mod leader;
mod paced_body;

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::attempt::{LEASE, Outcome, attempt};
use self::leader::Leadership;
use crate::bucket::Bucket;
use crate::error::Error;
use crate::pacer::Pacer;
use crate::queue::Queue;
use crate::spool::Spool;
use crate::status::Condition;
use crate::telemetry::metrics;
use crate::units::UnixMs;

/// Uploads on their way at once: enough to fill the allowance while others wait for their answers.
const UPLOADS_AT_ONCE: usize = 8;
/// How long to wait before asking an empty queue again; uploads taken by this very process are heard of at once.
const IDLE: Duration = Duration::from_millis(500);
/// A claim that takes longer must not keep the lead from being renewed; what it leased comes back by itself.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(2);
/// How often to look up from uploads that take long.
const LOOK: Duration = Duration::from_secs(1);
/// The first pause after a fault of the environment; it doubles up to the longest, which keeps the way back short.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// One drain. Cheap to clone.
#[derive(Clone)]
pub struct Drain {
    spool: Spool,
    queue: Queue,
    bucket: Bucket,
    pacer: Pacer,
    owner: String,
    rest: Duration,
    condition: watch::Sender<Condition>,
}

/// A pause that the environment forced.
struct Pause {
    since: UnixMs,
    until: Instant,
    probes: u32,
}

impl Drain {
    pub fn new(spool: Spool, queue: Queue, bucket: Bucket, pacer: Pacer) -> Self {
        let owner = format!("{}-{:08x}", std::process::id(), rand::random::<u32>());
        Drain {
            spool,
            queue,
            bucket,
            pacer,
            owner,
            rest: attempt::REST,
            condition: watch::Sender::new(Condition::Idle),
        }
    }

    /// With another rest after an upload's first failure of its own; it doubles with each further one.
    pub fn resting(self, rest: Duration) -> Self {
        Drain { rest, ..self }
    }

    /// What it is doing, as it changes.
    pub fn condition(&self) -> watch::Receiver<Condition> {
        self.condition.subscribe()
    }

    /// The environment is not known to be at fault.
    fn is_healthy(&self) -> bool {
        !matches!(*self.condition.borrow(), Condition::Paused { .. })
    }

    async fn pay(&self, bytes: u64) {
        self.pacer.pay(bytes).await;
        metrics().sent(bytes);
    }

    /// Pours until `stop` is cancelled, then gives uploads on their way `grace` to finish; what does not, goes back to the
    /// queue.
    pub async fn run(&self, stop: CancellationToken, grace: Duration) {
        let mut cut = CancellationToken::new();
        let mut leadership = Leadership::new(self.queue.clone(), self.owner.clone());
        let mut on_their_way: JoinSet<Outcome> = JoinSet::new();
        let mut pause: Option<Pause> = None;
        let mut queue_away = false;

        while !stop.is_cancelled() {
            match leadership.held().await {
                Ok(true) => {}
                led => {
                    // whatever is on its way now belongs to another drain's allowance
                    if !on_their_way.is_empty() {
                        tracing::warn!(
                            uploads = on_their_way.len(),
                            "the lead is lost; what is on its way goes back to the queue"
                        );
                        std::mem::take(&mut cut).cancel();
                        while on_their_way.join_next().await.is_some() {}
                    }
                    self.note_queue(&mut queue_away, led.err());
                    self.condition.send_replace(Condition::Standby);
                    tokio::select! {
                        () = tokio::time::sleep(IDLE) => {}
                        () = stop.cancelled() => {}
                    }
                    continue;
                }
            }
            let at_once = if pause.is_some() { 1 } else { UPLOADS_AT_ONCE };
            let free = at_once.saturating_sub(on_their_way.len());
            let resting = pause.as_ref().is_some_and(|p| p.until > Instant::now());

            let mut idle = false;
            if free > 0 && !resting {
                let claim = tokio::time::timeout(CLAIM_TIMEOUT, self.queue.claim(&self.owner, free as u32, LEASE));
                let claimed = claim.await;
                match claimed.unwrap_or_else(|_| Err(Error::Unavailable("the queue does not answer".to_owned()))) {
                    Ok(leases) => {
                        self.note_queue(&mut queue_away, None);
                        idle = leases.len() < free;
                        for lease in leases {
                            let (drain, cut) = (self.clone(), cut.clone());
                            on_their_way.spawn(async move { attempt(&drain, lease, cut).await });
                        }
                    }
                    Err(error) => {
                        self.note_queue(&mut queue_away, Some(error));
                        idle = true;
                    }
                }
            }
            self.show(&pause, on_their_way.is_empty());

            let rest = pause.as_ref().filter(|_| resting).map(|p| p.until);
            tokio::select! {
                Some(ended) = on_their_way.join_next() => match ended {
                    Ok(outcome) => self.take_note(outcome, &mut pause),
                    Err(error) => tracing::error!(%error, "an attempt ended in a panic; its lease will run out"),
                },
                () = self.queue.arrival(), if idle && !queue_away => {}
                () = tokio::time::sleep(IDLE), if idle => {}
                () = sleep_until(rest.unwrap_or_else(Instant::now)), if rest.is_some() => {}
                // the lead must be renewed even while long uploads are on their way
                () = tokio::time::sleep(LOOK) => {}
                () = stop.cancelled() => {}
            }
        }

        self.condition.send_replace(Condition::Stopping);
        let deadline = Instant::now() + grace;
        while !on_their_way.is_empty() {
            tokio::select! {
                _ = on_their_way.join_next() => continue,
                () = sleep_until(deadline) => {}
                // what finishes still pours, so it still needs the lead
                () = tokio::time::sleep(LOOK) => {
                    if matches!(leadership.held().await, Ok(true)) {
                        continue;
                    }
                }
            }
            tracing::info!(uploads = on_their_way.len(), "uploads still on their way go back to the queue");
            cut.cancel();
            while on_their_way.join_next().await.is_some() {}
        }
        leadership.resign().await;
    }

    /// A queue that is away is logged when it goes and when it is back.
    fn note_queue(&self, away: &mut bool, error: Option<Error>) {
        match error {
            None if std::mem::take(away) => tracing::info!("the queue answers again"),
            Some(error) if !std::mem::replace(away, true) => tracing::warn!(%error, "the queue is away; trying again"),
            _ => {}
        }
    }

    /// The first fault is logged; what follows is counted until it is over.
    fn take_note(&self, outcome: Outcome, pause: &mut Option<Pause>) {
        match outcome {
            Outcome::Environment(reason) => {
                let now = Instant::now();
                let (since, probes) = match pause {
                    // several were on their way when it broke; they are one fault
                    Some(pause) if pause.until > now => return,
                    Some(pause) => (pause.since, pause.probes + 1),
                    None => {
                        tracing::warn!(%reason, "the drain pauses until this is over; no upload is charged for it");
                        (UnixMs::now(), 0)
                    }
                };
                let rest = PAUSE_MIN.saturating_mul(1 << probes.min(10)).min(PAUSE_MAX);
                let rest = rest.mul_f64(rand::random_range(0.8..1.0));
                *pause = Some(Pause { since, until: now + rest, probes });
                let until = UnixMs(UnixMs::now().0 + rest.as_millis() as i64);
                self.condition.send_replace(Condition::Paused { reason, since, until });
            }
            // what was on its way when the pause began says nothing of its end
            Outcome::Uploaded if pause.as_ref().is_some_and(|p| p.until > Instant::now()) => {}
            Outcome::Uploaded => {
                if let Some(over) = pause.take() {
                    let seconds = UnixMs::now().since(over.since).as_secs();
                    tracing::info!(paused_seconds = seconds, probes = over.probes, "the drain pours again");
                }
            }
            Outcome::Charged | Outcome::GivenUp => {}
        }
    }

    fn show(&self, pause: &Option<Pause>, nothing_on_its_way: bool) {
        if pause.is_none() {
            let condition = if nothing_on_its_way { Condition::Idle } else { Condition::Pouring };
            self.condition.send_if_modified(|shown| {
                let changed = *shown != condition;
                *shown = condition;
                changed
            });
        }
    }
}
