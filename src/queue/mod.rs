//! The queue: one record an upload, in SQLite or Postgres, with the same meaning in both. The only SQL.
//!
//! Always: every write after a claim is fenced by the attempt that made it; a lease is measured by the queue's own clock;
//! the books are kept in the transaction that changes the rows. Never: a transaction that stays open while something else
//! than SQL happens.
//!
//! `record.rs` is what is asked for and answered; `sqlite.rs` and `postgres.rs` hold what differs (opening, and whatever is
//! done to many at once); `statements.rs` what is one text for both; `claims.rs` says what leaves next, and `sheds.rs` what is
//! given up; `group_commit.rs` gathers waiting uploads into one transaction; `connections.rs` keeps connections between
//! statements. `tests/suite/queue.rs` is the conformance suite.

mod claims;
mod connections;
mod group_commit;
mod migrations;
mod postgres;
mod record;
mod sheds;
mod sqlite;
mod statements;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

pub use self::record::{Accepted, Books, Cursor, Filter, Lease, Line, Look, Pick, Record, Shed, Tally};
use crate::allowance::{Control, End};
use crate::config::QueueUrl;
use crate::error::{Error, Result};
use crate::shedding;
use crate::timetable::Amount;
use crate::units::UnixMs;
use crate::upload::{Priority, State, Upload, UploadId};

/// The most records of one page.
pub const PAGE_RECORDS_MAX: u32 = 500;

/// The longest that a claim may look at lines beyond the first: what it has leased already waits to be sent.
const SECOND_LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest that any call may take: as long as Postgres itself lets a statement run.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// No lease is given for so long: one that ends later than so much from now was given before the clock went back, and waiting
/// for its end could take years.
const LEASE_MAX: Duration = Duration::from_secs(900);

/// The most uploads of one line that are looked at to thin it.
const THINNED_MAX: u32 = 50_000;

/// The queue of one site. Cheap to clone.
#[derive(Clone)]
pub struct Queue {
    backend: Backend,
    accepting: group_commit::Accepting,
    arrivals: Arc<Notify>,
}

#[derive(Clone)]
enum Backend {
    Postgres(postgres::Postgres),
    Sqlite(sqlite::Sqlite),
}

/// Calls the same method on whichever backend there is.
macro_rules! on_backend {
    ($self:ident, $queue:ident => $call:expr) => {
        in_time(async {
            match &$self.backend {
                Backend::Postgres($queue) => $call.await,
                Backend::Sqlite($queue) => $call.await,
            }
        })
        .await
    };
}

/// A connection that died without a word would otherwise be waited for until the kernel gives it up.
async fn in_time<T>(call: impl Future<Output = sqlx::Result<T>>) -> Result<T> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(done) => done.map_err(unavailable),
        Err(_) => Err(Error::Unavailable(format!("the queue did not answer within {} s", CALL_TIMEOUT.as_secs()))),
    }
}

impl Queue {
    /// Opens the queue without waiting for it: a Postgres that is away is found out by the first call. Must be called in a
    /// tokio runtime.
    pub fn open(url: &QueueUrl) -> Result<Queue> {
        let backend = match url {
            QueueUrl::Sqlite(path) => Backend::Sqlite(sqlite::Sqlite::open(path)?),
            QueueUrl::Postgres(url) => Backend::Postgres(postgres::Postgres::open(url)?),
        };
        let arrivals = Arc::new(Notify::new());
        let accepting = group_commit::start(backend.clone(), arrivals.clone());
        Ok(Queue { backend, accepting, arrivals })
    }

    /// Opens a queue that should be there already: a SQLite file that is missing is an error, not made.
    pub fn open_existing(url: &QueueUrl) -> Result<Queue> {
        match url {
            QueueUrl::Sqlite(path) if !path.exists() => Err(Error::Missing(format!(
                "there is no queue at {}; set FOREBAY_DATA_DIR or FOREBAY_QUEUE_URL to where it is",
                path.display()
            ))),
            url => Queue::open(url),
        }
    }

    /// Which kind it is, for people.
    pub fn kind(&self) -> &'static str {
        match self.backend {
            Backend::Postgres(_) => "Postgres",
            Backend::Sqlite(_) => "SQLite",
        }
    }

    /// Brings the schema up to date; several processes may do so at once. Returns the schema's version.
    pub async fn migrate(&self) -> Result<i64> {
        match &self.backend {
            Backend::Postgres(queue) => queue.migrate().await,
            Backend::Sqlite(queue) => queue.migrate().await,
        }
        .map_err(|error| match error {
            sqlx::migrate::MigrateError::Execute(error) => unavailable(error),
            other => Error::unavailable("cannot migrate the queue's schema", other),
        })
    }

    /// Commits the record of an upload whose photo is durable, together with others that wait at this moment. The same id
    /// again changes nothing and gives back the record that is there.
    pub async fn accept(&self, upload: Arc<Upload>) -> Result<Accepted> {
        self.accepting.accept(upload).await
    }

    /// Whether the queue answers, without waiting for one that is known to be away.
    pub async fn check(&self) -> Result<()> {
        if self.accepting.is_away() {
            return Err(group_commit::gone());
        }
        match tokio::time::timeout(Duration::from_secs(2), self.books()).await {
            Ok(books) => books.map(drop),
            Err(_) => Err(Error::Unavailable("the queue did not answer within 2 s".to_owned())),
        }
    }

    /// Resolves when an upload was accepted by this very process since the last call. Others' are found by asking.
    pub async fn arrival(&self) {
        self.arrivals.notified().await;
    }

    /// One record.
    pub async fn get(&self, id: UploadId) -> Result<Option<Record>> {
        on_backend!(self, queue => queue.get(id))?.map(Record::try_from).transpose()
    }

    /// Up to `limit` records older than `after`, newest first.
    pub async fn list(&self, filter: &Filter, after: Cursor, limit: u32) -> Result<Vec<Record>> {
        records(on_backend!(self, queue => queue.list(filter, after, limit.min(PAGE_RECORDS_MAX)))?)
    }

    /// Takes or keeps the lead among drains for `lease` from now. False while another one has it.
    pub async fn lead(&self, owner: &str, lease: Duration) -> Result<bool> {
        on_backend!(self, queue => queue.lead(owner, lease))
    }

    /// Gives the lead up, so that another drain need not wait for its end.
    pub async fn resign(&self, owner: &str) -> Result<()> {
        on_backend!(self, queue => queue.resign(owner))
    }

    /// Leases up to `limit` of the uploads that should leave next.
    pub async fn claim(&self, owner: &str, limit: u32, lease: Duration, pick: Pick) -> Result<Vec<Lease>> {
        // as many lines as uploads are enough, as long as each has one that does not rest
        let lines = i64::from(limit);
        let mut claimed = records(on_backend!(self, queue => queue.claim(owner, limit, lease, pick, lines))?)?;
        let missing = limit.saturating_sub(claimed.len() as u32);
        // an empty queue is asked often, and has nobody to hide
        let anyone_waits =
            missing > 0 && pick.by_turn() && (!claimed.is_empty() || self.books().await?.queued.uploads > 0);
        if anyone_waits {
            // either few uploads wait, and then few lines do, or whole lines rest: nobody may be hidden behind them
            let more = tokio::time::timeout(SECOND_LOOK_TIMEOUT, async {
                on_backend!(self, queue => queue.claim(owner, missing, lease, pick, i64::MAX))
            });
            let late = || Error::Unavailable("the queue did not answer in time".to_owned());
            match more.await.unwrap_or_else(|_| Err(late())).and_then(records) {
                Ok(more) => claimed.extend(more),
                // what was leased above is leased
                Err(error) if claimed.is_empty() => return Err(error),
                Err(_) => {}
            }
        }
        let newest_first = matches!(pick, Pick::Newest | Pick::Fresh);
        claimed.sort_by_key(|r| {
            let received_at = r.upload.received_at.0;
            let place = if newest_first { -received_at } else { received_at };
            (std::cmp::Reverse(r.upload.priority), place, r.upload.id)
        });
        Ok(claimed.into_iter().map(|r| Lease { upload: r.upload, attempt: r.attempt, failures: r.failures }).collect())
    }

    /// The text of a claim, for whoever wants to ask the database how it goes about it.
    pub fn claim_statement(&self, pick: Pick) -> &'static str {
        match &self.backend {
            Backend::Postgres(queue) => queue.claim_statement(pick),
            Backend::Sqlite(queue) => queue.claim_statement(pick),
        }
    }

    /// Up to `limit` lines whose uploads all rested give up what they would be owed for it, and up to `limit` that are empty
    /// and say nothing any more are deleted; how many of both.
    pub async fn tend_lines(&self, limit: u32) -> Result<u64> {
        on_backend!(self, queue => queue.tend_lines(limit))
    }

    /// Gives up queued uploads, about `bytes` of them but `limit` at most: of the lowest class the oldest first. Their records
    /// stay as tombstones, and their photos are the caller's to remove. Nothing when nothing is queued.
    pub async fn shed_oldest(&self, bytes: u64, limit: u32) -> Result<Vec<Record>> {
        let (mut ids, mut enough) = (Vec::new(), 0);
        for priority in Priority::ALL {
            let class = statements::priority_number(*priority);
            let missing = limit.saturating_sub(ids.len() as u32);
            for (id, size) in on_backend!(self, queue => queue.oldest_of(class, missing))? {
                if enough < bytes {
                    ids.push(id);
                    enough += size.max(0) as u64;
                }
            }
            if enough >= bytes || ids.len() >= limit as usize {
                break;
            }
        }
        self.shed(&ids, "shed-oldest: the disk was full").await
    }

    /// Like [`Queue::shed_oldest`], but of the lowest class that has any the devices with the most queued uploads are thinned,
    /// evenly in time: no two neighbours go in one call, and those whose going leaves the smallest gap go first.
    pub async fn shed_thin(&self, bytes: u64, limit: u32) -> Result<Vec<Record>> {
        for priority in Priority::ALL {
            let class = statements::priority_number(*priority);
            let lines = on_backend!(self, queue => queue.longest_lines(class))?;
            let lengths: Vec<(u64, u64)> =
                lines.iter().map(|(_, uploads, bytes)| ((*uploads).max(0) as u64, (*bytes).max(0) as u64)).collect();
            let (mut ids, mut enough) = (Vec::new(), 0);
            for ((device_id, ..), many) in lines.iter().zip(shedding::share_out(&lengths, bytes)) {
                let many = many.min(u64::from(limit).saturating_sub(ids.len() as u64));
                if many == 0 || enough >= bytes {
                    continue;
                }
                let line = on_backend!(self, queue => queue.line(class, device_id, THINNED_MAX))?;
                let moments: Vec<i64> = line.iter().map(|(_, at, _)| *at).collect();
                for at in shedding::thin(&moments, many) {
                    ids.push(line[at].0);
                    enough += line[at].2.max(0) as u64;
                }
            }
            if !ids.is_empty() {
                return self.shed(&ids, "thin: the disk was full").await;
            }
        }
        Ok(Vec::new())
    }

    async fn shed(&self, ids: &[Uuid], reason: &str) -> Result<Vec<Record>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        records(on_backend!(self, queue => queue.shed(ids, reason))?)
    }

    /// Shed with their photo still on disk.
    pub async fn removable_shed(&self, limit: u32) -> Result<Vec<Record>> {
        records(on_backend!(self, queue => queue.removable_shed(limit))?)
    }

    /// Bytes of photos that were shed and are still on disk.
    pub async fn shed_on_disk_bytes(&self) -> Result<u64> {
        Ok(on_backend!(self, queue => queue.shed_on_disk_bytes())?.max(0) as u64)
    }

    /// Deletes up to `limit` tombstones whose photos were removed at least `retain` ago; how many. The books and
    /// [`Queue::sheds`] keep counting them.
    pub async fn purge_shed(&self, retain: Duration, limit: u32) -> Result<u64> {
        on_backend!(self, queue => queue.purge_shed(retain, limit))
    }

    /// How many devices lost uploads to shedding, and the `limit` that lost most.
    pub async fn sheds(&self, limit: u32) -> Result<(i64, Vec<Shed>)> {
        let (devices, most) = on_backend!(self, queue => queue.sheds(limit))?;
        let shed = |(device_id, uploads, bytes, first, last): (String, i64, i64, i64, i64)| {
            let device_id = device_id.parse().map_err(Error::Damaged)?;
            Ok(Shed { device_id, lost: Tally { uploads, bytes }, first_at: UnixMs(first), last_at: UnixMs(last) })
        };
        Ok((devices, most.into_iter().map(shed).collect::<Result<_>>()?))
    }

    /// Every line that is not empty, by device.
    pub async fn lines(&self) -> Result<Vec<Line>> {
        lines(on_backend!(self, queue => queue.lines())?)
    }

    /// The lines counted anew from the records, to be held against [`Queue::lines`]. Reads every queued record.
    pub async fn count_lines(&self) -> Result<Vec<Line>> {
        lines(on_backend!(self, queue => queue.count_lines())?)
    }

    /// Leases the upload that should leave last of all, to probe with: those that should leave first may be the very ones
    /// that never pass.
    pub async fn claim_probe(&self, owner: &str, lease: Duration) -> Result<Vec<Lease>> {
        let records = records(on_backend!(self, queue => queue.claim_probe(owner, lease))?)?;
        Ok(records.into_iter().map(|r| Lease { upload: r.upload, attempt: r.attempt, failures: r.failures }).collect())
    }

    /// Queues an upload again that was set aside as dead, with nothing charged to it. False when it is not dead, or when its
    /// record is of other bytes.
    pub async fn revive(&self, upload: &Upload) -> Result<bool> {
        on_backend!(self, queue => queue.revive(upload))
    }

    /// Puts the end of a lease off to `lease` from now. False when it was lost meanwhile.
    pub async fn renew(&self, held: &Lease, lease: Duration) -> Result<bool> {
        on_backend!(self, queue => queue.renew(held, lease))
    }

    /// Records that S3 has the photo and confirmed its digest. False when a later attempt holds the lease; then that one
    /// will find the object there.
    pub async fn finish(&self, held: &Lease) -> Result<bool> {
        self.finish_all(&[held]).await.pop().unwrap_or(Ok(false))
    }

    /// [`Queue::finish`] of several in one commit; what it says of each, in their order.
    pub async fn finish_all(&self, held: &[&Lease]) -> Vec<Result<bool>> {
        let finished = match on_backend!(self, queue => queue.finish(held)) {
            Ok(finished) => finished,
            Err(error) => return vec![Err(error); held.len()],
        };
        let mut each = Vec::with_capacity(held.len());
        for lease in held {
            each.push(match finished.contains(&(lease.upload.id.0, lease.attempt)) {
                true => Ok(true),
                false => self.has_finished(lease).await,
            });
        }
        each
    }

    /// The reply to an earlier commit may have been lost.
    async fn has_finished(&self, held: &Lease) -> Result<bool> {
        let record = self.get(held.upload.id).await?;
        Ok(record.is_some_and(|r| r.state == State::Uploaded && r.attempt == held.attempt))
    }

    /// Gives a lease back; the upload is queued again, rests for `rest`, and nothing is charged to it.
    pub async fn release(&self, held: &Lease, rest: Duration) -> Result<bool> {
        on_backend!(self, queue => queue.release(held, rest))
    }

    /// Charges a failure to the upload itself: it rests for `rest`, or is set aside as dead when there is none.
    pub async fn charge(&self, held: &Lease, reason: &str, rest: Option<Duration>) -> Result<bool> {
        // reasons come from outside; Postgres takes no NUL in text
        let reason: String = reason.chars().filter(|c| *c != '\0').take(500).collect();
        on_backend!(self, queue => queue.charge(held, &reason, rest))
    }

    /// Queues uploads again whose lease ran out, or was given before the clock went back; how many.
    pub async fn reap(&self) -> Result<u64> {
        on_backend!(self, queue => queue.reap(LEASE_MAX))
    }

    /// Uploaded at least `retain` ago with their photo still on disk, oldest first.
    pub async fn removable(&self, retain: Duration, limit: u32) -> Result<Vec<Record>> {
        records(on_backend!(self, queue => queue.removable(retain, limit))?)
    }

    /// Records that these photos are no longer on disk.
    pub async fn removed(&self, ids: &[UploadId]) -> Result<()> {
        on_backend!(self, queue => queue.removed(ids))
    }

    /// Deletes up to `limit` records of photos that were uploaded and removed at least `retain` ago; how many.
    pub async fn purge(&self, retain: Duration, limit: u32) -> Result<u64> {
        on_backend!(self, queue => queue.purge(retain, limit))
    }

    /// How the site stands, in one round trip.
    pub async fn look(&self) -> Result<Look> {
        let at = Instant::now();
        Ok(statements::look(at, on_backend!(self, queue => queue.look())?))
    }

    /// What operators said that is not over yet.
    pub async fn control(&self) -> Result<Control> {
        self.look().await?.control
    }

    /// Sets a rate in place of the configured one, and of one that was set before.
    pub async fn set_rate(&self, amount: Amount, who: &str, end: End) -> Result<()> {
        on_backend!(self, queue => queue.set_control("rate", Some(amount.exact()), who, end))
    }

    /// The configured rate holds again.
    pub async fn clear_rate(&self) -> Result<()> {
        on_backend!(self, queue => queue.clear_control("rate"))
    }

    /// Nothing may leave from now on.
    pub async fn set_pause(&self, who: &str, end: End) -> Result<()> {
        on_backend!(self, queue => queue.set_control("pause", None, who, end))
    }

    /// What waits may leave again.
    pub async fn clear_pause(&self) -> Result<()> {
        on_backend!(self, queue => queue.clear_control("pause"))
    }

    /// How many uploads stand where, at one moment.
    pub async fn books(&self) -> Result<Books> {
        self.look().await?.books
    }

    /// The books counted anew from the records themselves, to be held against [`Queue::books`]. Reads every record.
    pub async fn count(&self) -> Result<Books> {
        let rows = on_backend!(self, queue => queue.count())?;
        let mut books = Books::default();
        for (state, on_disk, uploads, bytes) in rows {
            books.add(state.parse().map_err(Error::Damaged)?, on_disk, Tally { uploads, bytes });
        }
        Ok(books)
    }

    /// Waits for what was handed to it and closes its connections.
    pub async fn close(&self) {
        match &self.backend {
            Backend::Postgres(queue) => queue.close().await,
            Backend::Sqlite(queue) => queue.close().await,
        }
    }
}

fn lines(rows: Vec<(String, i16, i64, i64)>) -> Result<Vec<Line>> {
    let line = |(device_id, priority, uploads, bytes): (String, i16, i64, i64)| {
        let device_id = device_id.parse().map_err(Error::Damaged)?;
        Ok(Line { device_id, priority: statements::priority_of(priority), queued: Tally { uploads, bytes } })
    };
    rows.into_iter().map(line).collect()
}

fn records(rows: Vec<statements::Row>) -> Result<Vec<Record>> {
    rows.into_iter().map(Record::try_from).collect()
}

/// Whatever the database says, it is the environment's fault: the statements are ours and their values were checked.
fn unavailable(error: sqlx::Error) -> Error {
    Error::unavailable("the queue does not answer", error)
}
