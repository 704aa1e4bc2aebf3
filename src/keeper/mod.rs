//! House-keeping: leases that ran out, photos whose time is over, the journal, orphans, what dead writers left.
//!
//! Always: a photo is removed before its record says so, and its record is purged only after that; each task goes on when
//! another fails; what is shed is counted and logged. Never: a photo removed before S3 confirmed it and its retention is
//! over, unless its record says that it was shed.

mod orphans;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use self::orphans::{Adoption, adopt, take_in};
use crate::config::{Config, SpoolLimits};
use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::outage::{Outage, Over};
use crate::queue::{Queue, Record, Tally};
use crate::shedding::{Marks, WhenFull};
use crate::spool::Spool;
use crate::status::Condition;
use crate::upload::Upload;

/// Photos removed in one go.
const REMOVE_AT_ONCE: u32 = 200;
/// Photos that cannot be removed, beside which others are still looked for.
const STUCK_MAX: u32 = 1_000;
/// More than a few bad blocks would keep.
const STUCK_FEW: u32 = 10;
/// Records purged in one transaction.
const PURGE_AT_ONCE: u32 = 1000;
/// Lines tended in one transaction.
const TEND_AT_ONCE: u32 = 1000;
/// Journaled photos taken in in one go.
const JOURNAL_AT_ONCE: usize = 500;
/// Of those, as many as are handed to the queue together.
const TAKE_IN_TOGETHER: usize = 50;
/// A photo on disk for this long without a record has nobody who is about to make one.
const ORPHAN_AGE_MIN: Duration = Duration::from_secs(60);
/// How often such photos are looked for, after the second look.
const ADOPT_EVERY: Duration = Duration::from_secs(3600);
/// When a look that failed is tried again; it doubles with each, up to [`ADOPT_EVERY`].
const ADOPT_AGAIN: Duration = Duration::from_secs(60);
/// A file that has been unfinished for this long has no writer any more.
const UNFINISHED_MAX: Duration = Duration::from_secs(3600);

/// The house-keeping of one process. Any number may run.
#[derive(Clone)]
pub struct Keeper {
    spool: Spool,
    queue: Queue,
    retain: Duration,
    record_retain: Duration,
    when_full: WhenFull,
    limits: SpoolLimits,
    /// What this process's drain does; only where the drain leads is anything shed.
    drain: Option<watch::Receiver<Condition>>,
    looked: Arc<Mutex<Looked>>,
}

/// How far photos were looked at for orphans.
#[derive(Clone, Copy)]
struct Looked {
    /// Those from before this moment were.
    until: SystemTime,
    /// When the next look is due.
    due: Instant,
    /// How many have failed since the last that did not.
    failures: u32,
}

/// Which photos may go.
#[derive(Clone, Copy)]
enum Removable {
    /// Uploaded, and retained for as long as was asked for.
    Uploaded,
    Shed,
}

/// Photos that are over and cannot be taken off the disk.
#[derive(Default)]
struct Stuck {
    photos: u32,
    bytes: u64,
    /// Why the first cannot.
    failed: Option<Error>,
}

impl Stuck {
    fn add(&mut self, bytes: u64, error: Error) {
        self.photos += 1;
        self.bytes += bytes;
        self.failed.get_or_insert(error);
    }
}

impl Keeper {
    pub fn new(config: &Config, spool: Spool, queue: Queue) -> Self {
        Keeper {
            spool,
            queue,
            retain: config.retain,
            record_retain: config.record_retain,
            when_full: config.when_full,
            limits: config.spool,
            drain: None,
            looked: Arc::new(Mutex::new(Looked { until: SystemTime::UNIX_EPOCH, due: Instant::now(), failures: 0 })),
        }
    }

    /// Beside a drain, which does `condition`: when the disk is full and the drain leads, what the settings say is shed.
    pub fn beside(self, condition: watch::Receiver<Condition>) -> Self {
        Keeper { drain: Some(condition), ..self }
    }

    /// Keeps house until `stop` is cancelled.
    pub async fn run(&self, stop: CancellationToken) {
        let seconds = Duration::from_secs;
        tokio::join!(
            every(seconds(5), &stop, "queue leases again that ran out", || self.reap()),
            every(seconds(5), &stop, "tend the devices' lines", || self.tend_lines()),
            every(seconds(2), &stop, "remove uploaded photos", || self.clean()),
            // a shedding removes its photos itself; this finds those of one that was cut short where none sheds now
            every(seconds(5), &stop, "remove shed photos", || self.clean_shed()),
            every(seconds(1), &stop, "make room on the full disk", || self.make_room()),
            every(seconds(2), &stop, "take the journal into the queue", || self.take_in_journal()),
            every(seconds(1), &stop, "tend the ballast", || self.tend_ballast()),
            every(seconds(60), &stop, "purge old records", || self.purge()),
            // most ticks find that no look is due
            every(seconds(10), &stop, "look for photos that the queue does not know", || self.adopt()),
            every(seconds(600), &stop, "sweep unfinished files", || self.sweep()),
        );
    }

    async fn reap(&self) -> Result<()> {
        match self.queue.reap().await? {
            0 => {}
            leases => tracing::warn!(leases, "leases ran out; their uploads are queued again"),
        }
        Ok(())
    }

    async fn tend_lines(&self) -> Result<()> {
        self.queue.tend_lines(TEND_AT_ONCE).await.map(drop)
    }

    async fn clean(&self) -> Result<()> {
        self.remove_all(Removable::Uploaded).await
    }

    async fn clean_shed(&self) -> Result<()> {
        self.remove_all(Removable::Shed).await
    }

    /// Takes all photos off the disk that are over, some at a time, oldest first. Those that cannot be removed do not keep the others
    /// there; the error is that of the first.
    async fn remove_all(&self, which: Removable) -> Result<()> {
        let mut stuck = Stuck::default();
        loop {
            let limit = REMOVE_AT_ONCE + 2 * stuck.photos;
            let records = match which {
                Removable::Uploaded => self.queue.removable(self.retain, limit).await?,
                Removable::Shed => self.queue.removable_shed(limit).await?,
            };
            stuck = self.remove(&records).await?;
            if records.len() < limit as usize || stuck.photos >= STUCK_MAX {
                return stuck.failed.map_or(Ok(()), Err);
            }
        }
    }

    /// Takes photos off the disk, and says so in their records; those that cannot be removed.
    async fn remove(&self, records: &[Record]) -> Result<Stuck> {
        if records.is_empty() {
            return Ok(Stuck::default());
        }
        let cut_short = |e| Error::unavailable("cannot remove a photo", e);
        let uploads: Vec<Arc<Upload>> = records.iter().map(|record| record.upload.clone()).collect();
        let spool = self.spool.clone();
        // all in one step: a thread that is called for each would cost more than the removal
        let removal = tokio::task::spawn_blocking(move || {
            let remove = |upload: &Upload| {
                crash_points::pass_blocking(Point::KeeperRemove).map_err(cut_short)?;
                spool.remove_now(upload)?;
                crash_points::pass_blocking(Point::KeeperRemoved).map_err(cut_short)
            };
            let (mut removed, mut stuck) = (Vec::with_capacity(uploads.len()), Stuck::default());
            for upload in uploads {
                match remove(&upload) {
                    Ok(()) => removed.push(upload.id),
                    Err(error) => stuck.add(upload.size_bytes, error),
                }
            }
            (removed, stuck)
        });
        let (removed, stuck) = removal.await.map_err(|e| Error::unavailable("the removal of photos ended early", e))?;
        if !removed.is_empty() {
            self.queue.removed(&removed).await?;
            crash_points::pass(Point::KeeperTold).await.map_err(cut_short)?;
        }
        Ok(stuck)
    }

    /// Sheds queued uploads when the room for new ones falls below the low mark, until it will reach the high one.
    async fn make_room(&self) -> Result<()> {
        let leads = self.drain.as_ref().is_some_and(|condition| condition.borrow().leads());
        if self.when_full == WhenFull::Refuse || !leads {
            return Ok(());
        }
        // in this order, so that what is removed meanwhile is counted twice as room rather than not at all: what is shed too
        // little now is shed in a second
        let still_there = self.queue.shed_on_disk_bytes().await?;
        let on_disk = self.queue.books().await?.on_disk.bytes.max(0) as u64;
        self.spool.set_held_bytes(on_disk);
        let space = self.spool.space()?;
        let room = self.spool.usable_bytes(&space) + still_there;
        let capacity = space.total_bytes.saturating_sub(space.reserve_bytes);
        let capacity = self.limits.max.map_or(capacity, |max| max.0.min(capacity));
        let mut left = Marks::of(capacity).to_shed(room);
        // photos that are not there, as their disk is not mounted, make no room
        if left > 0 && self.spool.holds_nothing().await {
            return Ok(());
        }
        // what is in the bucket is given up before what is nowhere else, whatever its retention, and though it were to go in a moment
        let (mut stuck, mut removed_bytes) = (Stuck::default(), 0);
        while left > 0 && stuck.photos < STUCK_MAX {
            let limit = REMOVE_AT_ONCE + 2 * stuck.photos;
            let retained = self.queue.removable(Duration::ZERO, limit).await?;
            stuck = self.remove(&retained).await?;
            let bytes = retained.iter().map(|record| record.upload.size_bytes).sum::<u64>() - stuck.bytes;
            tracing::debug!(uploads = retained.len(), bytes, "the disk is full: uploaded photos go before their time");
            left = left.saturating_sub(bytes);
            removed_bytes += bytes;
            if retained.len() < limit as usize {
                break;
            }
        }
        // a disk that lets go of nothing gets no room by what is shed, and behind those that are stuck there may be others
        if stuck.photos >= STUCK_MAX || (stuck.photos >= STUCK_FEW && removed_bytes == 0) {
            return stuck.failed.map_or(Ok(()), Err);
        }
        let (mut lost, mut devices, mut failed) = (Tally::default(), BTreeSet::new(), stuck.failed);
        while left > 0 {
            let shed = match self.when_full {
                WhenFull::Refuse => return Ok(()),
                WhenFull::ShedOldest => self.queue.shed_oldest(left, REMOVE_AT_ONCE).await,
                WhenFull::Thin => self.queue.shed_thin(left, REMOVE_AT_ONCE).await,
            };
            let shed = match shed {
                Ok(shed) => shed,
                Err(error) => {
                    // what was shed before is told of and removed all the same
                    failed = Some(error);
                    break;
                }
            };
            let bytes: u64 = shed.iter().map(|record| record.upload.size_bytes).sum();
            if bytes == 0 {
                break; // nothing waits that could be shed
            }
            left = left.saturating_sub(bytes);
            lost = lost + Tally { uploads: shed.len() as i64, bytes: bytes as i64 };
            devices.extend(shed.into_iter().map(|record| record.upload.device_id.clone()));
        }
        if lost.uploads > 0 {
            let (policy, uploads, bytes, devices) = (self.when_full, lost.uploads, lost.bytes, devices.len());
            tracing::warn!(%policy, uploads, bytes, devices, "the disk is full: queued photos were given up");
        }
        if lost.uploads > 0 || still_there > 0 {
            self.clean_shed().await?;
        }
        failed.map_or(Ok(()), Err)
    }

    /// What was acknowledged while the queue was away goes into it, each upload once.
    async fn take_in_journal(&self) -> Result<()> {
        let uploads = self.spool.journaled(JOURNAL_AT_ONCE).await?;
        let (mut taken, mut failed) = (0, None);
        // together, so that they share commits
        for uploads in uploads.chunks(TAKE_IN_TOGETHER) {
            for done in join_all(uploads.iter().map(|upload| self.take_in_journaled(upload.clone()))).await {
                match done {
                    Ok(()) => taken += 1,
                    // one that is refused must not hold up the others
                    Err(error) => failed = Some(error),
                }
            }
        }
        if taken > 0 {
            tracing::info!(uploads = taken, "the queue took in what was journaled while it was away");
        }
        failed.map_or(Ok(()), Err)
    }

    async fn take_in_journaled(&self, upload: Upload) -> Result<()> {
        // sent again while the queue could not say that it was dead; before the mark is taken off
        if self.queue.revive(&upload).await? {
            tracing::info!(upload = %upload.id, "sent again, it is queued again");
        }
        take_in(&self.spool, &self.queue, Arc::new(upload)).await.map(drop)
    }

    /// A process that died between the disk and the queue left a photo that nobody was told of; it is sent all the same. The
    /// first look is at everything, later ones at what came since.
    async fn adopt(&self) -> Result<()> {
        let (now, looked) = (Instant::now(), *self.looked());
        if now < looked.due {
            return Ok(());
        }
        let until = SystemTime::now() - ORPHAN_AGE_MIN;
        let look = adopt(&self.spool, &self.queue, Some((looked.until, until)), |_| {}).await;
        *self.looked() = match &look {
            // the first is too early for what was written right before the start
            Ok(_) if looked.until == SystemTime::UNIX_EPOCH => Looked { until, due: now + ORPHAN_AGE_MIN, failures: 0 },
            Ok(_) => Looked { until, due: now + ADOPT_EVERY, failures: 0 },
            Err(_) => {
                let again = ADOPT_AGAIN.saturating_mul(1 << looked.failures.min(10)).min(ADOPT_EVERY);
                Looked { due: now + again, failures: looked.failures + 1, ..looked }
            }
        };
        let Adoption { adopted, damaged, .. } = look?;
        if adopted > 0 || damaged > 0 {
            tracing::warn!(adopted, damaged, "photos were on disk that the queue did not know");
        }
        Ok(())
    }

    fn looked(&self) -> MutexGuard<'_, Looked> {
        self.looked.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    async fn tend_ballast(&self) -> Result<()> {
        let spool = self.spool.clone();
        tokio::task::spawn_blocking(move || spool.tend_ballast()).await.unwrap_or(Ok(()))
    }

    async fn purge(&self) -> Result<()> {
        while self.queue.purge(self.record_retain, PURGE_AT_ONCE).await? == u64::from(PURGE_AT_ONCE) {}
        while self.queue.purge_shed(self.record_retain, PURGE_AT_ONCE).await? == u64::from(PURGE_AT_ONCE) {}
        Ok(())
    }

    async fn sweep(&self) -> Result<()> {
        let spool = self.spool.clone();
        let swept = tokio::task::spawn_blocking(move || spool.sweep_incoming(UNFINISHED_MAX)).await;
        if let Ok(swept @ 1..) = swept.unwrap_or(Ok(0)) {
            tracing::info!(files = swept, "removed unfinished files of writers that died");
        }
        Ok(())
    }
}

/// Does `task` again and again. A row of failures is logged when it begins and when it is over.
async fn every<F: Future<Output = Result<()>>>(
    period: Duration,
    stop: &CancellationToken,
    doing: &'static str,
    mut task: impl FnMut() -> F,
) {
    let outage = Outage::new();
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let done = tokio::select! {
            done = task() => done,
            // every task may be cut short and begun again
            () = stop.cancelled() => return,
        };
        match done {
            Ok(()) => {
                if let Some(Over { failures, .. }) = outage.works() {
                    tracing::info!(doing, failures, "works again");
                }
            }
            Err(error) if outage.failed() => tracing::warn!(doing, %error, "failed; trying again"),
            Err(_) => {}
        }
    }
}
