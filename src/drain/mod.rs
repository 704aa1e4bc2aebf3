//! The way out: claims uploads, paces them, puts them to S3.
//!
//! Always: of all drains one pours, and the others stand by; bytes are paid for before they leave; when the environment is at
//! fault the whole drain pauses, and a single upload probes whether it is over. Never: an upload charged for the
//! environment, or set aside because of it.

mod ahead;
mod attempt;
mod environment;
mod finishes;
mod leader;
pub mod steering;
mod suspects;
mod underway;
mod width;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::ahead::Ahead;
use self::attempt::{LEASE, Outcome};
use self::environment::Environment;
use self::finishes::Finishes;
use self::leader::Leadership;
use self::suspects::Suspects;
use self::underway::{Sending, Underway};
use self::width::{Seen, Width};
use crate::bucket::Bucket;
use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::order::{Lane, Lanes, Order};
use crate::outage::Outage;
use crate::pacer::Pacer;
use crate::queue::{Lease, Pick, Queue};
use crate::spool::Spool;
use crate::status::Condition;
use crate::telemetry::metrics;
use crate::units::Share;

/// Uploads on their way beyond the width, all of which stand still: one more every few seconds for as long as a connection
/// that stands still is kept.
const STILL_MAX: usize = 8;
/// With so many bytes of photos on their way, which are in memory, no other begins.
const UNDERWAY_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Uploads claimed at once at most.
const CLAIM_MAX: usize = 32;
/// With so many uploads that have landed and of which the queue has not heard no more is begun: it hardly answers.
const UNTOLD_MAX: usize = 128;
/// How long to wait before asking an empty queue again; uploads taken by this very process are heard of at once.
const IDLE: Duration = Duration::from_millis(500);
/// A claim that takes longer must not keep the lead from being renewed; what it leased comes back by itself.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(2);
/// How often to look whether a pause that was asked for is over.
const PAUSED_LOOK: Duration = Duration::from_millis(100);
/// How often to look up from uploads that take long.
const LOOK: Duration = Duration::from_secs(1);

/// One drain. Cheap to clone.
#[derive(Clone)]
pub struct Drain {
    spool: Spool,
    queue: Queue,
    sending: Sending,
    finishes: Finishes,
    bucket: Bucket,
    pacer: Pacer,
    owner: String,
    rest: Duration,
    order: Order,
    lanes: Arc<Mutex<Lanes>>,
    suspects: Suspects,
    condition: watch::Sender<Condition>,
}

impl Drain {
    /// Must be called in a tokio runtime.
    pub fn new(spool: Spool, queue: Queue, bucket: Bucket, pacer: Pacer) -> Self {
        let owner = format!("{}-{:08x}", std::process::id(), rand::random::<u32>());
        let (bucket, sending) = (bucket.paced(&pacer), Sending::default());
        Drain {
            spool,
            finishes: Finishes::start(queue.clone(), sending.clone()),
            sending,
            queue,
            bucket,
            pacer,
            owner,
            rest: attempt::REST,
            order: Order::default(),
            lanes: Arc::new(Mutex::new(Lanes::new(Share::HALF))),
            suspects: Suspects::default(),
            condition: watch::Sender::new(Condition::Standby),
        }
    }

    /// With another rest after an upload's first failure of its own; it doubles with each further one.
    pub fn resting(self, rest: Duration) -> Self {
        Drain { rest, ..self }
    }

    /// In this order; when it is balanced, `fresh_share` of what leaves goes to the newest photos.
    pub fn ordered(self, order: Order, fresh_share: Share) -> Self {
        Drain { order, lanes: Arc::new(Mutex::new(Lanes::new(fresh_share))), ..self }
    }

    /// What it is doing, as it changes.
    pub fn condition(&self) -> watch::Receiver<Condition> {
        self.condition.subscribe()
    }

    /// The environment is not known to be at fault.
    fn is_sound(&self) -> bool {
        !matches!(*self.condition.borrow(), Condition::Paused { .. })
    }

    /// Leases up to `limit` uploads, or in an outage the one to probe with.
    async fn claim(&self, limit: u32, outage: bool) -> Result<Vec<Lease>> {
        let leases = match outage {
            false => self.claim_in_order(limit).await?,
            true => self.queue.claim_probe(&self.owner, LEASE).await?,
        };
        if !leases.is_empty() {
            let told = crash_points::pass(Point::DrainClaimed).await;
            told.map_err(|e| Error::unavailable("the queue does not answer", e))?;
        }
        Ok(leases)
    }

    async fn claim_in_order(&self, limit: u32) -> Result<Vec<Lease>> {
        let lane = match self.order {
            Order::Oldest => return self.queue.claim(&self.owner, limit, LEASE, Pick::Oldest).await,
            Order::Newest => return self.queue.claim(&self.owner, limit, LEASE, Pick::Newest).await,
            Order::Balanced => self.lanes.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next(),
        };
        let pick = match lane {
            Lane::Fresh => Pick::Fresh,
            Lane::Backlog => Pick::Backlog,
        };
        let leases = self.queue.claim(&self.owner, limit, LEASE, pick).await?;
        let bytes = leases.iter().map(|lease| lease.upload.size_bytes).sum();
        self.lanes.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).took(lane, bytes);
        Ok(leases)
    }

    /// Pours until `stop` is cancelled, then gives uploads on their way `grace` to finish; what does not, goes back to the
    /// queue.
    pub async fn run(&self, stop: CancellationToken, grace: Duration) {
        let mut leadership = Leadership::new(self.queue.clone(), self.pacer.clone(), self.owner.clone());
        let mut ahead = Ahead::default();
        let mut underway = Underway::default();
        let mut width = Width::default();
        let mut sent_bytes = self.pacer.sent_bytes();
        // the queue had as many as were asked for, or some of them have no place yet
        let mut backlog = false;
        let mut led_before = false;
        let mut environment = Environment::default();
        let queue_outage = Outage::new();

        while !stop.is_cancelled() {
            match leadership.held().await {
                Ok(true) => led_before = true,
                led => {
                    // whatever is on its way now belongs to another drain's allowance
                    if std::mem::take(&mut led_before) {
                        let uploads = underway.sending();
                        match &led {
                            Ok(_) => {
                                tracing::warn!(uploads, "the lead is lost; what is on its way goes back to the queue")
                            }
                            Err(_) if uploads > 0 => {
                                tracing::warn!(
                                    uploads,
                                    "the lead cannot be kept; what is on its way goes back to the queue"
                                );
                            }
                            Err(_) => {}
                        }
                        // first of all: whoever goes by it must not act beside the new leader
                        self.condition.send_replace(Condition::Standby);
                        underway.cut_all().await;
                        ahead.give_back(&self.queue).await;
                    }
                    note_queue(&queue_outage, led.err());
                    self.condition.send_replace(Condition::Standby);
                    tokio::select! {
                        () = tokio::time::sleep(IDLE) => {}
                        () = stop.cancelled() => {}
                    }
                    continue;
                }
            }
            let sent = self.pacer.sent_bytes();
            metrics().sent(sent - std::mem::replace(&mut sent_bytes, sent));
            let Some(allowance) = self.pacer.allowance() else {
                // for how long is not known, and no store waits for long; they leave when they may
                underway.cut_all().await;
                ahead.give_back(&self.queue).await;
                width.forget();
                self.show(&environment, true);
                tokio::select! {
                    () = tokio::time::sleep(PAUSED_LOOK) => {}
                    () = stop.cancelled() => {}
                }
                continue;
            };
            underway.cut_dead();
            self.see_landed(&underway, &mut environment);
            let outage = environment.outage_since();
            match outage {
                None => width.look(
                    Instant::now(),
                    Seen {
                        allowance,
                        paid_bytes: self.pacer.paid_bytes(),
                        arrived_bytes: self.pacer.arrived_bytes(),
                        resent_bytes: self.pacer.resent_bytes(),
                        waiting: self.pacer.waiting(),
                        photo_bytes: underway.bytes() / underway.sending().max(1) as u64,
                        backlog,
                    },
                ),
                Some(_) => width.forget(),
            }
            if outage.is_some() && !ahead.is_empty() || ahead.is_stale(Instant::now()) {
                ahead.give_back(&self.queue).await;
                continue; // it may have taken long, and the lead is to be renewed
            }
            let places = match outage {
                None if underway.untold() >= UNTOLD_MAX => 0,
                None => width.uploads().saturating_sub(underway.occupying()),
                // one probe at a time, beside those that were on their way already or stand still
                Some(since) => usize::from(underway.moving_since(since) == 0),
            };
            let places = places.min((width.uploads() + STILL_MAX).saturating_sub(underway.sending()));
            // a probe goes out whatever is in memory
            let bytes_max = if outage.is_none() { UNDERWAY_BYTES_MAX } else { u64::MAX };
            let places = places - self.begin(places, bytes_max, &mut ahead, &mut underway);
            let resting = environment.rests_until();

            let (mut idle, mut queue_away) = (false, false);
            if places > 0 && ahead.is_empty() && resting.is_none() && underway.bytes() < bytes_max {
                let asked_at = Instant::now();
                let limit = match outage {
                    None => (places + ahead::how_many(underway.pace(asked_at))).min(CLAIM_MAX),
                    Some(_) => 1,
                };
                let claim = tokio::time::timeout(CLAIM_TIMEOUT, self.claim(limit as u32, outage.is_some()));
                let claimed = claim.await;
                match claimed.unwrap_or_else(|_| Err(Error::Unavailable("the queue does not answer".to_owned()))) {
                    Ok(leases) => {
                        note_queue(&queue_outage, None);
                        idle = leases.len() < limit;
                        ahead.add(leases, asked_at);
                        self.begin(places, bytes_max, &mut ahead, &mut underway);
                        backlog = !idle || !ahead.is_empty();
                    }
                    Err(error) => {
                        note_queue(&queue_outage, Some(error));
                        (idle, queue_away) = (true, true);
                    }
                }
            }
            if underway.moving() == 0 && underway.occupying() > 0 {
                environment.hangs();
                if idle {
                    underway.cut_for_a_probe();
                }
            }
            self.show(&environment, underway.is_empty());

            let landing = underway.landing();
            tokio::select! {
                Some(outcome) = underway.next_ended() => {
                    self.see_landed(&underway, &mut environment);
                    match outcome {
                        Outcome::Environment(reason, at) => environment.failed(reason, at, underway.moving() > 0),
                        Outcome::Refused(upload, why, at) => environment.refused(upload, why, at),
                        Outcome::Uploaded | Outcome::Charged | Outcome::GivenUp => {}
                    }
                    // attempts that end now look whether it is an outage
                    self.show(&environment, underway.is_empty());
                }
                // its place is free
                () = landing, if !idle || !ahead.is_empty() => {}
                () = self.queue.arrival(), if idle && !queue_away => {}
                () = tokio::time::sleep(IDLE), if idle => {}
                () = sleep_until(resting.unwrap_or_else(Instant::now)), if resting.is_some() => {}
                // the lead must be renewed even while long uploads are on their way
                () = tokio::time::sleep(LOOK) => {}
                () = stop.cancelled() => {}
            }
        }

        self.condition.send_replace(Condition::Stopping);
        let deadline = Instant::now() + grace;
        ahead.give_back(&self.queue).await;
        let mut looks = tokio::time::interval(LOOK);
        while !underway.is_empty() {
            tokio::select! {
                _ = underway.next_ended() => continue,
                () = sleep_until(deadline) => {}
                // what finishes still pours, so it still needs the lead
                _ = looks.tick() => {
                    if matches!(leadership.held().await, Ok(true)) {
                        continue;
                    }
                }
            }
            tracing::info!(uploads = underway.sending(), "uploads still on their way go back to the queue");
            underway.cut_all().await;
        }
        leadership.resign().await;
    }

    /// Begins as many of those claimed ahead as there are places for, while less than `bytes_max` is in memory; how many.
    fn begin(&self, places: usize, bytes_max: u64, ahead: &mut Ahead, underway: &mut Underway) -> usize {
        let mut begun = 0;
        while begun < places && underway.bytes() < bytes_max {
            let Some(lease) = ahead.next() else { break };
            underway.start(self, lease);
            begun += 1;
        }
        begun
    }

    /// What has landed has passed, whether the queue has heard of it or not.
    fn see_landed(&self, underway: &Underway, environment: &mut Environment) {
        if let Some(at) = underway.landed_at() {
            environment.works(at);
            // attempts that end now look whether it is an outage
            self.show(environment, underway.is_empty());
        }
    }

    fn show(&self, environment: &Environment, nothing_on_its_way: bool) {
        let condition = environment.paused().unwrap_or(match nothing_on_its_way {
            true => Condition::Idle,
            false => Condition::Pouring,
        });
        self.condition.send_if_modified(|shown| {
            let changed = *shown != condition;
            *shown = condition;
            changed
        });
    }
}

/// A queue that is away is logged when it goes and when it is back.
fn note_queue(outage: &Outage, error: Option<Error>) {
    match error {
        None => {
            if let Some(over) = outage.works() {
                tracing::info!(seconds = over.lasted.as_secs(), "the queue answers again");
            }
        }
        Some(error) if outage.failed() => tracing::warn!(%error, "the queue is away; trying again"),
        Some(_) => {}
    }
}
