//! The way out beside rclone, to the same store: unpaced how many objects a second, paced what a megabyte costs.
//!
//! Beside both stands what the store takes of wrk, which reads no file, signs nothing and gives no digest, so that the store checks
//! neither: about as much as any client can have of it on these cores.

use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay::bucket::{Bucket, Object};
use forebay::upload::{ImageType, Sha256};

use crate::load::{self, Bodies, Load};
use crate::machine::cpu;
use crate::report::{Contestant, Measured, Report, Target};
use crate::support::backlog::{Backlog, PHOTO_BYTES, allowing};
use crate::support::program::{Program, s3_settings};
use crate::support::rclone::{Rclone, write_files};
use crate::support::weed;
use crate::{Plan, Turn, cpu_per, settle, turns};

/// What rclone copies at once: more did not make it faster.
const TRANSFERS: u64 = 16;
/// As good as none.
const UNPACED: u64 = 10_000_000_000;
const PACED: u64 = 5_000_000;
/// Seconds of a paced round for each that was asked for, and the fewest: a drain runs for months, so its start is not to weigh much.
const PACED_TIMES_AS_LONG: u64 = 4;
const PACED_SECONDS_MIN: u64 = 10;
/// Connections and seconds of wrk: with 16 and 32 it had 2 to 5% less.
const WRK_CONNECTIONS: u32 = 8;
const WRK_SECONDS: u64 = 6;
/// What a second of it brings at most.
const WRK_BYTES_PER_SECOND: u64 = 400_000_000;
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

fn paced_seconds(plan: &Plan) -> u64 {
    (plan.seconds * PACED_TIMES_AS_LONG).max(PACED_SECONDS_MIN)
}

/// What the store holds at the end, of all rounds.
pub fn stored_bytes(plan: &Plan) -> u64 {
    let unpaced = 2 * PHOTOS_UNPACED * PHOTO_BYTES + WRK_SECONDS * WRK_BYTES_PER_SECOND;
    let beside_the_store = PHOTOS_UNPACED * PHOTO_BYTES;
    beside_the_store + u64::from(plan.rounds) * (unpaced + 2 * PACED * paced_seconds(plan))
}

pub async fn run_all(plan: &Plan, bodies: &Bodies, report: &mut Report) {
    let store = tokio::task::spawn_blocking(|| weed::Server::start("127.0.0.1", None)).await.expect("weed starts");
    let rclone = Rclone::find();
    for rate in [UNPACED, PACED] {
        let photos = match rate {
            UNPACED => PHOTOS_UNPACED,
            paced => paced * paced_seconds(plan) / PHOTO_BYTES,
        };
        let (mut ours, mut theirs, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..plan.rounds {
            for turn in turns(round) {
                match turn {
                    Turn::Theirs => {
                        plan.tell(round, &format!("rclone copies {photos} photos"));
                        theirs.push(copied(&rclone, &store, photos, rate).await);
                        settle().await;
                        if rate == UNPACED {
                            plan.tell(round, "wrk puts what it has in memory");
                            bare.push(put_by_wrk(&store, bodies, round).await);
                        }
                    }
                    Turn::Ours => {
                        plan.tell(round, &format!("forebay drains {photos} photos"));
                        ours.push(drained(&store, photos, rate).await);
                    }
                }
                settle().await;
            }
        }
        let of = |name: &str, seen: &[Seen], figure: fn(&Seen) -> f64| Contestant {
            name: name.to_owned(),
            rounds: seen.iter().map(figure).collect(),
        };
        let contestants = |figure| vec![of("forebay drain", &ours, figure), of(&rclone.version, &theirs, figure)];
        let with_bare = |figure| {
            let mut contestants = contestants(figure);
            contestants.push(of("wrk, from memory, neither signed nor digested", &bare, figure));
            contestants
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
                contestants: with_bare(|seen| seen.objects_per_second),
                targets: vec![Target::TimesAtLeast(2.0)],
            });
            report.add(Measured {
                what: "Processor time of SeaweedFS beside it, on the same cores".to_owned(),
                unit: "ms an object".to_owned(),
                contestants: with_bare(|seen| seen.store_ms_per_object),
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
    use_bucket(&bucket).await;
    name
}

async fn use_bucket(bucket: &Bucket) {
    let (photo, turn) = (Bytes::from_static(b"here before"), forebay::pacer::Turn::default());
    for number in 0..OBJECTS_BEFORE {
        let key = format!("before/{number}");
        let object =
            Object { key: &key, content_type: ImageType::Jpeg, sha256: Sha256::of(&photo), photo: &photo, turn: &turn };
        assert!(bucket.put(&object).await.expect("SeaweedFS takes an object"), "it confirms its digest");
    }
    tokio::time::sleep(VOLUMES_MADE).await;
}

async fn drained(store: &weed::Server, photos: u64, rate: u64) -> Seen {
    let bucket = used_bucket(store).await;
    let settings = allowing(&s3_settings(&store.endpoint, &bucket), rate);
    let mut backlog = Backlog::new(None).await;
    backlog.add(photos * PHOTO_BYTES).await;
    settle().await;
    let (began, stores) = (Instant::now(), cpu(store.pid()));
    let drain = Program::start("drain", &settings, &backlog.data()).await;
    let longest = Duration::from_secs(600 + photos * PHOTO_BYTES / rate);
    assert!(backlog.all_uploaded(longest).await, "all is uploaded");
    Seen::of(photos, began.elapsed(), cpu(drain.pid()), cpu(store.pid()) - stores)
}

async fn copied(rclone: &Rclone, store: &weed::Server, photos: u64, rate: u64) -> Seen {
    let bucket = used_bucket(store).await;
    let settings = s3_settings(&store.endpoint, &bucket);
    let folder = tempfile::tempdir().expect("a folder for photos");
    write_files(folder.path(), photos);
    // what it is to read is in memory, and not on its way to the disk any more
    settle().await;
    let (began, stores) = (Instant::now(), cpu(store.pid()));
    let mut copy = rclone.copy(folder.path(), &settings, TRANSFERS, (rate != UNPACED).then_some(rate));
    while !copy.has_ended() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (took, used, stores) = (began.elapsed(), cpu(copy.pid()), cpu(store.pid()) - stores);
    assert_eq!(copy.ended(), Some(true), "rclone copies all");
    Seen::of(photos, took, used, stores)
}

/// Photos from memory, each to a key of its own.
async fn put_by_wrk(store: &weed::Server, bodies: &Bodies, round: u32) -> Seen {
    let bucket = format!("{}{round}", weed::OPEN_BUCKETS);
    use_bucket(&store.bucket_named(&bucket).await).await;
    let url = format!("{}/{bucket}/*", store.endpoint.url);
    let load = Load { connections: WRK_CONNECTIONS, seconds: WRK_SECONDS, per_second: None };
    let stores = cpu(store.pid());
    let seen = load::send("PUT", &url, "image/jpeg", &bodies.raw, load).await;
    assert!(seen.refused + seen.broken == 0, "{seen:?}");
    Seen {
        objects_per_second: seen.per_second(),
        cpu_ms_per_mb: f64::NAN, // it is gone when it could be asked
        store_ms_per_object: cpu_per(cpu(store.pid()) - stores, seen.uploads()),
    }
}
