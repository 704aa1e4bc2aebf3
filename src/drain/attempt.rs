//! One attempt to bring one upload to the bucket.
//!
//! Always: success is recorded only under the attempt's own fence; the environment's faults charge nobody; an attempt that
//! is cut short gives its lease back. Never: an attempt given up for being slow, as long as bytes move.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::Instrument;

use super::Drain;
use super::underway::{Cut, Landed, Landing};
use crate::bucket::{Held, Object};
use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::pacer::Turn;
use crate::queue::Lease;
use crate::telemetry::{link_trace, metrics};
use crate::upload::UploadId;

/// How long a claim holds, unless it is renewed: what a drain that was killed had in hand waits for no longer than this.
pub const LEASE: Duration = Duration::from_secs(20);
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// The longest that the queue is waited for: a lease is asked for three times before it runs out.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// When the other side has not moved for this long, the connection is as good as dead.
const STALL_MAX: Duration = Duration::from_secs(45);
/// After so many failures of its own an upload is set aside.
const FAILURES_MAX: i32 = 5;
/// The rest after the first failure; it doubles with each.
pub const REST: Duration = Duration::from_secs(10);
/// The rest after a fault of the environment: longer than any pause, so that the next probe is another upload.
const PROBE_REST: Duration = Duration::from_secs(5);

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// S3 has it. The queue may not know yet if it is away; then a later attempt finds the object there.
    Uploaded,
    /// The upload itself is at fault, and was charged.
    Charged,
    /// It was charged because the store refused it then, for this.
    Refused(UploadId, String, Instant),
    /// The environment was at fault then; nobody was charged.
    Environment(String, Instant),
    /// Somebody else holds the lease, or the process is stopping.
    GivenUp,
}

/// Sends the upload of `lease`; `cut` ends the attempt early. `turn` tells whom it waits for, and `landing` that the
/// bucket has the photo.
pub async fn attempt(drain: &Drain, lease: Lease, turn: Turn, cut: Cut, landing: Landing) -> Outcome {
    let span = tracing::info_span!("drain", upload = %lease.upload.id, device = %lease.upload.device_id, attempt = lease.attempt);
    if let Some(accepted_in) = &lease.upload.traceparent {
        link_trace(&span, accepted_in);
    }
    async {
        let sent = tokio::select! {
            sent = send(drain, &lease, &turn) => sent,
            watched = watch(drain, &lease, &turn) => Err(watched),
            () = cut.given_up.cancelled() => Err(Failed::GivenUp),
            () = cut.stood_still.cancelled() => Err(Failed::StoodStill),
        };
        turn.is_ours();
        match sent {
            Ok(landed) => landing.tell(landed),
            // before the queue is told, which may take long
            Err(_) => drop(landing),
        }
        conclude(drain, &lease, sent).await
    }
    .instrument(span)
    .await
}

/// Why an attempt did not bring the photo to the bucket.
enum Failed {
    Spool(Error),
    Bucket(Error),
    /// It stood still for longer than it was given.
    StoodStill,
    GivenUp,
}

/// Brings the photo to the bucket, unless it is there already.
async fn send(drain: &Drain, lease: &Lease, turn: &Turn) -> std::result::Result<Landed, Failed> {
    let upload = &lease.upload;
    let photo = match drain.spool.read(upload.clone()).await {
        Err(Error::Missing(_)) if is_without_its_spool(drain).await => {
            let why = "no photo at all is in the spool, though the queue knows several: is its disk mounted?";
            return Err(Failed::Spool(Error::Unavailable(why.to_owned())));
        }
        read => read.map_err(Failed::Spool)?,
    };
    let object = Object {
        key: &upload.object_key,
        content_type: upload.content_type,
        sha256: upload.sha256,
        photo: &photo,
        turn,
    };
    if lease.attempt > 1 {
        // the attempt before may have succeeded without anyone hearing of it
        match drain.bucket.confirmed(&object).await {
            Ok(Held::Yes) => return Ok(Landed::Found),
            // nothing there, or nothing said, or not these bytes: the key is this upload's alone, so it is written
            Ok(Held::No | Held::NotSaid) | Err(Error::Refused(_)) => {}
            Err(error) => return Err(Failed::Bucket(error)),
        }
    }
    crash_points::pass(Point::DrainPut).await.map_err(|e| Failed::Bucket(Error::unavailable("PUT", e)))?;
    if drain.bucket.put(&object).await.map_err(Failed::Bucket)? {
        return Ok(Landed::Sent);
    }
    match drain.bucket.confirmed(&object).await.map_err(Failed::Bucket)? {
        Held::Yes => Ok(Landed::Sent),
        Held::No => Err(environment("the store answered success, but the object is not there")),
        Held::NotSaid => Err(environment("the store confirms no digest, and HEAD is forbidden: allow s3:GetObject")),
    }
}

/// All photos are missing, which is no fault of theirs. Of a single one that cannot be told.
async fn is_without_its_spool(drain: &Drain) -> bool {
    drain.spool.holds_nothing().await && drain.queue.books().await.is_ok_and(|books| books.on_disk.uploads > 1)
}

fn environment(why: &str) -> Failed {
    Failed::Bucket(Error::Unavailable(why.to_owned()))
}

/// Keeps the lease alive; ends only when the attempt must be given up.
async fn watch(drain: &Drain, lease: &Lease, turn: &Turn) -> Failed {
    let mut renewed_at = Instant::now();
    loop {
        sleep(Duration::from_secs(1)).await;
        if turn.theirs_since().is_some_and(|since| since.elapsed() > STALL_MAX) {
            let text = format!("nothing moved for {} s; the link or the store hangs", STALL_MAX.as_secs());
            return Failed::Bucket(Error::Unavailable(text));
        }
        if renewed_at.elapsed() >= RENEW_EVERY {
            renewed_at = Instant::now();
            // a queue that is away cannot give the lease to anyone else either
            if let Ok(Ok(false)) = tokio::time::timeout(ANSWER_TIMEOUT, drain.queue.renew(lease, LEASE)).await {
                return Failed::GivenUp;
            }
        }
    }
}

/// Tells the queue.
async fn conclude(drain: &Drain, lease: &Lease, sent: std::result::Result<Landed, Failed>) -> Outcome {
    match sent {
        Ok(landed) => {
            let already_there = landed == Landed::Found;
            drain.suspects.forget(lease.upload.id);
            metrics().attempted(if already_there { "already_there" } else { "uploaded" });
            if !told(|| finish(drain, lease)).await {
                tracing::warn!("uploaded, but the queue was not told; a later attempt will find the object there");
            }
            tracing::debug!(already_there, "uploaded");
            Outcome::Uploaded
        }
        Err(Failed::Spool(Error::Damaged(why))) => {
            charge(drain, lease, "damaged", &format!("damaged on disk: {why}"), None).await
        }
        // on a network file system a new file may not be in sight yet
        Err(Failed::Spool(Error::Missing(why))) => charge(drain, lease, "damaged", &why, Some(drain.rest)).await,
        // while nothing passes, who is at fault cannot be told
        Err(Failed::Bucket(Error::Refused(why) | Error::Damaged(why) | Error::Missing(why))) if drain.is_sound() => {
            charge(drain, lease, "refused", &why, Some(drain.rest)).await
        }
        Err(Failed::Bucket(error) | Failed::Spool(error))
            if drain.is_sound() && drain.suspects.failed(lease.upload.id) =>
        {
            charge(drain, lease, "refused", &error.to_string(), Some(drain.rest)).await
        }
        Err(Failed::StoodStill) if drain.is_sound() && drain.suspects.failed(lease.upload.id) => {
            charge(drain, lease, "refused", "it stands still again and again, and others pass", Some(drain.rest)).await
        }
        Err(Failed::Spool(error) | Failed::Bucket(error)) => {
            let failed_at = Instant::now(); // the queue may take long to hear of it
            metrics().attempted("environment");
            let _ = told(|| drain.queue.release(lease, PROBE_REST)).await;
            Outcome::Environment(error.to_string(), failed_at)
        }
        Err(Failed::StoodStill) => {
            metrics().attempted("environment");
            let _ = told(|| drain.queue.release(lease, PROBE_REST)).await;
            Outcome::GivenUp
        }
        Err(Failed::GivenUp) => {
            metrics().attempted("given_up");
            let _ = told(|| drain.queue.release(lease, Duration::ZERO)).await;
            Outcome::GivenUp
        }
    }
}

/// Records that S3 has the photo.
async fn finish(drain: &Drain, lease: &Lease) -> Result<bool> {
    let unheard = |e| Error::unavailable("the queue does not answer", e);
    crash_points::pass(Point::DrainUploaded).await.map_err(unheard)?;
    let finished = drain.finishes.finish(lease).await?;
    crash_points::pass(Point::DrainFinished).await.map_err(unheard)?;
    Ok(finished)
}

/// Charges a failure; without a rest, or after too many, the upload is set aside.
async fn charge(drain: &Drain, lease: &Lease, outcome: &'static str, why: &str, rest: Option<Duration>) -> Outcome {
    let failed_at = Instant::now();
    metrics().attempted(outcome);
    let rest =
        rest.filter(|_| lease.failures + 1 < FAILURES_MAX).map(|rest| rest * 2u32.pow(lease.failures.max(0) as u32));
    match rest {
        Some(rest) => {
            tracing::warn!(why, failures = lease.failures + 1, rest_seconds = rest.as_secs(), "the upload failed")
        }
        None => {
            drain.suspects.forget(lease.upload.id);
            tracing::error!(why, "the upload is set aside as dead");
        }
    }
    let _ = told(|| drain.queue.charge(lease, why, rest)).await;
    match outcome {
        "refused" => Outcome::Refused(lease.upload.id, why.to_owned(), failed_at),
        _ => Outcome::Charged,
    }
}

/// Tries for a while to tell the queue something; what it does not hear, the lease's end says in its stead.
async fn told<F: Future<Output = Result<bool>>>(mut tell: impl FnMut() -> F) -> bool {
    for pause_ms in [100, 400, 1600, 6400] {
        match tokio::time::timeout(ANSWER_TIMEOUT, tell()).await {
            Ok(Ok(heard)) => return heard,
            _ => sleep(Duration::from_millis(pause_ms)).await,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, SqliteConnection};

    use super::super::ahead::tests::lease;
    use super::super::underway::Underway;
    use super::*;
    use crate::bucket::Bucket;
    use crate::config::{Endpoint, QueueUrl, SpoolLimits};
    use crate::pacer::Pacer;
    use crate::queue::Queue;
    use crate::spool::Spool;
    use crate::units::{ByteSize, Rate, Reserve};

    #[tokio::test]
    async fn one_that_has_failed_is_sending_no_more_while_the_queue_has_yet_to_hear_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.sqlite");
        let queue = Queue::open(&QueueUrl::Sqlite(path.clone())).unwrap();
        queue.migrate().await.unwrap();
        let limits = SpoolLimits { reserve: Reserve::Bytes(ByteSize(0)), max: None };
        let spool = Spool::open(folder.path(), limits).unwrap();
        let (access_key, secret_key) = ("a".to_owned(), "b".to_owned());
        let nowhere = Endpoint { url: "http://127.0.0.1:9".to_owned(), access_key, secret_key };
        let drain = Drain::new(spool, queue, Bucket::at(&nowhere, "photos"), Pacer::new(Rate(1_000_000)));
        // another process holds the database, so that it hears of nothing
        let mut other = SqliteConnection::connect(&path.display().to_string()).await.unwrap();
        let _writing = other.begin_with("BEGIN IMMEDIATE").await.unwrap();
        let mut underway = Underway::default();
        underway.start(&drain, lease());
        assert!(!drain.sending.is_nobody());
        let failed = async {
            while !drain.sending.is_nobody() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            () = failed => {}
            ended = underway.next_ended() => panic!("it counted until it had ended: {ended:?}"),
        }
    }
}
