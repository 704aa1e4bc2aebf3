//! The audit: spool, queue, bucket and a ledger held against each other.
//!
//! Always: what disagrees is looked at a second time before it is reported, since an appliance at work moves on meanwhile.
//! Never: an upload changed.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde::Serialize;

use crate::bucket::Bucket;
use crate::error::{Error, Result};
use crate::ledger;
use crate::queue::{Books, Cursor, Filter, PAGE_RECORDS_MAX, Queue, Record};
use crate::spool::Spool;
use crate::upload::{Sha256, State, Upload, UploadId};

/// Disagreements kept for people to read; all are counted.
const SHOWN_MAX: usize = 20;
/// Objects read back at once.
const READS_AT_ONCE: usize = 8;

/// How closely is looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Names, sizes and records.
    Names,
    /// Every byte as well: on disk, and read back from the bucket.
    Bytes,
}

/// What is held against each other.
pub struct Subjects<'a> {
    pub queue: &'a Queue,
    pub spool: &'a Spool,
    /// The bucket and the prefix of its keys; without one, uploaded photos are not looked at.
    pub bucket: Option<(&'a Bucket, &'a str)>,
    pub ledger: Option<&'a Path>,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Records in the queue.
    pub records: u64,
    /// Uploads whose object is in the bucket as it should be.
    pub verified: u64,
    pub verified_bytes: u64,
    /// Uploads that wait, whose photo is on disk as it should be.
    pub waiting: u64,
    pub waiting_bytes: u64,
    /// Acknowledged while the queue was away and not yet in it; their photos are on disk.
    pub journaled: u64,
    /// Set aside as dead.
    pub dead: u64,
    /// Given up because the disk was full; these records are their tombstones.
    pub shed: u64,
    /// The books were held against the records; not where uploads came or went in each moment in which that was tried.
    pub books_compared: bool,
    /// Objects under the prefix that belong to no record: purged, or not ours.
    pub other_objects: u64,
    /// Acknowledgements in the ledger.
    pub acknowledged: u64,
    pub acknowledged_bytes: u64,
    /// Of those, photos that are nowhere, or not the bytes that were sent.
    pub lost: u64,
    /// Of those, photos that can be in the bucket only, while it could not be asked.
    pub not_looked_for: u64,
    /// The bucket was looked at to the end; otherwise `verified` and `other_objects` say little.
    pub bucket_looked_at: bool,
    /// How many disagreements there are.
    pub disagreements: u64,
    /// The first of them, in words.
    pub shown: Vec<String>,
}

impl Report {
    /// Nothing disagrees.
    pub fn agrees(&self) -> bool {
        self.disagreements == 0
    }

    fn disagree(&mut self, text: String) {
        self.disagreements += 1;
        if self.shown.len() < SHOWN_MAX {
            self.shown.push(text);
        }
    }
}

/// Holds everything against everything. `progress` is told what is being done.
pub async fn audit(subjects: &Subjects<'_>, depth: Depth, progress: impl Fn(&str)) -> Result<Report> {
    let mut report = Report::default();
    progress("reading the queue");
    let records = all_records(subjects.queue).await?;
    report.records = records.len() as u64;
    report.shed = records.values().filter(|record| record.state == State::Shed).count() as u64;
    check_books(subjects.queue, &mut report).await?;

    progress("walking the spool");
    let on_disk = photos_on_disk(subjects.spool, depth, &mut report).await?;
    check_spool(subjects, &records, &on_disk, &mut report).await?;

    if let Some((bucket, prefix)) = subjects.bucket {
        progress("listing the bucket");
        let looked = check_bucket(bucket, prefix, subjects.queue, &records, depth, &mut report, &progress).await?;
        report.bucket_looked_at = looked.is_ok();
        // what else was found is told all the same
        if let Err(error) = looked {
            report.disagree(format!("the bucket was not looked at to the end: {error}"));
        }
    }
    if let Some(path) = subjects.ledger {
        progress("reading the ledger");
        check_ledger(path, subjects, &records, &on_disk, &mut report).await?;
    }
    Ok(report)
}

async fn all_records(queue: &Queue) -> Result<HashMap<UploadId, Record>> {
    let mut records = HashMap::new();
    let mut after = Cursor::START;
    loop {
        let page = queue.list(&Filter::default(), after, PAGE_RECORDS_MAX).await?;
        let full = page.len() == PAGE_RECORDS_MAX as usize;
        for record in page {
            after = Cursor { received_at: record.upload.received_at, id: record.upload.id };
            records.insert(record.upload.id, record);
        }
        if !full {
            return Ok(records);
        }
    }
}

/// The books must say what the records say; purged records stay in the books as uploaded or shed.
async fn check_books(queue: &Queue, report: &mut Report) -> Result<()> {
    let mut last = None;
    for _ in 0..5 {
        let (before, counted, after) = (queue.books().await?, queue.count().await?, queue.books().await?);
        let still = |b: &Books| (b.queued, b.uploading, b.dead);
        let purged_only =
            before.uploaded.uploads >= counted.uploaded.uploads && before.shed.uploads >= counted.shed.uploads;
        if still(&before) == still(&counted) && purged_only {
            report.books_compared = true;
            return Ok(());
        }
        // of what moved meanwhile nothing can be said
        last = (before == after).then_some((before, counted)).or(last);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    if let Some((books, counted)) = last {
        report.books_compared = true;
        report.disagree(format!("the books say {books:?}, the records count to {counted:?}"));
    }
    Ok(())
}

async fn photos_on_disk(spool: &Spool, depth: Depth, report: &mut Report) -> Result<HashMap<UploadId, Upload>> {
    let walker = spool.clone();
    let (photos, damaged) = tokio::task::spawn_blocking(move || {
        let (mut photos, mut damaged) = (Vec::new(), Vec::new());
        walker.walk(|path, found| match found {
            Ok(upload) => photos.push(upload),
            // removed since the folder was read
            Err(Error::Unavailable(_)) if !path.exists() => {}
            Err(error) => damaged.push(error.to_string()),
        })?;
        Ok::<_, Error>((photos, damaged))
    })
    .await
    .map_err(|e| Error::unavailable("the walk over the spool ended early", e))??;
    damaged.into_iter().for_each(|text| report.disagree(text));
    if depth == Depth::Bytes {
        for upload in &photos {
            let (read, sha256) = (spool.read(Arc::new(upload.clone())).await, upload.sha256);
            let checked =
                tokio::task::spawn_blocking(move || read.and_then(|photo| is_of_digest(&photo, sha256))).await;
            match checked.unwrap_or_else(|e| Err(Error::unavailable("a digest was not taken", e))) {
                Ok(()) | Err(Error::Missing(_)) => {}
                Err(error) => report.disagree(format!("upload {} of {}: {error}", upload.id, upload.device_id)),
            }
        }
    }
    Ok(photos.into_iter().map(|upload| (upload.id, upload)).collect())
}

fn is_of_digest(photo: &[u8], sha256: Sha256) -> Result<()> {
    match Sha256::of(photo) {
        found if found == sha256 => Ok(()),
        found => Err(Error::Damaged(format!("its bytes on disk have the digest {found}, not {sha256}"))),
    }
}

/// The record as it is now, for a second look.
async fn again(queue: &Queue, id: UploadId) -> Result<Option<Record>> {
    tokio::time::sleep(Duration::from_millis(20)).await;
    queue.get(id).await
}

fn waits(state: State) -> bool {
    matches!(state, State::Queued | State::Uploading)
}

async fn check_spool(
    subjects: &Subjects<'_>,
    records: &HashMap<UploadId, Record>,
    on_disk: &HashMap<UploadId, Upload>,
    report: &mut Report,
) -> Result<()> {
    let journaled: HashSet<UploadId> =
        subjects.spool.journaled(usize::MAX).await?.into_iter().map(|upload| upload.id).collect();
    for (id, upload) in on_disk {
        let record = match records.get(id) {
            Some(record) => Some(record.clone()),
            None => again(subjects.queue, *id).await?,
        };
        match record {
            None if journaled.contains(id) => report.journaled += 1,
            None => report.disagree(format!("upload {id} of {} is on disk but not in the queue", upload.device_id)),
            Some(record) if record.upload.sha256 != upload.sha256 => {
                report
                    .disagree(format!("upload {id} of {} has other bytes on disk than in the queue", upload.device_id));
            }
            // removed in this very moment, or sent again and not yet dropped
            Some(record) if record.removed_at.is_some() => {
                let now = again(subjects.queue, *id).await?;
                let still = subjects.spool.stream(record.upload.clone()).await.is_ok();
                if still && now.is_some_and(|now| now.removed_at.is_some()) {
                    report.disagree(format!(
                        "upload {id} of {} is on disk, but its record says that it was removed",
                        upload.device_id
                    ));
                }
            }
            Some(_) => {}
        }
    }
    for (id, record) in records.iter().filter(|(_, record)| waits(record.state) || record.state == State::Dead) {
        if on_disk.contains_key(id) {
            if record.state == State::Dead {
                report.dead += 1;
            } else {
                report.waiting += 1;
                report.waiting_bytes += record.upload.size_bytes;
            }
            continue;
        }
        let Some(now) = again(subjects.queue, *id).await? else { continue };
        let there = subjects.spool.stream(now.upload.clone()).await.is_ok();
        if waits(now.state) && !there {
            report.disagree(format!(
                "upload {id} of {} is {} but its photo is not on disk",
                now.upload.device_id, now.state
            ));
        } else if now.state == State::Dead {
            report.dead += 1;
            if !there {
                report.disagree(format!("upload {id} of {} is dead, and its photo is gone", now.upload.device_id));
            }
        }
    }
    Ok(())
}

/// The inner error is the bucket's, the outer one the queue's.
async fn check_bucket(
    bucket: &Bucket,
    prefix: &str,
    queue: &Queue,
    records: &HashMap<UploadId, Record>,
    depth: Depth,
    report: &mut Report,
    progress: &impl Fn(&str),
) -> Result<Result<()>> {
    let mut objects = HashMap::new();
    let listed = bucket.list(prefix, |object| {
        objects.insert(object.key, object.size_bytes);
    });
    if let Err(error) = listed.await {
        return Ok(Err(error));
    }
    let uploaded: Vec<&Record> = records.values().filter(|record| record.state == State::Uploaded).collect();
    if depth == Depth::Bytes {
        progress(&format!("reading {} objects back", uploaded.len()));
    }
    // how many bytes are there as they should be, or what is wrong
    let mut checks = stream::iter(uploaded.iter().map(|record| async {
        let Upload { object_key, size_bytes, sha256, .. } = &*record.upload;
        let listed = objects.get(object_key);
        if let Some(size) = listed.filter(|size| *size != size_bytes) {
            return Ok(Err(format!("{object_key} has {size} bytes, not {size_bytes}")));
        }
        // a listing may be older than the record
        if listed.is_none() || depth == Depth::Bytes {
            match bucket.read_back(object_key).await? {
                Some(found) if found == (*size_bytes, *sha256) => {}
                Some(_) => return Ok(Err(format!("{object_key} holds other bytes"))),
                None => return Ok(Err(format!("{object_key} is not in the bucket"))),
            }
        }
        Ok::<_, Error>(Ok(*size_bytes))
    }))
    .buffer_unordered(READS_AT_ONCE);
    while let Some(check) = checks.next().await {
        match check {
            Ok(Ok(bytes)) => {
                report.verified += 1;
                report.verified_bytes += bytes;
            }
            Ok(Err(wrong)) => report.disagree(format!("recorded as uploaded, but {wrong}")),
            Err(error) => return Ok(Err(error)),
        }
    }
    drop(checks);
    let keys: HashSet<&str> = records.values().map(|record| record.upload.object_key.as_str()).collect();
    let unknown: Vec<&String> = objects.keys().filter(|key| !keys.contains(key.as_str())).collect();
    for key in unknown {
        // it may have been accepted and uploaded since the queue was read
        let id = key.rsplit('/').next().and_then(|name| name.split('.').next()).and_then(|id| id.parse().ok());
        let known = match id {
            Some(id) => queue.get(id).await?.is_some(),
            None => false,
        };
        report.other_objects += u64::from(!known);
    }
    Ok(Ok(()))
}

/// Reads from the bucket that may fail one after another before it is asked no more.
const UNANSWERED_MAX: u32 = 3;

/// Every acknowledgement must be true: the photo is on disk, or in the bucket, with the bytes that were sent.
async fn check_ledger(
    path: &Path,
    subjects: &Subjects<'_>,
    records: &HashMap<UploadId, Record>,
    on_disk: &HashMap<UploadId, Upload>,
    report: &mut Report,
) -> Result<()> {
    let mut sent: HashMap<(String, String), Sha256> = HashMap::new();
    let mut acks: HashMap<UploadId, (ledger::Ack, String, String)> = HashMap::new();
    ledger::read(path, |entry| match entry {
        ledger::Entry::Sent { device_id, upload_id, sha256, .. } => drop(sent.insert((device_id, upload_id), sha256)),
        ledger::Entry::Answered { device_id, upload_id, ack: Some(ack), .. } => {
            acks.insert(ack.id, (ack, device_id, upload_id));
        }
        _ => {}
    })
    .map_err(|e| Error::unavailable(format_args!("cannot read the ledger {}", path.display()), e))?;

    let (mut unanswered, mut why) = (0, None);
    for (id, (ack, device_id, upload_id)) in acks {
        report.acknowledged += 1;
        report.acknowledged_bytes += ack.size_bytes;
        let lost = |report: &mut Report, text: &str| {
            report.lost += 1;
            report.disagree(format!("acknowledged upload {id} of {device_id}: {text}"));
        };
        if sent.get(&(device_id.clone(), upload_id)) != Some(&ack.sha256) {
            lost(report, "the acknowledgement is not of the bytes that were sent");
            continue;
        }
        let record = match records.get(&id) {
            Some(record) => Some(record.clone()),
            None => subjects.queue.get(id).await?,
        };
        match record {
            Some(record) if record.upload.sha256 != ack.sha256 => lost(report, "the queue has it with other bytes"),
            Some(record) if record.state == State::Dead && !on_disk.contains_key(&id) => {
                let reason = record.reason.unwrap_or_default();
                lost(report, &format!("it is dead ({reason}), and its photo is gone"));
            }
            Some(_) => {} // where it must be was checked with the spool and the bucket
            None if on_disk.get(&id).is_some_and(|upload| upload.sha256 == ack.sha256) => {}
            None => {
                // its record may have been purged
                let in_bucket = match subjects.bucket {
                    // each would be waited for in vain
                    Some(_) if !report.bucket_looked_at || unanswered >= UNANSWERED_MAX => {
                        report.not_looked_for += 1;
                        continue;
                    }
                    Some((bucket, _)) => match bucket.read_back(&ack.object_key).await {
                        Ok(found) => {
                            unanswered = 0;
                            found == Some((ack.size_bytes, ack.sha256))
                        }
                        // the rest is told all the same
                        Err(error) => {
                            report.not_looked_for += 1;
                            unanswered += 1;
                            why.get_or_insert(error);
                            continue;
                        }
                    },
                    None => false,
                };
                if !in_bucket {
                    lost(report, "it is neither on disk, nor in the queue, nor in the bucket");
                }
            }
        }
    }
    if report.not_looked_for > 0 {
        let acknowledged = report.not_looked_for;
        let why = why.map(|error| format!(" to the end: {error}")).unwrap_or_default();
        report.disagree(format!(
            "{acknowledged} acknowledged uploads can be in the bucket only, and were not looked for{why}"
        ));
    }
    Ok(())
}
