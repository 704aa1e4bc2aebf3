//! Many waiting uploads, one commit.
//!
//! While one transaction is being synced, the uploads that arrive wait together and go into the next one, and while one follows
//! another each waits a few milliseconds for company: under load one sync acknowledges many, and at a site's usual pace none waits.
//! Whoever has many uploads hands them over together; one after another they would go in at a commit each 8 ms.
//!
//! A queue that did not answer is *away*: uploads are told so at once instead of waiting in vain, each for itself, until a
//! probe finds it back.
//!
//! Always: each upload is answered by the commit that held it. Never: an upload's failure reaches the others of its batch.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use sqlx::error::ErrorKind;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use super::{Accepted, Backend, Record, unavailable};
use crate::error::{Error, Result};
use crate::upload::{Upload, UploadId};

/// While commits follow one another, one waits so long from when the last began, or until so many uploads have come: several
/// replicas would otherwise commit one photo each, and a commit costs more than a row in it.
const APART: Duration = Duration::from_millis(8);
const ENOUGH_UPLOADS: usize = 8;
/// So many commits may follow one another at once before any waits. A site at its usual pace never comes to it.
const AT_ONCE: u32 = 10;
/// Uploads in one transaction at most.
const BATCH_UPLOADS_MAX: usize = 256;
/// Uploads that may wait for a commit at most; beyond that the queue is as good as away.
const WAITING_UPLOADS_MAX: usize = 4096;
/// The longest that one transaction may take, and the longest an upload waits for its own.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(2);
const WAIT_TIMEOUT: Duration = Duration::from_secs(8);
/// How often a queue that is away is asked whether it is back.
const PROBE_EVERY: Duration = Duration::from_millis(500);

#[derive(Clone)]
pub(super) struct Accepting {
    waiting: mpsc::Sender<Waiting>,
    away: Arc<AtomicBool>,
}

struct Waiting {
    upload: Arc<Upload>,
    answer: oneshot::Sender<Result<Accepted>>,
}

impl Accepting {
    /// True from a commit that failed until the queue answers again.
    pub(super) fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    pub(super) async fn accept(&self, upload: Arc<Upload>) -> Result<Accepted> {
        if self.is_away() {
            return Err(gone());
        }
        let (answer, answered) = oneshot::channel();
        self.waiting
            .try_send(Waiting { upload, answer })
            .map_err(|_| Error::Unavailable("too many uploads wait for the queue".to_owned()))?;
        match tokio::time::timeout(WAIT_TIMEOUT, answered).await {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(_)) => Err(Error::Unavailable("the queue was closed".to_owned())),
            Err(_) => Err(Error::Unavailable(format!("the queue did not commit within {} s", WAIT_TIMEOUT.as_secs()))),
        }
    }
}

/// Waits until `due` for more to commit together, or until there is enough.
async fn company<T>(receiver: &mut mpsc::Receiver<T>, batch: &mut Vec<T>, due: Instant) {
    while batch.len() < ENOUGH_UPLOADS {
        let more = receiver.recv_many(batch, BATCH_UPLOADS_MAX - batch.len());
        match tokio::time::timeout_at(due, more).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
}

/// When the next commit need not wait any more for company.
struct Pace {
    due: Instant,
}

impl Pace {
    fn new(now: Instant) -> Pace {
        Pace { due: now }
    }

    /// One begins. What was not used of the pace is saved up to [`AT_ONCE`] commits, and what was used beyond it, because enough
    /// had come, is nobody's debt.
    fn begins(&mut self, now: Instant) {
        let saved = now.checked_sub((AT_ONCE - 1) * APART).unwrap_or(now);
        self.due = (self.due.max(saved) + APART).min(now + APART);
    }
}

/// Starts the task that commits. It ends when the last [`Accepting`] is dropped.
pub(super) fn start(backend: Backend, arrivals: Arc<Notify>) -> Accepting {
    let (waiting, mut receiver) = mpsc::channel::<Waiting>(WAITING_UPLOADS_MAX);
    let accepting = Accepting { waiting, away: Arc::default() };
    let away = accepting.away.clone();
    tokio::spawn(async move {
        let mut batch = Vec::new();
        let mut pace = Pace::new(Instant::now());
        while receiver.recv_many(&mut batch, BATCH_UPLOADS_MAX).await > 0 {
            company(&mut receiver, &mut batch, pace.due).await;
            pace.begins(Instant::now());
            commit(&backend, &away, &arrivals, &mut batch).await;
        }
    });
    accepting
}

/// Commits all in one transaction, or each in its own if one of them is to blame that they are refused together; and answers them.
async fn commit(backend: &Backend, away: &Arc<AtomicBool>, arrivals: &Notify, batch: &mut Vec<Waiting>) {
    let inserted = async |uploads: &[Arc<Upload>]| {
        // the first that finds the queue away is the last that waits for it in vain
        if away.load(Ordering::Relaxed) {
            return Err(Failed::Away(gone()));
        }
        let inserted = insert(backend, uploads).await;
        if let Err(Failed::Away(error)) = &inserted {
            away.store(true, Ordering::Relaxed);
            tracing::warn!(%error, "the queue is away; what is accepted waits in the spool's journal");
            tokio::spawn(probe(backend.clone(), away.clone()));
        }
        inserted
    };
    let uploads: Vec<Arc<Upload>> = batch.iter().map(|w| w.upload.clone()).collect();
    let mut together = inserted(&uploads).await;
    if matches!(together, Err(Failed::Refused(_))) && batch.len() > 1 {
        for waiting in batch.drain(..) {
            let alone = inserted(std::slice::from_ref(&waiting.upload)).await;
            let new = alone.map(|ids| !ids.is_empty()).map_err(Failed::into_error);
            if matches!(new, Ok(true)) {
                arrivals.notify_one();
            }
            // the others do not wait until the record of one that is not new has been read
            tokio::spawn(answer(backend.clone(), waiting, new));
        }
        return;
    }
    let answers = batch.drain(..).map(|waiting| {
        // of the same upload twice in one batch, one is new
        let new = match &mut together {
            Ok(ids) => Ok(ids.remove(&waiting.upload.id)),
            Err(failed) => Err(failed.clone().into_error()),
        };
        answer(backend.clone(), waiting, new)
    });
    // together: who is new hears of it at once, and who is not does not wait for the others' records
    let answers: Vec<_> = answers.collect();
    arrivals.notify_one();
    join_all(answers).await;
}

async fn answer(backend: Backend, Waiting { upload, answer }: Waiting, new: Result<bool>) {
    drop(answer.send(accepted(&backend, upload, new).await));
}

/// What those are told that find the queue away.
pub(super) fn gone() -> Error {
    Error::Unavailable("the queue is away".to_owned())
}

/// Why a batch was not inserted.
#[derive(Clone)]
enum Failed {
    /// The database did not answer, or cannot work.
    Away(Error),
    /// It answered that it does not take these rows.
    Refused(Error),
}

impl Failed {
    fn into_error(self) -> Error {
        match self {
            Failed::Away(error) | Failed::Refused(error) => error,
        }
    }
}

/// Asks until the queue is back.
async fn probe(backend: Backend, away: Arc<AtomicBool>) {
    loop {
        tokio::time::sleep(PROBE_EVERY).await;
        let asked = async {
            match &backend {
                Backend::Postgres(queue) => queue.insert(&[]).await,
                Backend::Sqlite(queue) => queue.insert(&[]).await,
            }
        };
        match tokio::time::timeout(COMMIT_TIMEOUT, asked).await {
            Ok(Ok(_)) => break,
            Ok(Err(sqlx::Error::PoolClosed)) => return,
            _ => {}
        }
    }
    away.store(false, Ordering::Relaxed);
    tracing::info!("the queue is back");
}

/// Tries once more when the connection broke: the reply to a commit that was made may have been lost, and the second time
/// the record is simply there.
async fn insert(backend: &Backend, uploads: &[Arc<Upload>]) -> std::result::Result<HashSet<UploadId>, Failed> {
    let once = async || match backend {
        Backend::Postgres(queue) => queue.insert(uploads).await,
        Backend::Sqlite(queue) => queue.insert(uploads).await,
    };
    let inserted = tokio::time::timeout(COMMIT_TIMEOUT, async {
        match once().await {
            Err(sqlx::Error::Io(_) | sqlx::Error::Protocol(_)) => once().await,
            done => done,
        }
    });
    match inserted.await {
        Ok(Ok(ids)) => Ok(ids.into_iter().collect()),
        // integrity and data errors blame the rows; all others (read-only, shutting down, no room) the database
        Ok(Err(sqlx::Error::Database(error)))
            if error.kind() != ErrorKind::Other || error.code().is_some_and(|code| code.starts_with("22")) =>
        {
            Err(Failed::Refused(unavailable(sqlx::Error::Database(error))))
        }
        Ok(Err(error)) => Err(Failed::Away(unavailable(error))),
        Err(_) => Err(Failed::Away(Error::Unavailable(format!(
            "the queue did not commit within {} s",
            COMMIT_TIMEOUT.as_secs()
        )))),
    }
}

async fn accepted(backend: &Backend, upload: Arc<Upload>, new: Result<bool>) -> Result<Accepted> {
    if new? {
        return Ok(Accepted { record: Record::queued(upload), new: true });
    }
    let held = async {
        match backend {
            Backend::Postgres(queue) => queue.get(upload.id).await,
            Backend::Sqlite(queue) => queue.get(upload.id).await,
        }
    };
    // all who wait for a commit wait for this
    let held = tokio::time::timeout(COMMIT_TIMEOUT, held)
        .await
        .map_err(|_| Error::Unavailable(format!("the queue did not answer within {} s", COMMIT_TIMEOUT.as_secs())))?;
    match held.map_err(unavailable)? {
        Some(row) => Ok(Accepted { record: Record::try_from(row)?, new: false }),
        None => Err(Error::Unavailable("the record was purged in this very moment; try again".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long each of these commits waits, in milliseconds, when so many pass before each.
    fn waits_ms(paused_ms: &[u64]) -> Vec<u128> {
        let (mut pace, mut now) = (Pace::new(Instant::now()), Instant::now() + Duration::from_secs(1));
        let mut waits = Vec::new();
        for pause_ms in paused_ms {
            now += Duration::from_millis(*pause_ms);
            let wait = pace.due.saturating_duration_since(now);
            waits.push(wait.as_millis());
            now += wait;
            pace.begins(now);
        }
        waits
    }

    #[test]
    fn at_a_sites_usual_pace_none_waits() {
        assert_eq!(waits_ms(&[30, 0, 60, 5, 25, 0, 90, 1, 1, 58, 30]), [0; 11]);
    }

    #[test]
    fn a_burst_goes_through_and_what_follows_is_spread() {
        let waits = waits_ms(&[0; 30]);
        assert_eq!((&waits[..10], &waits[10..]), (&[0; 10][..], &[8; 20][..]));
    }

    #[test]
    fn commits_that_were_full_leave_no_debt() {
        let (mut pace, now) = (Pace::new(Instant::now()), Instant::now() + Duration::from_secs(1));
        (0..1000).for_each(|_| pace.begins(now));
        assert_eq!(pace.due, now + APART);
    }

    /// What is committed together when so many wait already and others come, one by one.
    async fn together(waiting: usize, due: Instant) -> usize {
        let (sender, mut receiver) = mpsc::channel(1000);
        (0..waiting).for_each(|_| sender.try_send(()).unwrap());
        let mut batch = Vec::new();
        assert!(receiver.recv_many(&mut batch, BATCH_UPLOADS_MAX).await > 0);
        let coming = async {
            while sender.send(()).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            () = company(&mut receiver, &mut batch, due) => {}
            () = coming => unreachable!("the receiver is there"),
        }
        batch.len()
    }

    #[tokio::test]
    async fn a_few_wait_for_company_until_there_is_enough_or_it_is_due() {
        let (past, later) = (Instant::now() - APART, Instant::now() + Duration::from_secs(3600));
        assert_eq!(together(3, later).await, ENOUGH_UPLOADS);
        assert_eq!(together(3, past).await, 3);
        assert_eq!(together(100, later).await, 100);
        assert_eq!(together(600, later).await, BATCH_UPLOADS_MAX);
    }
}
