//! The conformance suite: SQLite and Postgres are the same queue.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay::allowance::{Control, End};
use forebay::queue::{Cursor, Filter, Queue, Tally};
use forebay::timetable::Amount;
use forebay::units::{Rate, UnixMs};
use forebay::upload::{DeviceId, ImageType, Priority, Sha256, State, Upload, UploadId};

use crate::support::{eventually, postgres};

const LEASE: Duration = Duration::from_secs(60);
const AT_ONCE: Duration = Duration::ZERO;

/// Makes a test of both queues out of each function.
macro_rules! on_both_queues {
    ($($(#[$meta:meta])* async fn $name:ident($queue:ident: Queue) $body:block)+) => {
        $(mod $name {
            use super::*;

            async fn conforms($queue: Queue) $body

            #[tokio::test(flavor = "multi_thread")]
            async fn on_sqlite() {
                let folder = tempfile::tempdir().unwrap();
                let queue = sqlite(&folder).await;
                conforms(queue).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn on_postgres() {
                conforms(postgres::queue().await).await;
            }
        })+
    };
}

async fn sqlite(folder: &tempfile::TempDir) -> Queue {
    let queue = Queue::open(&forebay::config::QueueUrl::Sqlite(folder.path().join("queue.sqlite"))).unwrap();
    queue.migrate().await.unwrap();
    queue
}

/// An upload received at `second`, of 1,000 bytes.
fn upload(device: &str, second: i64) -> Upload {
    let device_id: DeviceId = device.parse().unwrap();
    let id = UploadId::of_device(&device_id, &second.to_string());
    Upload {
        id,
        object_key: format!("{device}/{id}.jpg"),
        device_id,
        upload_id: Some(second.to_string()),
        size_bytes: 1_000,
        sha256: Sha256::of(&second.to_le_bytes()),
        content_type: ImageType::Jpeg,
        filename: None,
        captured_at: None,
        priority: Priority::Normal,
        metadata: BTreeMap::new(),
        traceparent: None,
        received_at: UnixMs(second * 1000),
    }
}

async fn accept(queue: &Queue, upload: Upload) -> Arc<Upload> {
    let upload = Arc::new(upload);
    assert!(queue.accept(upload.clone()).await.unwrap().new);
    upload
}

async fn state(queue: &Queue, upload: &Upload) -> State {
    queue.get(upload.id).await.unwrap().unwrap().state
}

on_both_queues! {
    async fn a_probe_is_the_upload_that_would_leave_last(queue: Queue) {
        for second in 1..=3 {
            accept(&queue, upload("cam-1", second)).await;
        }
        let high = accept(&queue, Upload { priority: Priority::High, ..upload("cam-2", 9) }).await;
        let probe = queue.claim_probe("drain", LEASE).await.unwrap().remove(0);
        assert_eq!(probe.upload.received_at, UnixMs(3_000));
        assert_eq!(queue.claim("drain", 1, LEASE).await.unwrap()[0].upload.id, high.id);
        assert_eq!(queue.claim_probe("drain", LEASE).await.unwrap()[0].upload.received_at, UnixMs(2_000));
    }

    async fn a_dead_upload_that_is_revived_is_queued_with_nothing_charged_to_it(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        assert!(!queue.revive(&upload).await.unwrap(), "it is not dead");
        let lease = queue.claim("drain", 1, LEASE).await.unwrap().remove(0);
        queue.charge(&lease, "damaged", None).await.unwrap();
        assert_eq!(state(&queue, &upload).await, State::Dead);
        let other_bytes = Upload { sha256: Sha256::of(b"other"), ..(*upload).clone() };
        assert!(!queue.revive(&other_bytes).await.unwrap(), "it is not that photo that is dead");
        assert!(queue.revive(&upload).await.unwrap());
        let revived = queue.get(upload.id).await.unwrap().unwrap();
        assert_eq!((revived.state, revived.failures, revived.reason), (State::Queued, 0, None));
        assert_eq!(queue.books().await.unwrap().queued.uploads, 1);
        assert_eq!(queue.claim("drain", 1, LEASE).await.unwrap().len(), 1);
    }

    async fn a_record_is_given_back_as_it_was_accepted(queue: Queue) {
        let mut full = upload("cam-1", 1);
        full.filename = Some("gate \"north\" ü.jpg".into());
        full.captured_at = Some(UnixMs(1_700_000_000_123));
        full.priority = Priority::High;
        full.metadata = BTreeMap::from([("site".into(), "7".into()), ("ünï".into(), "\"'%\\".into())]);
        full.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
        let full = accept(&queue, full).await;
        let record = queue.get(full.id).await.unwrap().unwrap();
        assert_eq!(record.upload, full);
        assert_eq!((record.state, record.attempt, record.failures), (State::Queued, 0, 0));
    }

    async fn the_same_id_again_changes_nothing_and_gives_the_record_back(queue: Queue) {
        let first = accept(&queue, upload("cam-1", 1)).await;
        let mut other = upload("cam-1", 1);
        other.received_at = UnixMs(99_000);
        let again = queue.accept(Arc::new(other)).await.unwrap();
        assert!(!again.new);
        assert_eq!(again.record.upload, first);
        assert_eq!(queue.books().await.unwrap().accepted(), Tally { uploads: 1, bytes: 1_000 });
    }

    async fn of_one_upload_accepted_fifty_times_at_once_one_is_new(queue: Queue) {
        let upload = Arc::new(upload("cam-1", 1));
        let all = (0..50).map(|_| queue.accept(upload.clone()));
        let accepted: Vec<_> = futures_util::future::join_all(all).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(accepted.iter().filter(|a| a.new).count(), 1);
        assert!(accepted.iter().all(|a| a.record.upload == upload));
    }

    async fn many_waiting_uploads_are_all_accepted(queue: Queue) {
        let all = (0..1_000).map(|second| queue.accept(Arc::new(upload("cam-1", second))));
        assert!(futures_util::future::join_all(all).await.into_iter().all(|a| a.unwrap().new));
        assert_eq!(queue.books().await.unwrap().queued.uploads, 1_000);
    }

    async fn higher_priority_is_claimed_first_then_the_oldest(queue: Queue) {
        for (second, priority) in [(3, Priority::Normal), (1, Priority::Low), (2, Priority::Normal), (9, Priority::High)] {
            accept(&queue, Upload { priority, ..upload("cam-1", second) }).await;
        }
        let claimed = queue.claim("drain", 3, LEASE).await.unwrap();
        let seconds: Vec<i64> = claimed.iter().map(|lease| lease.upload.received_at.0 / 1000).collect();
        assert_eq!(seconds, [9, 2, 3]);
        assert!(claimed.iter().all(|lease| lease.attempt == 1));
    }

    async fn what_one_claims_no_other_claims(queue: Queue) {
        for second in 0..200 {
            accept(&queue, upload("cam-1", second)).await;
        }
        let claims = (0..20).map(|_| queue.claim("drain", 10, LEASE));
        let mut ids: Vec<UploadId> = futures_util::future::join_all(claims)
            .await
            .into_iter()
            .flat_map(|leases| leases.unwrap())
            .map(|lease| lease.upload.id)
            .collect();
        // a claim passes over what others are claiming in that moment, so some may have had less to take
        while let Some(lease) = queue.claim("drain", 1, LEASE).await.unwrap().pop() {
            ids.push(lease.upload.id);
        }
        ids.sort();
        let claimed = ids.len();
        ids.dedup();
        assert_eq!((claimed, ids.len()), (200, 200));
    }

    async fn an_upload_that_is_finished_is_uploaded(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, LEASE).await.unwrap().remove(0);
        assert_eq!(state(&queue, &upload).await, State::Uploading);
        assert!(queue.finish(&lease).await.unwrap());
        let record = queue.get(upload.id).await.unwrap().unwrap();
        assert_eq!(record.state, State::Uploaded);
        assert!(record.uploaded_at.is_some());
        assert!(queue.claim("drain", 1, LEASE).await.unwrap().is_empty());
    }

    async fn finishing_twice_is_as_good_as_once(queue: Queue) {
        accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, LEASE).await.unwrap().remove(0);
        assert!(queue.finish(&lease).await.unwrap());
        assert!(queue.finish(&lease).await.unwrap(), "the reply to the first may have been lost");
        assert_eq!(queue.books().await.unwrap().uploaded.uploads, 1);
    }

    async fn an_attempt_that_lost_its_lease_writes_nothing(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let late = queue.claim("drain-a", 1, AT_ONCE).await.unwrap().remove(0);
        eventually("the lease to run out", async || (queue.reap().await.unwrap() == 1).then_some(())).await;
        let current = queue.claim("drain-b", 1, LEASE).await.unwrap().remove(0);
        assert_eq!(current.attempt, 2);
        assert!(!queue.finish(&late).await.unwrap());
        assert!(!queue.release(&late, AT_ONCE).await.unwrap());
        assert!(!queue.renew(&late, LEASE).await.unwrap());
        assert!(!queue.charge(&late, "late", None).await.unwrap());
        assert_eq!(state(&queue, &upload).await, State::Uploading);
        assert!(queue.finish(&current).await.unwrap());
    }

    async fn a_reaped_upload_that_nobody_claimed_again_may_still_be_finished(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, AT_ONCE).await.unwrap().remove(0);
        eventually("the lease to run out", async || (queue.reap().await.unwrap() == 1).then_some(())).await;
        assert!(queue.finish(&lease).await.unwrap());
        assert_eq!(state(&queue, &upload).await, State::Uploaded);
    }

    async fn a_renewed_lease_is_not_reaped(queue: Queue) {
        accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, AT_ONCE).await.unwrap().remove(0);
        assert!(queue.renew(&lease, LEASE).await.unwrap());
        assert_eq!(queue.reap().await.unwrap(), 0);
    }

    async fn a_released_upload_is_queued_and_not_charged(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, LEASE).await.unwrap().remove(0);
        assert!(queue.release(&lease, AT_ONCE).await.unwrap());
        let record = queue.get(upload.id).await.unwrap().unwrap();
        assert_eq!((record.state, record.failures), (State::Queued, 0));
        assert_eq!(queue.claim("drain", 1, LEASE).await.unwrap()[0].attempt, 2);
    }

    async fn a_charged_upload_rests_and_does_not_hold_up_the_others(queue: Queue) {
        let first = accept(&queue, upload("cam-1", 1)).await;
        let second = accept(&queue, upload("cam-2", 2)).await;
        let lease = queue.claim("drain", 1, LEASE).await.unwrap().remove(0);
        assert!(queue.charge(&lease, "refused \0 by S3", Some(LEASE)).await.unwrap());
        let next = queue.claim("drain", 5, LEASE).await.unwrap();
        assert_eq!(next.iter().map(|l| l.upload.id).collect::<Vec<_>>(), [second.id]);
        let record = queue.get(first.id).await.unwrap().unwrap();
        assert_eq!((record.state, record.failures), (State::Queued, 1));
        assert_eq!(record.reason.as_deref(), Some("refused  by S3"));
    }

    async fn charged_without_a_rest_an_upload_is_dead(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, LEASE).await.unwrap().remove(0);
        assert!(queue.charge(&lease, "damaged on disk", None).await.unwrap());
        assert_eq!(state(&queue, &upload).await, State::Dead);
        assert!(queue.claim("drain", 1, LEASE).await.unwrap().is_empty());
    }

    async fn a_photo_is_removable_once_uploaded_and_retained(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        accept(&queue, self::upload("cam-1", 2)).await;
        assert!(queue.removable(AT_ONCE, 10).await.unwrap().is_empty());
        let lease = queue.claim("drain", 1, LEASE).await.unwrap().remove(0);
        queue.finish(&lease).await.unwrap();
        assert!(queue.removable(LEASE, 10).await.unwrap().is_empty(), "it is to be retained for a while");
        let removable = queue.removable(AT_ONCE, 10).await.unwrap();
        assert_eq!(removable.iter().map(|r| r.upload.id).collect::<Vec<_>>(), [upload.id]);
        queue.removed(&[upload.id]).await.unwrap();
        assert!(queue.removable(AT_ONCE, 10).await.unwrap().is_empty());
        assert_eq!(queue.books().await.unwrap().on_disk.uploads, 1);
    }

    async fn only_uploaded_and_removed_records_are_purged_and_the_books_keep_them(queue: Queue) {
        for second in 1..=3 {
            accept(&queue, upload("cam-1", second)).await;
        }
        for lease in queue.claim("drain", 2, LEASE).await.unwrap() {
            queue.finish(&lease).await.unwrap();
        }
        let first = queue.removable(AT_ONCE, 1).await.unwrap().remove(0);
        queue.removed(&[first.upload.id]).await.unwrap();
        assert_eq!(queue.purge(LEASE, 10).await.unwrap(), 0, "it is to be retained for a while");
        assert_eq!(queue.purge(AT_ONCE, 10).await.unwrap(), 1);
        assert!(queue.get(first.upload.id).await.unwrap().is_none());
        let books = queue.books().await.unwrap();
        assert_eq!((books.accepted().uploads, books.uploaded.uploads, books.queued.uploads), (3, 2, 1));
    }

    async fn a_list_is_newest_first_and_its_pages_meet_without_gap_or_repeat(queue: Queue) {
        for second in 0..25 {
            // pairs share their moment, so that the id must tell them apart
            accept(&queue, Upload { received_at: UnixMs(second / 2 * 1000), ..upload("cam-1", second) }).await;
        }
        let (mut after, mut seen) = (Cursor::START, Vec::new());
        loop {
            let page = queue.list(&Filter::default(), after, 7).await.unwrap();
            let Some(last) = page.last() else { break };
            after = Cursor { received_at: last.upload.received_at, id: last.upload.id };
            seen.extend(page.iter().map(|r| (r.upload.received_at, r.upload.id)));
        }
        let mut sorted = seen.clone();
        sorted.sort_by(|a, b| b.cmp(a));
        sorted.dedup();
        assert_eq!(seen.len(), 25);
        assert_eq!(seen, sorted);
    }

    async fn a_list_is_filtered_by_device_and_state(queue: Queue) {
        for second in 0..10 {
            accept(&queue, upload(if second % 2 == 0 { "cam-even" } else { "cam-odd" }, second)).await;
        }
        queue.claim("drain", 3, LEASE).await.unwrap();
        let of = async |device: Option<&str>, state| {
            let filter = Filter { device_id: device.map(|d| d.parse().unwrap()), state };
            let page = queue.list(&filter, Cursor::START, 100).await.unwrap();
            page.iter().map(|r| r.upload.received_at.0 / 1000).collect::<Vec<_>>()
        };
        assert_eq!(of(Some("cam-odd"), None).await, [9, 7, 5, 3, 1]);
        assert_eq!(of(None, Some(State::Uploading)).await, [2, 1, 0]);
        assert_eq!(of(Some("cam-even"), Some(State::Uploading)).await, [2, 0]);
        assert_eq!(of(Some("cam-none"), None).await, Vec::<i64>::new());
    }

    async fn the_books_always_say_what_the_records_say(queue: Queue) {
        // a random walk through every transition, with a seed that is printed when it fails
        let seed: u64 = rand::random();
        let mut dice = seed;
        let mut roll = |sides: u64| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            dice % sides
        };
        let (mut accepted, mut leases) = (0, Vec::new());
        for step in 0..300 {
            match roll(8) {
                0..=2 => {
                    let size_bytes = 1 + roll(1_000);
                    queue.accept(Arc::new(Upload { size_bytes, ..upload("cam-1", accepted) })).await.unwrap();
                    accepted += 1;
                }
                3 => leases.extend(queue.claim("drain", 1 + roll(4) as u32, LEASE).await.unwrap()),
                4 => {
                    if let Some(lease) = leases.pop() {
                        queue.finish(&lease).await.unwrap();
                    }
                }
                5 => {
                    if let Some(lease) = leases.pop() {
                        let rest = (roll(2) == 0).then_some(AT_ONCE);
                        queue.charge(&lease, "why", rest).await.unwrap();
                    }
                }
                6 => {
                    if let Some(lease) = leases.pop() {
                        queue.release(&lease, AT_ONCE).await.unwrap();
                    }
                }
                _ => {
                    let removable = queue.removable(AT_ONCE, 2).await.unwrap();
                    let ids: Vec<UploadId> = removable.iter().map(|r| r.upload.id).collect();
                    queue.removed(&ids).await.unwrap();
                }
            }
            let (books, counted) = (queue.books().await.unwrap(), queue.count().await.unwrap());
            let books = forebay::queue::Books { oldest_queued: None, ..books };
            assert_eq!(books, counted, "at step {step} of seed {seed}");
            assert_eq!(books.accepted().uploads, accepted, "at step {step} of seed {seed}");
        }
    }

    async fn one_drain_leads_until_it_resigns_or_its_lease_runs_out(queue: Queue) {
        assert!(queue.lead("a", LEASE).await.unwrap());
        assert!(queue.lead("a", AT_ONCE).await.unwrap(), "it may renew");
        eventually("the lease to run out", async || queue.lead("b", LEASE).await.unwrap().then_some(())).await;
        assert!(!queue.lead("a", LEASE).await.unwrap());
        queue.resign("a").await.unwrap();
        assert!(!queue.lead("a", LEASE).await.unwrap(), "only the leader can resign");
        queue.resign("b").await.unwrap();
        assert!(queue.lead("a", LEASE).await.unwrap());
    }

    async fn what_operators_say_holds_until_it_ends_or_is_taken_back(queue: Queue) {
        assert_eq!(queue.control().await.unwrap(), Control::default());
        let hour = Duration::from_secs(3600);
        queue.set_rate(Amount::Share("12.5%".parse().unwrap()), "anna", End::After(hour)).await.unwrap();
        queue.set_pause("ben", End::Never).await.unwrap();
        let control = queue.control().await.unwrap();
        let (rate, pause) = (control.rate.unwrap(), control.pause.unwrap());
        assert_eq!((rate.amount.to_string().as_str(), rate.who.as_str()), ("12.5%", "anna"));
        assert_eq!(rate.until, Some(UnixMs(rate.since.0 + 3_600_000)));
        assert!(UnixMs::now().since(rate.since) < Duration::from_secs(60), "{}", rate.since);
        assert_eq!((pause.who.as_str(), pause.until), ("ben", None));

        let soon = UnixMs(UnixMs::now().0 + 86_400_000);
        queue.set_rate(Amount::Rate(Rate(1_234_567)), "carla", End::At(soon)).await.unwrap();
        let rate = queue.control().await.unwrap().rate.unwrap();
        assert_eq!((rate.amount, rate.who.as_str()), (Amount::Rate(Rate(1_234_567)), "carla"));
        assert_eq!(rate.until, Some(soon));

        queue.clear_pause().await.unwrap();
        assert_eq!(queue.control().await.unwrap().pause, None);
        queue.set_rate(Amount::Rate(Rate(1)), "carla", End::After(Duration::from_millis(300))).await.unwrap();
        eventually("it to end by itself", async || queue.control().await.unwrap().rate.is_none().then_some(())).await;
        queue.set_pause("ben", End::At(UnixMs(1))).await.unwrap();
        assert_eq!(queue.control().await.unwrap(), Control::default(), "it is over already");
        queue.clear_rate().await.unwrap();
        queue.clear_rate().await.unwrap();
        assert_eq!(queue.control().await.unwrap(), Control::default());
    }

    async fn migrating_again_changes_nothing(queue: Queue) {
        accept(&queue, upload("cam-1", 1)).await;
        assert_eq!(queue.migrate().await.unwrap(), queue.migrate().await.unwrap());
        assert_eq!(queue.books().await.unwrap().queued.uploads, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_is_not_there_is_said_within_seconds_and_without_its_password() {
    let url = format!("postgres://forebay:s3cret@127.0.0.1:{}/forebay", crate::support::free_port());
    let queue = Queue::open(&forebay::config::QueueUrl::Postgres(url)).unwrap();
    let error = tokio::time::timeout(Duration::from_secs(15), queue.accept(Arc::new(upload("cam-1", 1)))).await;
    let error = error.expect("an answer in time").unwrap_err();
    assert!(matches!(error, forebay::error::Error::Unavailable(_)));
    assert!(!error.to_string().contains("s3cret"), "{error}");
}
