//! The snapshot that status, metrics and the demo show: taken with each look at the queue, about once a second, shared by all who
//! ask for it.
//!
//! Always: flows are differences of the queue's books, so that they tell of all replicas, not of the one that answers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::allowance::{Control, Standing, Uplink};
use crate::error::{Error, Result};
use crate::forecast::{self, Arrivals, Forecast, Outlook, Site, Watch};
use crate::pacer::Pacer;
use crate::queue::{Books, Look, Queue, Shed, Tally};
use crate::shedding::WhenFull;
use crate::spool::Spool;
use crate::status::{
    BacklogStatus, BooksStatus, Condition, Count, DrainStatus, Flow, QueueStatus, ShedDevice, ShedStatus, SpoolStatus,
    Status,
};
use crate::telemetry::metrics;
use crate::units::{Rate, UnixMs};

/// A forecast looks sixty days ahead, which is most of what a snapshot takes: it is made anew after so long, or when what may
/// leave has changed.
const FORECAST_AGE_MAX: Duration = Duration::from_secs(5);
/// Flows are means over the time that so many looks take, which is ten seconds.
const WINDOW: usize = 11;
/// Devices shown of those that lost most to shedding.
const SHED_SHOWN: u32 = 5;

/// What a snapshot is taken of.
#[derive(Clone)]
pub struct Parts {
    pub roles: Vec<&'static str>,
    pub queue: Queue,
    /// How the site stands, as the queue is asked again and again.
    pub looks: watch::Receiver<Result<Look>>,
    pub spool: Spool,
    pub uplink: Uplink,
    /// What is allowed, as it changes.
    pub standing: watch::Receiver<Standing>,
    /// How long an uploaded photo stays on disk.
    pub retain: Duration,
    pub when_full: WhenFull,
    /// The drain of this process, if it has one.
    pub drain: Option<(Pacer, watch::Receiver<Condition>)>,
}

/// Takes snapshots until `stop` is cancelled. The first one is there when this returns.
pub async fn start(parts: Parts, stop: CancellationToken) -> watch::Receiver<Arc<Status>> {
    let samples = VecDeque::with_capacity(WINDOW + 1);
    let mut sampler = Sampler {
        parts,
        samples,
        arrivals: Arrivals::default(),
        sent: None,
        forecasted: None,
        outlook: Watch::default(),
        sheds: (0, Vec::new()),
    };
    let (sender, receiver) = watch::channel(Arc::new(sampler.take().await));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                looked = sampler.parts.looks.changed() => if looked.is_err() { return },
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
    arrivals: Arrivals,
    /// What this process had paid, and what had been uploaded, when it began.
    sent: Option<(u64, i64)>,
    forecasted: Option<Forecasted>,
    outlook: Watch,
    /// Devices that lost photos to shedding, and those that lost most, as last heard.
    sheds: (i64, Vec<Shed>),
}

/// The last forecast, and what it went by.
struct Forecasted {
    at: Instant,
    standing: Standing,
    outage: bool,
    forecast: Forecast,
}

impl Sampler {
    async fn take(&mut self) -> Status {
        let look = self.parts.looks.borrow_and_update().clone();
        let books = look.and_then(|look| Ok((look.at, look.books?)));
        if let Ok((at, books)) = &books {
            self.parts.spool.set_held_bytes(books.on_disk.bytes.max(0) as u64);
            self.samples.push_back((*at, *books));
            let accepted = books.accepted();
            self.arrivals.note(UnixMs::now(), accepted.bytes as f64, accepted.uploads as f64);
            if self.samples.len() > WINDOW + 1 {
                self.samples.pop_front();
            }
        }
        let mut status = self.status(books.err());
        if status.books.shed.uploads > 0
            && let Ok(Ok(sheds)) =
                tokio::time::timeout(Duration::from_secs(5), self.parts.queue.sheds(SHED_SHOWN)).await
        {
            self.sheds = sheds;
        }
        status.shed = self.shed_status(status.books.shed);
        metrics().observe(&status);
        // once for the site, by who pours
        let elsewhere = matches!(status.drain.condition, Condition::Elsewhere | Condition::Standby);
        if !elsewhere && status.queue.reachable {
            self.tell(&status);
        }
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

    fn tell(&mut self, status: &Status) {
        let forecast = &status.forecast.words;
        match self.outlook.see(status.at, status.forecast.full_in_seconds) {
            None => {}
            Some((Outlook::FullWithinADay, true)) => tracing::error!(forecast, "the disk is full within a day"),
            Some((Outlook::FullWithinAWeek, true)) => tracing::warn!(forecast, "the disk is full within a week"),
            Some((_, true)) => tracing::warn!(forecast, "the disk fills"),
            Some((Outlook::Sound, false)) => tracing::info!(forecast, "the disk does not fill any more"),
            Some((_, false)) => tracing::info!(forecast, "the disk fills later than it did"),
        }
    }

    /// Bytes on the wire for a byte of a photo, measured where this process sent enough to tell.
    fn wire_factor(&mut self, uploaded_bytes: i64) -> f64 {
        const ENOUGH_BYTES: i64 = 20_000_000;
        let Some((pacer, _)) = &self.parts.drain else { return forecast::WIRE_FACTOR };
        let paid = pacer.paid_bytes();
        let (paid_before, uploaded_before) = *self.sent.get_or_insert((paid, uploaded_bytes));
        let uploaded = uploaded_bytes - uploaded_before;
        let factor = (paid - paid_before) as f64 / uploaded.max(1) as f64;
        // what another drain uploaded, or what is sent again and again, says nothing of the wire
        if uploaded >= ENOUGH_BYTES && (1.0..1.5).contains(&factor) { factor } else { forecast::WIRE_FACTOR }
    }

    fn forecast(&mut self, latest: &Books, usable_bytes: u64, condition: &Condition, draining: Flow) -> Forecast {
        let standing = self.parts.standing.borrow().clone();
        let outage = match condition {
            // an operator's pause may have an end that is known; this has none
            Condition::Paused { .. } => true,
            // the drain's own process knows what it may do; others see what it does
            Condition::Elsewhere => {
                let may_leave = standing.in_force.allowance.is_some();
                may_leave && latest.backlog().uploads > 8 && draining.uploads_per_second == 0.0
            }
            _ => false,
        };
        if let Some(last) = &self.forecasted
            && last.at.elapsed() < FORECAST_AGE_MAX
            && (&last.standing, last.outage) == (&standing, outage)
        {
            return last.forecast.clone();
        }
        let forecast = self.look_ahead(latest, usable_bytes, &standing, outage);
        // of a look or two at the books little is known
        self.forecasted = (self.samples.len() > 2).then(|| Forecasted {
            at: Instant::now(),
            standing,
            outage,
            forecast: forecast.clone(),
        });
        forecast
    }

    fn look_ahead(&mut self, latest: &Books, usable_bytes: u64, standing: &Standing, outage: bool) -> Forecast {
        let wire_factor = self.wire_factor(latest.uploaded.bytes);
        let Parts { uplink, retain, .. } = &self.parts;
        let Standing { in_force, control } = standing;
        let (now, backlog) = (UnixMs::now(), latest.backlog());
        let end = UnixMs(now.0 + forecast::HORIZON.as_millis() as i64);
        let may_leave = in_force.allowance.is_some();
        let allowed = match outage {
            true => vec![(now, end, None)],
            false => uplink.segments(now, end, control),
        };
        let before = UnixMs(now.0 - retain.as_millis() as i64);
        Forecast::of(&Site {
            now,
            zone: &uplink.zone,
            link: uplink.rate,
            arriving: self.arrivals.expected(&uplink.zone),
            allowed: &allowed,
            allowed_before: &uplink.segments(before, now, &Control::default()),
            wire_factor,
            backlog_bytes: backlog.bytes.max(0) as f64,
            usable_bytes: usable_bytes as f64,
            // what is dead stays on disk; what was uploaded goes
            retained_bytes: (latest.on_disk.bytes - backlog.bytes - latest.dead.bytes).max(0) as f64,
            retain: *retain,
            held: !may_leave && !outage,
        })
    }

    /// By the last look, or by the one before if the queue did not answer, for this reason.
    fn status(&mut self, unanswered: Option<Error>) -> Status {
        let Parts { roles, queue, spool, standing, drain, .. } = self.parts.clone();
        let latest = self.samples.back().map(|(_, books)| *books).unwrap_or_default();
        let (arriving, draining) = (self.flow(Books::accepted), self.flow(|books| books.uploaded));
        let Standing { in_force, control } = standing.borrow().clone();
        let allowance = in_force.allowance.unwrap_or(Rate(0));
        let backlog = latest.backlog();
        let of_drain = drain.as_ref().map_or(Condition::Elsewhere, |(_, condition)| condition.borrow().clone());
        let spool = spool_status(&spool, latest.on_disk.bytes.max(0) as u64, latest.accepted());
        let forecast = self.forecast(&latest, spool.usable_bytes, &of_drain, draining);
        let condition = match (of_drain, &control.pause) {
            (of_drain @ (Condition::Pouring | Condition::Idle | Condition::Paused { .. }), Some(pause))
                if in_force.allowance.is_none() =>
            {
                let outage = match of_drain {
                    Condition::Paused { reason, .. } => Some(reason),
                    _ => None,
                };
                Condition::Held { who: pause.who.clone(), since: pause.since, until: pause.until, outage }
            }
            (of_drain, _) => of_drain,
        };
        let now = UnixMs::now();
        Status {
            at: now,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            roles: roles.iter().map(|role| role.to_string()).collect(),
            queue: QueueStatus {
                kind: queue.kind().to_owned(),
                reachable: unanswered.is_none(),
                reason: unanswered.map(|error| error.to_string()),
            },
            arriving,
            draining,
            drain: DrainStatus {
                condition,
                allowance_bytes_per_second: allowance.0,
                allowance_rule: in_force.rule.to_string(),
                allowance_until: in_force.until,
                sent_bytes: drain.as_ref().map_or(0, |(pacer, _)| pacer.sent_bytes()),
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
            forecast,
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

fn spool_status(spool: &Spool, held_bytes: u64, accepted: Tally) -> SpoolStatus {
    let refusing = spool.refusing().err().map(|error| error.to_string());
    match spool.space() {
        Ok(space) => {
            // of photos such as all that have come so far
            let mean_bytes = (accepted.bytes.max(0) as u64).checked_div(accepted.uploads.max(0) as u64);
            let by_inodes = mean_bytes.and_then(|mean| space.usable_by_inodes(mean.max(1)));
            SpoolStatus {
                held_bytes,
                total_bytes: space.total_bytes,
                free_bytes: space.free_bytes,
                usable_bytes: spool.usable_bytes(&space).min(by_inodes.unwrap_or(u64::MAX)),
                refusing,
            }
        }
        Err(error) => SpoolStatus {
            held_bytes,
            total_bytes: 0,
            free_bytes: 0,
            usable_bytes: 0,
            refusing: refusing.or(Some(error.to_string())),
        },
    }
}
