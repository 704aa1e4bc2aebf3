//! The way out beside rclone, to the same store: unpaced how many objects a second, paced what a megabyte costs.

use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay::bucket::Object;
use forebay::pacer::Turn;
use forebay::upload::{ImageType, Sha256};

use crate::machine::cpu;
use crate::report::{Contestant, Measured, Report, Target};
use crate::support::backlog::{Backlog, PHOTO_BYTES, allowing};
use crate::support::program::{Program, s3_settings};
use crate::support::rclone::{Rclone, write_files};
use crate::support::weed;
use crate::{Plan, cpu_per, settle};

/// What rclone copies at once: more did not make it faster.
const TRANSFERS: u64 = 16;
/// As good as none.
const UNPACED: u64 = 10_000_000_000;
const PACED: u64 = 5_000_000;
const PHOTOS_UNPACED: u64 = 4_000;
/// Objects that a bucket holds before a round.
const OBJECTS_BEFORE: usize = 100;
/// How long SeaweedFS is given to make the volumes for them.
const VOLUMES_MADE: Duration = Duration::from_secs(2);

/// One contestant's way out.
struct Seen {
    objects_per_second: f64,
    cpu_ms_per_mb: f64,
    /// What an object costs the store, which has to share the machine.
    store_ms_per_object: f64,
}

impl Seen {
    fn of(photos: u64, took: Duration, own: Duration, stores: Duration) -> Seen {
        let megabytes = (photos * PHOTO_BYTES) as f64 / 1e6;
        Seen {
            objects_per_second: photos as f64 / took.as_secs_f64(),
            cpu_ms_per_mb: own.as_secs_f64() * 1000.0 / megabytes,
            store_ms_per_object: cpu_per(stores, photos),
        }
    }
}

pub async fn run_all(plan: &Plan, report: &mut Report) {
    let store = tokio::task::spawn_blocking(|| weed::Server::start("127.0.0.1", None)).await.expect("weed starts");
    let rclone = Rclone::find();
    for rate in [UNPACED, PACED] {
        let photos = if rate == UNPACED { PHOTOS_UNPACED } else { PACED * plan.seconds.max(10) / PHOTO_BYTES };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..plan.rounds {
            plan.tell(round, &format!("rclone copies {photos} photos"));
            theirs.push(copied(&rclone, &store, photos, rate).await);
            settle().await;
            plan.tell(round, &format!("forebay drains {photos} photos"));
            ours.push(drained(&store, photos, rate).await);
            settle().await;
        }
        let contestants = |figure: fn(&Seen) -> f64| {
            let of = |name: &str, seen: &[Seen]| Contestant {
                name: name.to_owned(),
                rounds: seen.iter().map(figure).collect(),
            };
            vec![of("forebay drain", &ours), of(&rclone.version, &theirs)]
        };
        let paced = rate == PACED;
        if paced {
            report.add(Measured {
                what: "Rate reached at an allowance of 5 MB/s".to_owned(),
                unit: "photos of 250 kB/s".to_owned(),
                contestants: contestants(|seen| seen.objects_per_second),
                targets: vec![],
            });
        } else {
            report.add(Measured {
                what: "Unpaced, photos of 250 kB to SeaweedFS".to_owned(),
                unit: "objects/s".to_owned(),
                contestants: contestants(|seen| seen.objects_per_second),
                targets: vec![Target::TimesAtLeast(2.0)],
            });
            report.add(Measured {
                what: "Processor time of SeaweedFS beside it, on the same cores".to_owned(),
                unit: "ms an object".to_owned(),
                contestants: contestants(|seen| seen.store_ms_per_object),
                targets: vec![],
            });
        }
        report.add(Measured {
            what: format!("Processor time of the way out, {}", if paced { "at 5 MB/s" } else { "unpaced" }),
            unit: "ms/MB".to_owned(),
            contestants: contestants(|seen| seen.cpu_ms_per_mb),
            targets: Vec::from_iter(paced.then_some(Target::TimesAtMost(0.25))),
        });
    }
}

/// A bucket that holds objects already: in the first second of a new one SeaweedFS makes its volumes, and takes one object after
/// another.
async fn used_bucket(store: &weed::Server) -> String {
    let (bucket, name) = store.bucket().await;
    let (photo, turn) = (Bytes::from_static(b"here before"), Turn::default());
    for number in 0..OBJECTS_BEFORE {
        let key = format!("before/{number}");
        let object =
            Object { key: &key, content_type: ImageType::Jpeg, sha256: Sha256::of(&photo), photo: &photo, turn: &turn };
        assert!(bucket.put(&object).await.expect("SeaweedFS takes an object"), "it confirms its digest");
    }
    tokio::time::sleep(VOLUMES_MADE).await;
    name
}

async fn drained(store: &weed::Server, photos: u64, rate: u64) -> Seen {
    let bucket = used_bucket(store).await;
    let settings = allowing(&s3_settings(&store.endpoint, &bucket), rate);
    let mut backlog = Backlog::new(None).await;
    backlog.add(photos * PHOTO_BYTES).await;
    let (began, stores) = (Instant::now(), cpu(store.pid()));
    let drain = Program::start("drain", &settings, &backlog.data()).await;
    assert!(backlog.all_uploaded(Duration::from_secs(600)).await, "all is uploaded");
    Seen::of(photos, began.elapsed(), cpu(drain.pid()), cpu(store.pid()) - stores)
}

async fn copied(rclone: &Rclone, store: &weed::Server, photos: u64, rate: u64) -> Seen {
    let bucket = used_bucket(store).await;
    let settings = s3_settings(&store.endpoint, &bucket);
    let folder = tempfile::tempdir().expect("a folder for photos");
    write_files(folder.path(), photos);
    let (began, stores) = (Instant::now(), cpu(store.pid()));
    let mut copy = rclone.copy(folder.path(), &settings, TRANSFERS, (rate != UNPACED).then_some(rate));
    while !copy.has_ended() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (took, used, stores) = (began.elapsed(), cpu(copy.pid()), cpu(store.pid()) - stores);
    assert_eq!(copy.ended(), Some(true), "rclone copies all");
    Seen::of(photos, took, used, stores)
}
