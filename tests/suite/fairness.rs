//! Whether one device that never stops talking makes the others wait: a site simulated at the queue, in rounds instead of
//! seconds, with the lanes as the drain has them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use forebay::order::{Lane, Lanes};
use forebay::queue::{Pick, Queue};
use forebay::units::{Share, UnixMs};
use forebay::upload::{Upload, UploadId};

use crate::support::upload_of;

const LEASE: Duration = Duration::from_secs(600);
const DEVICES: usize = 200;
/// A device sends one photo in so many rounds.
const EVERY: usize = 10;
const ROUNDS: usize = 60;
/// Photos that leave in a round: what all devices together send when none sends more than the others.
const LEAVE: usize = DEVICES / EVERY;

fn photo_of(device: usize, round: usize, number: usize) -> Arc<Upload> {
    let name = format!("{device}-{round}-{number}");
    let device_id = format!("cam-{device}").parse().unwrap();
    let id = UploadId::of_device(&device_id, &name);
    let received_at = UnixMs((round * 1_000 + device) as i64);
    let base = upload_of(b"any", &name);
    Arc::new(Upload { id, device_id, size_bytes: 250_000, received_at, ..(*base).clone() })
}

/// How long the photos of all devices but the first waited, in places of what leaves, shortest first; and how many of the
/// first one's left. The first sends `times` as many as the others.
async fn waits(times: usize) -> (Vec<usize>, usize) {
    let folder = tempfile::tempdir().unwrap();
    let queue = Queue::open(&forebay::config::QueueUrl::Sqlite(folder.path().join("queue.sqlite"))).unwrap();
    queue.migrate().await.unwrap();
    let mut lanes = Lanes::new(Share::HALF);
    let mut arrived = HashMap::new();
    let (mut waits, mut of_the_first) = (Vec::new(), 0);
    for round in 0..ROUNDS {
        let of_the_others =
            (1..DEVICES).filter(|device| device % EVERY == round % EVERY).map(|d| photo_of(d, round, 0));
        // what it sends in `EVERY` rounds, spread over them
        let of_the_talker = (times * (round + 1) / EVERY).saturating_sub(times * round / EVERY);
        let photos: Vec<_> = of_the_others.chain((0..of_the_talker).map(|n| photo_of(0, round, n))).collect();
        arrived.extend(photos.iter().map(|upload| (upload.id, round * LEAVE)));
        for accepted in futures_util::future::join_all(photos.into_iter().map(|upload| queue.accept(upload))).await {
            assert!(accepted.unwrap().new);
        }
        for place in 0..LEAVE {
            let lane = lanes.next();
            let pick = if lane == Lane::Fresh { Pick::Fresh } else { Pick::Backlog };
            for lease in queue.claim("drain", 1, LEASE, pick).await.unwrap() {
                lanes.took(lane, lease.upload.size_bytes);
                match lease.upload.device_id.as_str() {
                    "cam-0" => of_the_first += 1,
                    _ => waits.push(round * LEAVE + place - arrived[&lease.upload.id]),
                }
            }
        }
    }
    waits.sort();
    (waits, of_the_first)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_sends_a_hundred_times_as_much_makes_no_other_wait() {
    let ((without, _), (with, of_the_first)) = tokio::join!(waits(1), waits(100));
    let all = (DEVICES - 1) * ROUNDS / EVERY;
    // what came in the last rounds may be on its way
    assert!(without.len() + LEAVE >= all && with.len() + LEAVE >= all, "{} and {} of {all}", without.len(), with.len());
    let p99 = |waits: &[usize]| waits[waits.len() * 99 / 100];
    println!(
        "p99 of the wait: {} without, {} with, of {LEAVE} a round; the first had {of_the_first}",
        p99(&without),
        p99(&with)
    );
    assert!(p99(&with) * 10 <= p99(&without) * 11, "{} places without it, {} with it", p99(&without), p99(&with));
    // and it has its turn too
    assert!(of_the_first >= ROUNDS / EVERY, "{of_the_first}");
}
