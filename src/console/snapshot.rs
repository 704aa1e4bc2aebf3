//! The snapshot that status, metrics and the demo show: taken once a second, shared by all who look.
//!
//! Always: flows are differences of the queue's books, so that they tell of all replicas, not of the one that answers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Uplink;
use crate::error::Result;
use crate::pacer::Pacer;
use crate::queue::{Books, Queue, Shed, Tally};
use crate::shedding::WhenFull;
use crate::spool::Spool;
use crate::status::{
    BacklogStatus, BooksStatus, Condition, Count, DrainStatus, Flow, Forecast, QueueStatus, ShedDevice, ShedStatus,
    SpoolStatus, Status,
};
use crate::telemetry::metrics;
use crate::units::UnixMs;

const PERIOD: Duration = Duration::from_secs(1);
/// Flows are means over this many periods.
const WINDOW: usize = 10;
/// Devices shown of those that lost most to shedding.
const SHED_SHOWN: u32 = 5;

/// What a snapshot is taken of.
#[derive(Clone)]
pub struct Parts {
    pub roles: Vec<&'static str>,
    pub queue: Queue,
    pub spool: Spool,
    pub uplink: Uplink,
    pub when_full: WhenFull,
    /// The drain of this process, if it has one.
    pub drain: Option<(Pacer, watch::Receiver<Condition>)>,
}

/// Takes snapshots until `stop` is cancelled. The first one is there when this returns.
pub async fn start(parts: Parts, stop: CancellationToken) -> watch::Receiver<Arc<Status>> {
    let mut sampler = Sampler { parts, samples: VecDeque::with_capacity(WINDOW + 1), sheds: (0, Vec::new()) };
    let (sender, receiver) = watch::channel(Arc::new(sampler.take().await));
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stop.cancelled() => return,
            }
            sender.send_replace(Arc::new(sampler.take().await));
        }
    });
    receiver
}

struct Sampler {
    parts: Parts,
    /// The books as they were, oldest first.
    samples: VecDeque<(Instant, Books)>,
    /// Devices that lost photos to shedding, and those that lost most, as last heard.
    sheds: (i64, Vec<Shed>),
}

impl Sampler {
    async fn take(&mut self) -> Status {
        let books = tokio::time::timeout(Duration::from_secs(5), self.parts.queue.books())
            .await
            .unwrap_or_else(|_| Err(crate::error::Error::Unavailable("the queue did not answer within 5 s".into())));
        if let Ok(books) = &books {
            self.parts.spool.set_held_bytes(books.on_disk.bytes.max(0) as u64);
            self.samples.push_back((Instant::now(), *books));
            if self.samples.len() > WINDOW + 1 {
                self.samples.pop_front();
            }
        }
        let mut status = self.status(books);
        if status.books.shed.uploads > 0
            && let Ok(Ok(sheds)) =
                tokio::time::timeout(Duration::from_secs(5), self.parts.queue.sheds(SHED_SHOWN)).await
        {
            self.sheds = sheds;
        }
        status.shed = self.shed_status(status.books.shed);
        metrics().observe(&status);
        status
    }

    fn shed_status(&self, lost: Count) -> ShedStatus {
        let (devices, most) = &self.sheds;
        let shown = |shed: &Shed| ShedDevice {
            device_id: shed.device_id.to_string(),
            uploads: shed.lost.uploads,
            bytes: shed.lost.bytes,
            first_at: shed.first_at,
            last_at: shed.last_at,
        };
        ShedStatus {
            policy: self.parts.when_full,
            uploads: lost.uploads,
            bytes: lost.bytes,
            devices: *devices,
            most: most.iter().map(shown).collect(),
        }
    }

    fn status(&self, books: Result<Books>) -> Status {
        let Parts { roles, queue, spool, uplink, drain, .. } = &self.parts;
        let latest = self.samples.back().map(|(_, books)| *books).unwrap_or_default();
        let (arriving, draining) = (self.flow(Books::accepted), self.flow(|books| books.uploaded));
        let allowance = drain.as_ref().map_or(uplink.allowance(), |(pacer, _)| pacer.allowance());
        let backlog = latest.backlog();
        let condition = drain.as_ref().map_or(Condition::Elsewhere, |(_, condition)| condition.borrow().clone());
        let leaving = match condition {
            Condition::Paused { .. } => 0.0,
            // the drain's own process knows its allowance; others see what it does
            Condition::Elsewhere if backlog.uploads > 0 => draining.bytes_per_second,
            _ => allowance.0 as f64,
        };
        let spool = spool_status(spool, latest.on_disk.bytes.max(0) as u64);
        let now = UnixMs::now();
        Status {
            at: now,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            roles: roles.iter().map(|role| role.to_string()).collect(),
            queue: QueueStatus {
                kind: queue.kind().to_owned(),
                reachable: books.is_ok(),
                reason: books.err().map(|error| error.to_string()),
            },
            arriving,
            draining,
            drain: DrainStatus {
                condition,
                allowance_bytes_per_second: allowance.0,
                allowance_rule: format!("{} of {:.0} Mbit/s", uplink.share, uplink.rate.mbit()),
                sent_bytes: drain.as_ref().map_or(0, |(pacer, _)| pacer.paid_bytes()),
            },
            books: BooksStatus {
                accepted: count(latest.accepted()),
                queued: count(latest.queued),
                uploading: count(latest.uploading),
                uploaded: count(latest.uploaded),
                dead: count(latest.dead),
                shed: count(latest.shed),
            },
            backlog: BacklogStatus {
                uploads: backlog.uploads,
                bytes: backlog.bytes,
                oldest_age_seconds: latest.oldest_queued.map_or(0.0, |oldest| now.since(oldest).as_secs_f64()),
            },
            forecast: Forecast::new(
                arriving.bytes_per_second,
                leaving,
                backlog.bytes as f64,
                spool.usable_bytes as f64,
            ),
            spool,
            shed: ShedStatus::default(),
        }
    }

    /// How fast one of the books' numbers grew over the window.
    fn flow(&self, number: impl Fn(&Books) -> Tally) -> Flow {
        let (Some((from, first)), Some((to, last))) = (self.samples.front(), self.samples.back()) else {
            return Flow::default();
        };
        let seconds = (*to - *from).as_secs_f64();
        if seconds <= 0.0 {
            return Flow::default();
        }
        let (first, last) = (number(first), number(last));
        Flow {
            uploads_per_second: (last.uploads - first.uploads).max(0) as f64 / seconds,
            bytes_per_second: (last.bytes - first.bytes).max(0) as f64 / seconds,
        }
    }
}

fn count(tally: Tally) -> Count {
    Count { uploads: tally.uploads, bytes: tally.bytes }
}

fn spool_status(spool: &Spool, held_bytes: u64) -> SpoolStatus {
    let refusing = spool.refusing().err().map(|error| error.to_string());
    match spool.space() {
        Ok(space) => SpoolStatus {
            held_bytes,
            total_bytes: space.total_bytes,
            free_bytes: space.free_bytes,
            usable_bytes: spool.usable_bytes(&space),
            refusing,
        },
        Err(error) => SpoolStatus {
            held_bytes,
            total_bytes: 0,
            free_bytes: 0,
            usable_bytes: 0,
            refusing: refusing.or(Some(error.to_string())),
        },
    }
}
