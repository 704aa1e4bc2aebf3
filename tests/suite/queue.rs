//! The conformance suite: SQLite and Postgres are the same queue.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay::allowance::{Control, End};
use forebay::queue::{Cursor, Filter, Lease, Pick, Queue, Tally};
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

/// Numbers below `sides`, one after the other.
fn dice(mut seed: u64) -> impl FnMut(u64) -> u64 {
    move |sides| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % sides
    }
}

fn devices(leases: &[Lease]) -> Vec<String> {
    leases.iter().map(|lease| lease.upload.device_id.to_string()).collect()
}

fn seconds(leases: &[Lease]) -> Vec<i64> {
    leases.iter().map(|lease| lease.upload.received_at.0 / 1000).collect()
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
        assert_eq!(queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap()[0].upload.id, high.id);
        assert_eq!(queue.claim_probe("drain", LEASE).await.unwrap()[0].upload.received_at, UnixMs(2_000));
    }

    async fn a_dead_upload_that_is_revived_is_queued_with_nothing_charged_to_it(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        assert!(!queue.revive(&upload).await.unwrap(), "it is not dead");
        let lease = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
        queue.charge(&lease, "damaged", None).await.unwrap();
        assert_eq!(state(&queue, &upload).await, State::Dead);
        let other_bytes = Upload { sha256: Sha256::of(b"other"), ..(*upload).clone() };
        assert!(!queue.revive(&other_bytes).await.unwrap(), "it is not that photo that is dead");
        assert!(queue.revive(&upload).await.unwrap());
        let revived = queue.get(upload.id).await.unwrap().unwrap();
        assert_eq!((revived.state, revived.failures, revived.reason), (State::Queued, 0, None));
        assert_eq!(queue.books().await.unwrap().queued.uploads, 1);
        assert_eq!(queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().len(), 1);
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
        let claimed = queue.claim("drain", 3, LEASE, Pick::Oldest).await.unwrap();
        let seconds: Vec<i64> = claimed.iter().map(|lease| lease.upload.received_at.0 / 1000).collect();
        assert_eq!(seconds, [9, 2, 3]);
        assert!(claimed.iter().all(|lease| lease.attempt == 1));
    }

    async fn what_one_claims_no_other_claims(queue: Queue) {
        for second in 0..200 {
            accept(&queue, upload("cam-1", second)).await;
        }
        let claims = (0..20).map(|_| queue.claim("drain", 10, LEASE, Pick::Oldest));
        let mut ids: Vec<UploadId> = futures_util::future::join_all(claims)
            .await
            .into_iter()
            .flat_map(|leases| leases.unwrap())
            .map(|lease| lease.upload.id)
            .collect();
        // a claim passes over what others are claiming in that moment, so some may have had less to take
        while let Some(lease) = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().pop() {
            ids.push(lease.upload.id);
        }
        ids.sort();
        let claimed = ids.len();
        ids.dedup();
        assert_eq!((claimed, ids.len()), (200, 200));
    }

    async fn an_upload_that_is_finished_is_uploaded(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
        assert_eq!(state(&queue, &upload).await, State::Uploading);
        assert!(queue.finish(&lease).await.unwrap());
        let record = queue.get(upload.id).await.unwrap().unwrap();
        assert_eq!(record.state, State::Uploaded);
        assert!(record.uploaded_at.is_some());
        assert!(queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().is_empty());
    }

    async fn finishing_twice_is_as_good_as_once(queue: Queue) {
        accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
        assert!(queue.finish(&lease).await.unwrap());
        assert!(queue.finish(&lease).await.unwrap(), "the reply to the first may have been lost");
        assert_eq!(queue.books().await.unwrap().uploaded.uploads, 1);
    }

    async fn an_attempt_that_lost_its_lease_writes_nothing(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let late = queue.claim("drain-a", 1, AT_ONCE, Pick::Oldest).await.unwrap().remove(0);
        eventually("the lease to run out", async || (queue.reap().await.unwrap() == 1).then_some(())).await;
        let current = queue.claim("drain-b", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
        assert_eq!(current.attempt, 2);
        assert!(!queue.finish(&late).await.unwrap());
        assert!(!queue.release(&late, AT_ONCE).await.unwrap());
        assert!(!queue.renew(&late, LEASE).await.unwrap());
        assert!(!queue.charge(&late, "late", None).await.unwrap());
        assert_eq!(state(&queue, &upload).await, State::Uploading);
        assert!(queue.finish(&current).await.unwrap());
    }

    async fn of_many_that_end_at_once_each_is_held_to_its_own_fence(queue: Queue) {
        for second in 0..30 {
            accept(&queue, upload("cam-1", second)).await;
        }
        let late = queue.claim("drain-a", 30, AT_ONCE, Pick::Oldest).await.unwrap();
        let mut reaped = 0;
        eventually("the leases to run out", async || {
            reaped += queue.reap().await.unwrap();
            (reaped == 30).then_some(())
        })
        .await;
        let current = queue.claim("drain-b", 20, LEASE, Pick::Oldest).await.unwrap();
        let is_current = |lease: &&Lease| current.iter().any(|current| current.upload.id == lease.upload.id);
        // by themselves, so that none of the others can answer for them
        let taken_over: Vec<&Lease> = late.iter().filter(is_current).collect();
        assert!(queue.finish_all(&taken_over).await.into_iter().all(|ended| ended == Ok(false)));
        assert_eq!(queue.books().await.unwrap().uploaded.uploads, 0);
        // those that lost their lease, those that nobody claimed again, and those that hold it, the first of them twice
        let lost = late.iter().filter(is_current).map(|lease| (lease, false));
        let unclaimed = late.iter().filter(|lease| !is_current(lease)).map(|lease| (lease, true));
        let holding = current.iter().chain(&current[..1]).map(|lease| (lease, true));
        let mut ending: Vec<(&Lease, bool)> = lost.chain(unclaimed).chain(holding).collect();
        ending.sort_by_key(|(lease, _)| lease.upload.sha256.to_string());
        let leases: Vec<&Lease> = ending.iter().map(|(lease, _)| *lease).collect();
        let ended = queue.finish_all(&leases).await;
        assert_eq!(ended.len(), ending.len());
        for ((lease, heard), ended) in ending.into_iter().zip(ended) {
            assert_eq!(ended.unwrap(), heard, "attempt {} of {}", lease.attempt, lease.upload.object_key);
        }
        assert_eq!(queue.books().await.unwrap().uploaded.uploads, 30);
    }

    async fn a_reaped_upload_that_nobody_claimed_again_may_still_be_finished(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, AT_ONCE, Pick::Oldest).await.unwrap().remove(0);
        eventually("the lease to run out", async || (queue.reap().await.unwrap() == 1).then_some(())).await;
        assert!(queue.finish(&lease).await.unwrap());
        assert_eq!(state(&queue, &upload).await, State::Uploaded);
    }

    async fn a_renewed_lease_is_not_reaped(queue: Queue) {
        accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, AT_ONCE, Pick::Oldest).await.unwrap().remove(0);
        assert!(queue.renew(&lease, LEASE).await.unwrap());
        assert_eq!(queue.reap().await.unwrap(), 0);
    }

    async fn a_released_upload_is_queued_and_not_charged(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
        assert!(queue.release(&lease, AT_ONCE).await.unwrap());
        let record = queue.get(upload.id).await.unwrap().unwrap();
        assert_eq!((record.state, record.failures), (State::Queued, 0));
        assert_eq!(queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap()[0].attempt, 2);
    }

    async fn a_charged_upload_rests_and_does_not_hold_up_the_others(queue: Queue) {
        let first = accept(&queue, upload("cam-1", 1)).await;
        let second = accept(&queue, upload("cam-2", 2)).await;
        let lease = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
        assert!(queue.charge(&lease, "refused \0 by S3", Some(LEASE)).await.unwrap());
        let next = queue.claim("drain", 5, LEASE, Pick::Oldest).await.unwrap();
        assert_eq!(next.iter().map(|l| l.upload.id).collect::<Vec<_>>(), [second.id]);
        let record = queue.get(first.id).await.unwrap().unwrap();
        assert_eq!((record.state, record.failures), (State::Queued, 1));
        assert_eq!(record.reason.as_deref(), Some("refused  by S3"));
    }

    async fn charged_without_a_rest_an_upload_is_dead(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        let lease = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
        assert!(queue.charge(&lease, "damaged on disk", None).await.unwrap());
        assert_eq!(state(&queue, &upload).await, State::Dead);
        assert!(queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().is_empty());
    }

    async fn a_photo_is_removable_once_uploaded_and_retained(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        accept(&queue, self::upload("cam-1", 2)).await;
        assert!(queue.removable(AT_ONCE, 10).await.unwrap().is_empty());
        let lease = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
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
        for lease in queue.claim("drain", 2, LEASE, Pick::Oldest).await.unwrap() {
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
        queue.claim("drain", 3, LEASE, Pick::Oldest).await.unwrap();
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
        let mut roll = dice(seed);
        let (mut accepted, mut leases) = (0, Vec::new());
        for step in 0..300 {
            match roll(11) {
                0..=2 => {
                    let size_bytes = 1 + roll(1_000);
                    let device = ["cam-1", "cam-2", "cam-3"][roll(3) as usize];
                    let priority = Priority::ALL[roll(3) as usize];
                    let upload = Upload { size_bytes, priority, ..upload(device, accepted) };
                    queue.accept(Arc::new(upload)).await.unwrap();
                    accepted += 1;
                }
                3 => {
                    let pick = [Pick::Oldest, Pick::Newest, Pick::Fresh, Pick::Backlog][roll(4) as usize];
                    let lease = if roll(2) == 0 { LEASE } else { AT_ONCE };
                    leases.extend(queue.claim("drain", 1 + roll(4) as u32, lease, pick).await.unwrap());
                }
                4 => {
                    if let Some(lease) = leases.pop() {
                        queue.finish(&lease).await.unwrap();
                    }
                }
                5 => {
                    if let Some(lease) = leases.pop() {
                        let rest = (roll(2) == 0).then_some(AT_ONCE);
                        queue.charge(&lease, "why", rest).await.unwrap();
                        if rest.is_none() && roll(2) == 0 {
                            queue.revive(&lease.upload).await.unwrap();
                        }
                    }
                }
                6 => {
                    if let Some(lease) = leases.pop() {
                        queue.release(&lease, AT_ONCE).await.unwrap();
                    }
                }
                7 => drop(queue.reap().await.unwrap()),
                8 => drop(queue.tend_lines(2).await.unwrap()),
                9 if roll(2) == 0 => drop(queue.shed_oldest(1 + roll(1_000), 3).await.unwrap()),
                9 => drop(queue.shed_thin(1 + roll(1_000), 3).await.unwrap()),
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
            let (lines, counted) = (queue.lines().await.unwrap(), queue.count_lines().await.unwrap());
            assert_eq!(lines, counted, "at step {step} of seed {seed}");
            let (_, lost) = queue.sheds(10).await.unwrap();
            let lost = lost.into_iter().fold(Tally::default(), |sum, device| sum + device.lost);
            assert_eq!(lost, books.shed, "at step {step} of seed {seed}");
        }
    }

    async fn the_oldest_of_the_lowest_class_are_shed_first(queue: Queue) {
        let mut second = 0;
        for priority in [Priority::High, Priority::Low, Priority::Normal] {
            for device in ["cam-1", "cam-2", "cam-1"] {
                accept(&queue, Upload { priority, ..upload(device, second) }).await;
                second += 1;
            }
        }
        let shed = async |bytes, limit| {
            let mut shed = queue.shed_oldest(bytes, limit).await.unwrap();
            shed.sort_by_key(|record| record.upload.received_at);
            assert!(shed.iter().all(|record| record.state == State::Shed && record.reason.is_some()), "{shed:?}");
            shed.iter().map(|record| record.upload.received_at.0 / 1000).collect::<Vec<_>>()
        };
        assert_eq!(shed(0, 10).await, [0; 0]);
        assert_eq!(shed(1_001, 10).await, [3, 4], "enough to free so many bytes");
        assert_eq!(shed(3_000, 2).await, [5, 6], "the next class when the lowest has none, and no more than the limit");
        let on_its_way = queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap().remove(0);
        assert_eq!(shed(100_000, 10).await, [1, 2, 7, 8], "never what is on its way");
        assert_eq!(shed(100_000, 10).await, [0; 0]);
        assert!(queue.finish(&on_its_way).await.unwrap());
        let books = queue.books().await.unwrap();
        assert_eq!((books.accepted().uploads, books.shed.uploads, books.uploaded.uploads), (9, 8, 1));
        let (devices, most) = queue.sheds(1).await.unwrap();
        assert_eq!((devices, most.len(), most[0].device_id.as_str()), (2, 1, "cam-1"));
        assert_eq!(most[0].lost, Tally { uploads: 5, bytes: 5_000 });
        assert!(most[0].first_at.0 > 0 && most[0].first_at <= most[0].last_at);
    }

    async fn the_longest_lines_are_thinned_evenly_in_time_and_high_priority_last(queue: Queue) {
        for second in 0..101 {
            accept(&queue, upload("cam-much", second * 60)).await;
        }
        for second in 0..20 {
            accept(&queue, upload("cam-some", second * 60)).await;
            accept(&queue, Upload { priority: Priority::High, ..upload("cam-high", second * 60) }).await;
        }
        let mut lost = 0;
        while lost < 61 {
            let shed = queue.shed_thin((61 - lost) * 1_000, 200).await.unwrap();
            assert!(!shed.is_empty() && shed.iter().all(|r| r.upload.device_id.as_str() == "cam-much"), "after {lost}");
            let mut minutes: Vec<i64> = shed.iter().map(|record| record.upload.received_at.0 / 60_000).collect();
            minutes.sort();
            assert!(minutes.windows(2).all(|two| two[0] + 1 < two[1]), "no two neighbours in one go: {minutes:?}");
            lost += shed.len() as u64;
        }
        assert_eq!(lost, 61, "no more than enough");
        let filter = Filter { device_id: Some("cam-much".parse().unwrap()), state: Some(State::Queued) };
        let left = queue.list(&filter, Cursor::START, 200).await.unwrap();
        let gaps: Vec<i64> =
            left.windows(2).map(|two| (two[0].upload.received_at.0 - two[1].upload.received_at.0) / 60_000).collect();
        assert_eq!(gaps.iter().sum::<i64>(), 100, "the first and the last are still there");
        assert!(gaps.iter().all(|gap| (1..=4).contains(gap)), "{gaps:?}");
        // both have forty and twenty now; what goes further goes from the longer
        let shed = queue.shed_thin(10_000, 200).await.unwrap();
        assert!(shed.len() == 10 && shed.iter().all(|r| r.upload.device_id.as_str() == "cam-much"), "{}", shed.len());
        while queue.lines().await.unwrap().iter().any(|line| line.priority == Priority::Normal) {
            let shed = queue.shed_thin(1_000_000, 200).await.unwrap();
            assert!(shed.iter().all(|record| record.upload.priority == Priority::Normal), "{shed:?}");
        }
        assert_eq!(queue.shed_thin(2_000, 200).await.unwrap().len(), 2);
        assert_eq!(queue.books().await.unwrap().queued.uploads, 18);
    }

    async fn a_tombstone_is_purged_once_its_photo_is_gone_and_is_counted_for_good(queue: Queue) {
        let upload = accept(&queue, upload("cam-1", 1)).await;
        assert_eq!(queue.shed_oldest(1, 1).await.unwrap().len(), 1);
        assert_eq!(queue.shed_on_disk_bytes().await.unwrap(), 1_000);
        assert_eq!(queue.purge_shed(AT_ONCE, 10).await.unwrap(), 0, "its photo is still on disk");
        assert!(!queue.revive(&upload).await.unwrap(), "what was given up stays given up");
        let again = queue.accept(upload.clone()).await.unwrap();
        assert!(!again.new && again.record.state == State::Shed, "{again:?}");
        assert_eq!(queue.removable_shed(10).await.unwrap().len(), 1);
        queue.removed(&[upload.id]).await.unwrap();
        assert_eq!(queue.shed_on_disk_bytes().await.unwrap(), 0);
        assert_eq!(queue.purge(AT_ONCE, 10).await.unwrap(), 0, "it is none that was uploaded");
        assert_eq!(queue.purge_shed(LEASE, 10).await.unwrap(), 0, "it is to be retained for a while");
        assert_eq!(queue.purge_shed(AT_ONCE, 10).await.unwrap(), 1);
        assert_eq!(queue.books().await.unwrap().shed.uploads, 1);
        assert_eq!(queue.sheds(5).await.unwrap().1[0].lost.uploads, 1);
    }

    async fn devices_take_turns_however_much_one_of_them_sends(queue: Queue) {
        for second in 0..500 {
            accept(&queue, upload("cam-0", second)).await;
        }
        for device in 1..=5 {
            accept(&queue, upload(&format!("cam-{device}"), 1_000 + device)).await;
        }
        for pick in [Pick::Fresh, Pick::Backlog] {
            let mut devices = devices(&queue.claim("drain", 3, LEASE, pick).await.unwrap());
            devices.sort();
            devices.dedup();
            assert_eq!(devices.len(), 3, "nobody is served twice before all were: {devices:?}");
        }
        assert_eq!(devices(&queue.claim("drain", 2, LEASE, Pick::Fresh).await.unwrap()), ["cam-0", "cam-0"]);
    }

    async fn turns_are_by_bytes_not_by_photos(queue: Queue) {
        for second in 0..100 {
            accept(&queue, Upload { size_bytes: 3_000, ..upload("cam-large", second) }).await;
            accept(&queue, upload("cam-small", second)).await;
        }
        let mut claimed = Vec::new();
        for _ in 0..10 {
            claimed.extend(devices(&queue.claim("drain", 8, LEASE, Pick::Backlog).await.unwrap()));
        }
        let small = claimed.iter().filter(|device| *device == "cam-small").count();
        assert_eq!((small, claimed.len() - small), (60, 20));
    }

    async fn who_was_idle_is_owed_nothing(queue: Queue) {
        for second in 0..200 {
            accept(&queue, upload("cam-busy", second)).await;
        }
        accept(&queue, upload("cam-idle", 0)).await;
        for _ in 0..12 {
            assert_eq!(queue.claim("drain", 8, LEASE, Pick::Fresh).await.unwrap().len(), 8);
        }
        for second in 1..50 {
            accept(&queue, upload("cam-idle", second)).await;
            accept(&queue, upload("cam-new", second)).await;
        }
        let claimed = devices(&queue.claim("drain", 12, LEASE, Pick::Fresh).await.unwrap());
        for device in ["cam-busy", "cam-idle", "cam-new"] {
            let had = claimed.iter().filter(|d| *d == device).count();
            assert!((3..=5).contains(&had), "{device} had {had} of {claimed:?}");
        }
    }

    async fn whose_uploads_all_rested_is_owed_nothing_once_the_lines_are_tended(queue: Queue) {
        accept(&queue, upload("cam-rested", 0)).await;
        let lease = queue.claim("drain", 1, LEASE, Pick::Fresh).await.unwrap().remove(0);
        queue.charge(&lease, "refused", Some(LEASE)).await.unwrap();
        for second in 0..100 {
            accept(&queue, upload("cam-busy", second)).await;
        }
        for _ in 0..5 {
            assert_eq!(queue.claim("drain", 8, LEASE, Pick::Fresh).await.unwrap().len(), 8);
        }
        for second in 1..50 {
            accept(&queue, upload("cam-rested", second)).await;
        }
        assert_eq!(queue.tend_lines(10).await.unwrap(), 1);
        assert_eq!(queue.tend_lines(10).await.unwrap(), 0);
        let claimed = devices(&queue.claim("drain", 8, LEASE, Pick::Fresh).await.unwrap());
        let rested = claimed.iter().filter(|device| *device == "cam-rested").count();
        assert!((3..=5).contains(&rested), "{claimed:?}");
    }

    async fn a_line_that_is_empty_and_says_nothing_any_more_is_deleted(queue: Queue) {
        for device in 0..10 {
            accept(&queue, upload(&format!("cam-{device}"), 1)).await;
        }
        assert_eq!(queue.claim("drain", 10, LEASE, Pick::Fresh).await.unwrap().len(), 10);
        assert_eq!(queue.tend_lines(10).await.unwrap(), 0, "each had its turn, and may not have another at once");
        for second in 2..5 {
            accept(&queue, upload("cam-0", second)).await;
            queue.claim("drain", 1, LEASE, Pick::Fresh).await.unwrap();
        }
        assert_eq!(queue.tend_lines(4).await.unwrap(), 4);
        assert_eq!(queue.tend_lines(10).await.unwrap(), 5);
        assert_eq!(queue.lines().await.unwrap(), []);
    }

    async fn lines_that_rest_hide_nobody(queue: Queue) {
        for device in 0..30 {
            accept(&queue, upload(&format!("cam-{device}"), 1)).await;
        }
        for lease in queue.claim("drain", 30, LEASE, Pick::Backlog).await.unwrap() {
            queue.charge(&lease, "refused", Some(LEASE)).await.unwrap();
        }
        accept(&queue, Upload { priority: Priority::Low, ..upload("cam-last", 1) }).await;
        assert_eq!(devices(&queue.claim("drain", 4, LEASE, Pick::Backlog).await.unwrap()), ["cam-last"]);
        assert!(queue.claim("drain", 4, LEASE, Pick::Fresh).await.unwrap().is_empty());
    }

    async fn an_upload_that_rests_does_not_hold_up_its_line(queue: Queue) {
        accept(&queue, upload("cam-1", 1)).await;
        accept(&queue, upload("cam-1", 2)).await;
        let lease = queue.claim("drain", 1, LEASE, Pick::Backlog).await.unwrap().remove(0);
        queue.charge(&lease, "refused", Some(LEASE)).await.unwrap();
        assert_eq!(seconds(&queue.claim("drain", 2, LEASE, Pick::Backlog).await.unwrap()), [2]);
    }

    async fn the_fresh_lane_takes_a_lines_newest_and_the_backlog_its_oldest(queue: Queue) {
        for second in 0..10 {
            accept(&queue, upload("cam-1", second)).await;
        }
        assert_eq!(seconds(&queue.claim("drain", 2, LEASE, Pick::Fresh).await.unwrap()), [9, 8]);
        assert_eq!(seconds(&queue.claim("drain", 2, LEASE, Pick::Backlog).await.unwrap()), [0, 1]);
        assert_eq!(seconds(&queue.claim("drain", 1, LEASE, Pick::Fresh).await.unwrap()), [7]);
    }

    async fn the_newest_of_all_is_claimed_first_when_told_so(queue: Queue) {
        for second in 0..6 {
            accept(&queue, upload(if second % 2 == 0 { "cam-1" } else { "cam-2" }, second)).await;
        }
        accept(&queue, Upload { priority: Priority::High, ..upload("cam-3", 0) }).await;
        assert_eq!(seconds(&queue.claim("drain", 4, LEASE, Pick::Newest).await.unwrap()), [0, 5, 4, 3]);
    }

    async fn higher_classes_leave_first_whatever_the_order(queue: Queue) {
        for pick in [Pick::Oldest, Pick::Newest, Pick::Fresh, Pick::Backlog] {
            for (n, priority) in [Priority::Normal, Priority::Low, Priority::High].into_iter().cycle().take(9).enumerate() {
                accept(&queue, Upload { priority, ..upload(&format!("{pick:?}-{}", n / 6), n as i64) }).await;
            }
            let mut claimed = Vec::new();
            for limit in [1, 4, 2, 2] {
                claimed.extend(queue.claim("drain", limit, LEASE, pick).await.unwrap());
            }
            let classes: Vec<Priority> = claimed.iter().map(|lease| lease.upload.priority).collect();
            let (high, normal, low) = ([Priority::High; 3], [Priority::Normal; 3], [Priority::Low; 3]);
            assert_eq!(classes, [high, normal, low].concat(), "{pick:?}");
        }
    }

    async fn a_claim_of_many_takes_what_as_many_claims_of_one_would_have(queue: Queue) {
        let seed: u64 = rand::random();
        let mut roll = dice(seed);
        // each line's turn and uploads, oldest first; what a device sends in one class is one line
        type Line = (std::cmp::Reverse<Priority>, String);
        let mut lines: BTreeMap<Line, (u64, Vec<Arc<Upload>>)> = BTreeMap::new();
        for second in 0..150 {
            let (device, priority) = (format!("cam-{}", roll(7)), Priority::ALL[1 + roll(2) as usize]);
            let upload = Upload { size_bytes: 1 + roll(5_000), priority, ..upload(&device, second) };
            let line = lines.entry((std::cmp::Reverse(priority), device)).or_default();
            line.1.push(accept(&queue, upload).await);
        }
        for step in 0.. {
            let (limit, fresh) = (1 + roll(9) as usize, roll(2) == 0);
            let mut expected = Vec::new();
            for _ in 0..limit {
                let waiting = lines.iter_mut().filter(|(_, (_, uploads))| !uploads.is_empty());
                let next = waiting.min_by_key(|((class, device), (turn, _))| (*class, *turn, device.clone()));
                let Some((_, (turn, uploads))) = next else { break };
                let upload = uploads.remove(if fresh { uploads.len() - 1 } else { 0 });
                *turn += upload.size_bytes;
                expected.push(upload.id);
            }
            let pick = if fresh { Pick::Fresh } else { Pick::Backlog };
            let leases = queue.claim("drain", limit as u32, LEASE, pick).await.unwrap();
            let mut claimed: Vec<UploadId> = leases.iter().map(|lease| lease.upload.id).collect();
            if claimed.is_empty() && expected.is_empty() {
                break;
            }
            claimed.sort();
            expected.sort();
            assert_eq!(claimed, expected, "{pick:?} of {limit} at step {step} of seed {seed}");
        }
    }

    async fn devices_that_send_while_others_are_served_wait_for_nobody_in_a_circle(queue: Queue) {
        let accepting = (0..20i64).map(|round| {
            let queue = queue.clone();
            async move {
                for second in 0..20 {
                    // in another order each time
                    let device = format!("cam-{}", (second * (round + 1)) % 7);
                    queue.accept(Arc::new(upload(&device, round * 100 + second))).await.unwrap();
                }
            }
        });
        let all = async { drop(futures_util::future::join_all(accepting).await) };
        let served = std::sync::atomic::AtomicU32::new(0);
        let serve = async |pick| {
            while served.load(std::sync::atomic::Ordering::Relaxed) < 400 {
                for lease in queue.claim("drain", 5, LEASE, pick).await.unwrap() {
                    assert!(queue.finish(&lease).await.unwrap());
                    served.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
                queue.tend_lines(3).await.unwrap();
            }
        };
        tokio::join!(all, serve(Pick::Fresh), serve(Pick::Backlog), serve(Pick::Newest), serve(Pick::Oldest));
        assert_eq!(queue.books().await.unwrap().uploaded.uploads, 400);
        assert_eq!(queue.lines().await.unwrap(), []);
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

    async fn a_lead_that_was_taken_before_the_clock_went_back_is_over_after_one_lease(queue: Queue) {
        let lease = Duration::from_millis(500);
        assert!(queue.lead("gone", 1000 * lease).await.unwrap());
        assert!(!queue.lead("next", lease).await.unwrap(), "it may still be there");
        assert!(queue.lead("gone", 1000 * lease).await.unwrap(), "and then goes on");
        let leads = eventually("the lease to run out", async || {
            Some(queue.lead("next", lease).await.unwrap()).filter(|leads| *leads)
        });
        leads.await;
    }

    async fn a_lease_that_was_given_before_the_clock_went_back_is_reaped(queue: Queue) {
        accept(&queue, upload("cam-1", 1)).await;
        accept(&queue, upload("cam-1", 2)).await;
        queue.claim("drain", 1, LEASE, Pick::Oldest).await.unwrap();
        queue.claim("drain that died", 1, 1000 * LEASE, Pick::Oldest).await.unwrap();
        assert_eq!(queue.reap().await.unwrap(), 1);
        assert_eq!(queue.claim("next", 2, LEASE, Pick::Oldest).await.unwrap().len(), 1);
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

/// How the database goes about each claim must not depend on how much waits: no look at every upload, and nothing sorted but
/// the few that the lines give.
#[tokio::test(flavor = "multi_thread")]
async fn no_claim_in_sqlite_looks_at_all_that_waits() {
    let folder = tempfile::tempdir().unwrap();
    let queue = sqlite(&folder).await;
    fill(&queue).await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(folder.path().join("queue.sqlite"));
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    for pick in [Pick::Oldest, Pick::Newest, Pick::Fresh, Pick::Backlog] {
        let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {}", queue.claim_statement(pick)));
        let plan: Vec<(i64, i64, i64, String)> = sqlx::query_as(explain).fetch_all(&pool).await.unwrap();
        let plan: Vec<String> = plan.into_iter().map(|(.., step)| step).collect();
        for step in &plan {
            // these are few: what the lines give, and what is leased
            let few = ["SCAN waiting", "SCAN chosen", "SCAN next", "SCAN a", "SCAN (", "SCAN class_"];
            assert!(!step.contains("uploads_list_state"), "{step} in {plan:#?}");
            let by_index = step.contains("USING INDEX") || step.contains("USING COVERING INDEX");
            let is_few = few.iter().any(|few| step.starts_with(few));
            assert!(!step.starts_with("SCAN") || by_index || is_few, "{step} in {plan:#?}");
        }
        let wanted = if matches!(pick, Pick::Oldest | Pick::Newest) { "uploads_claim" } else { "uploads_line" };
        assert!(plan.iter().any(|step| step.contains(wanted)), "{plan:#?}");
        if pick == Pick::Oldest {
            assert!(!plan.iter().any(|step| step.contains("TEMP B-TREE")), "{plan:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_claim_in_postgres_looks_at_all_that_waits() {
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let queue = Queue::open(&forebay::config::QueueUrl::Postgres(url.clone())).unwrap();
    queue.migrate().await.unwrap();
    fill(&queue).await;
    let pool = sqlx::PgPool::connect(&url).await.unwrap();
    sqlx::query("ANALYZE").execute(&pool).await.unwrap(); // which autovacuum does within a minute
    for pick in [Pick::Oldest, Pick::Newest, Pick::Fresh, Pick::Backlog] {
        let explain = sqlx::AssertSqlSafe(format!("EXPLAIN ANALYZE {}", queue.claim_statement(pick)));
        let mut query = sqlx::query_as(explain).bind(8i64).bind("drain").bind(60_000i64);
        if matches!(pick, Pick::Fresh | Pick::Backlog) {
            query = query.bind(8i64);
        }
        let plan: Vec<(String,)> = query.fetch_all(&pool).await.unwrap();
        let plan: Vec<String> = plan.into_iter().map(|(step,)| step).collect();
        for step in &plan {
            assert!(!step.contains("Seq Scan on uploads"), "{plan:#?}");
            // of 5,000 that wait
            let rows = step.rsplit("rows=").next().and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
            assert!(rows.is_none_or(|rows| rows <= 64), "{step} in {plan:#?}");
        }
    }
}

/// 5,000 uploads of 50 devices.
async fn fill(queue: &Queue) {
    for round in 0..5 {
        let all = (0..1_000).map(|n| queue.accept(Arc::new(upload(&format!("cam-{}", n % 50), round * 1_000 + n))));
        assert!(futures_util::future::join_all(all).await.into_iter().all(|a| a.unwrap().new));
    }
}

/// What was queued by a forebay that knew no lines stands in them after the update.
async fn what_waits_is_in_the_lines_after_the_schema_came_to_know_them(url: forebay::config::QueueUrl, first: &str) {
    let folder = tempfile::tempdir().unwrap();
    let migrations = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(first);
    let name = "0001_uploads.sql";
    std::fs::copy(migrations.join(name), folder.path().join(name)).unwrap();
    let migrator = sqlx::migrate::Migrator::new(folder.path()).await.unwrap();
    match &url {
        forebay::config::QueueUrl::Postgres(url) => {
            migrator.run(&sqlx::PgPool::connect(url).await.unwrap()).await.unwrap();
        }
        forebay::config::QueueUrl::Sqlite(path) => {
            let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path).create_if_missing(true);
            migrator.run(&sqlx::SqlitePool::connect_with(options).await.unwrap()).await.unwrap();
        }
    }
    let queue = Queue::open(&url).unwrap();
    for second in 0..20 {
        accept(&queue, upload(&format!("cam-{}", second % 3), second)).await;
    }
    queue.migrate().await.unwrap();
    let lines = queue.lines().await.unwrap();
    assert_eq!(lines, queue.count_lines().await.unwrap());
    assert_eq!(lines.len(), 3);
    assert_eq!(queue.claim("drain", 30, LEASE, Pick::Fresh).await.unwrap().len(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_in_sqlite_is_in_the_lines_after_the_schema_came_to_know_them() {
    let folder = tempfile::tempdir().unwrap();
    let url = forebay::config::QueueUrl::Sqlite(folder.path().join("queue.sqlite"));
    what_waits_is_in_the_lines_after_the_schema_came_to_know_them(url, "sqlite").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_in_postgres_is_in_the_lines_after_the_schema_came_to_know_them() {
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let url = forebay::config::QueueUrl::Postgres(url);
    what_waits_is_in_the_lines_after_the_schema_came_to_know_them(url, "postgres").await;
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
