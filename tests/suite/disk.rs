//! Real disks at their worst: the power goes, a sync fails, there is no room. What was acknowledged is there afterwards, and
//! what cannot be kept is refused.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use forebay::error::Error;
use forebay::spool::{Spool, Stored, Unfinished};
use forebay::upload::{Upload, UploadId};
use rustix::fs::{FallocateFlags, OFlags};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::agreement::rebuild;
use crate::support::disk::{CachedDisk, Disk};
use crate::support::fleet::Fleet;
use crate::support::pouring::{FAST, keep_house, pour};
use crate::support::program::{Program, s3_settings};
use crate::support::site::{Answer, Site};
use crate::support::{NO_LIMITS, PATIENCE, eventually, free_port, json_upload, photo, postgres, upload_of, weed};

const EXT4_BYTES: u64 = 64 << 20;
const XFS_BYTES: u64 = 320 << 20;

fn open(folder: &Path) -> Spool {
    Spool::open(&folder.join("data"), NO_LIMITS).unwrap()
}

/// Cuts the disk's power and opens the spool on it again.
fn after_a_power_cut(disk: &Disk, spool: Spool) -> Spool {
    disk.shut_down();
    drop(spool);
    disk.remount();
    open(disk.folder())
}

async fn is_there(spool: &Spool, number: usize) {
    let (photo, upload) = (photo(number), upload_of(&photo(number), &number.to_string()));
    assert_eq!(spool.read(upload.clone()).await.unwrap(), photo, "photo {number}");
    assert!(records(spool).contains(&upload), "the record of photo {number}");
}

async fn store(spool: &Spool, number: usize) {
    let photo = photo(number);
    assert_eq!(spool.store(upload_of(&photo, &number.to_string()), photo).await.unwrap(), Stored::New);
}

/// A photo that came slowly while memory was short: its first half is written already, by way of the page cache.
async fn come_slowly(spool: &Spool, photo: &[u8]) -> Unfinished {
    let (first, second) = photo.split_at(photo.len() / 2);
    let mut coming = spool.write_out(Unfinished::from(first.to_vec())).await.unwrap();
    coming.rest().appended_to().extend_from_slice(second);
    coming
}

async fn store_slowly(spool: &Spool, number: usize) {
    let photo = photo(number);
    let coming = come_slowly(spool, &photo).await;
    assert_eq!(spool.store(upload_of(&photo, &number.to_string()), coming).await.unwrap(), Stored::New);
}

async fn what_was_stored_survives_a_power_cut(disk: Disk) {
    let mut spool = open(disk.folder());
    // one by one, since the sync of a later photo may make an earlier one durable
    for number in 0..6 {
        match number % 2 {
            0 => store(&spool, number).await,
            _ => store_slowly(&spool, number).await,
        }
        spool = after_a_power_cut(&disk, spool);
        is_there(&spool, number).await;
    }
    futures_util::future::join_all((6..25).map(|number| store(&spool, number))).await;
    spool = after_a_power_cut(&disk, spool);
    for number in 0..25 {
        is_there(&spool, number).await;
    }
    assert_eq!(spool.incoming_count().unwrap(), 0);
}

#[tokio::test]
async fn what_was_stored_on_ext4_survives_a_power_cut() {
    what_was_stored_survives_a_power_cut(Disk::ext4(EXT4_BYTES)).await;
}

#[tokio::test]
async fn what_was_stored_on_xfs_survives_a_power_cut() {
    what_was_stored_survives_a_power_cut(Disk::xfs(XFS_BYTES)).await;
}

#[tokio::test]
async fn a_file_system_that_takes_nothing_past_the_page_cache_holds_photos_all_the_same() {
    let disk = CachedDisk::new();
    let mut direct = File::options();
    direct.write(true).create(true).custom_flags(OFlags::DIRECT.bits() as i32);
    assert!(direct.open(disk.folder().join("direct")).is_err(), "it takes nothing past the page cache");
    let spool = open(disk.folder());
    for number in 0..2 {
        store(&spool, number).await;
        is_there(&spool, number).await;
    }
    assert_eq!(spool.incoming_count().unwrap(), 0);
}

/// Stores and journals one photo after another until one is refused; what was stored, and what of it was journaled.
async fn store_until_refused(spool: Spool, numbers: Arc<AtomicUsize>) -> (Vec<Arc<Upload>>, Vec<Arc<Upload>>) {
    let (mut stored, mut journaled) = (Vec::new(), Vec::new());
    loop {
        let number = numbers.fetch_add(1, Ordering::Relaxed);
        let photo = number.to_le_bytes().repeat(100);
        let upload = upload_of(&photo, &number.to_string());
        if spool.store(upload.clone(), photo).await.is_err() {
            return (stored, journaled);
        }
        stored.push(upload.clone());
        if spool.journal(upload.clone()).await.is_err() {
            return (stored, journaled);
        }
        journaled.push(upload);
    }
}

/// The power goes `cuts` times while photos are stored and journaled, many at once: some are just being synced. One cut in ten
/// is at a moment when XFS lets a sync succeed that should fail, so a hundred are enough to see what comes of it.
async fn what_is_stored_while_the_power_goes_is_kept_or_refused(disk: Disk, cuts: usize) {
    let (mut spool, numbers) = (open(disk.folder()), Arc::new(AtomicUsize::new(0)));
    for cut in 0..cuts {
        let before = numbers.load(Ordering::Relaxed);
        let store = |_| tokio::spawn(store_until_refused(spool.clone(), numbers.clone()));
        let storing: Vec<_> = (0..8).map(store).collect();
        let a_few = || numbers.load(Ordering::Relaxed) > before + 30;
        eventually("a few photos", async || a_few().then_some(())).await;
        disk.shut_down();
        let kept = futures_util::future::join_all(storing).await;
        drop(spool);
        disk.remount();
        spool = open(disk.folder());
        let marks = spool.journaled(usize::MAX).await.unwrap();
        for (stored, journaled) in kept.into_iter().map(Result::unwrap) {
            for upload in journaled {
                assert!(marks.contains(&upload), "cut {cut}: the mark of upload {}", upload.id);
                spool.unjournal(&upload).await.unwrap();
            }
            for upload in stored {
                let read = spool.read(upload.clone()).await;
                assert!(read.is_ok(), "cut {cut}: upload {}: {read:?}", upload.id);
                spool.remove(upload).await.unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_on_ext4_while_the_power_goes_is_kept_or_refused() {
    what_is_stored_while_the_power_goes_is_kept_or_refused(Disk::ext4(EXT4_BYTES), 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_on_xfs_while_the_power_goes_is_kept_or_refused() {
    what_is_stored_while_the_power_goes_is_kept_or_refused(Disk::xfs(XFS_BYTES), 100).await;
}

async fn what_was_journaled_survives_a_power_cut(disk: Disk) {
    let mut spool = open(disk.folder());
    for number in 0..3 {
        store(&spool, number).await;
        spool.journal(upload_of(&photo(number), &number.to_string())).await.unwrap();
        spool = after_a_power_cut(&disk, spool);
        let journaled = spool.journaled(100).await.unwrap();
        assert!(journaled.contains(&upload_of(&photo(number), &number.to_string())), "photo {number} of {journaled:?}");
    }
}

#[tokio::test]
async fn what_was_journaled_on_ext4_survives_a_power_cut() {
    what_was_journaled_survives_a_power_cut(Disk::ext4(EXT4_BYTES)).await;
}

#[tokio::test]
async fn what_was_journaled_on_xfs_survives_a_power_cut() {
    what_was_journaled_survives_a_power_cut(Disk::xfs(XFS_BYTES)).await;
}

/// The power of the disk goes three times while devices send, each time right after an acknowledgement.
async fn nothing_acknowledged_is_lost_by_power_cuts(disk: Disk, role: &str, queue: Option<String>) {
    let folder = tempfile::tempdir().unwrap();
    let (_bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    settings.extend(queue.map(|url| ("FOREBAY_QUEUE_URL".to_owned(), url)));
    let address = format!("127.0.0.1:{}", free_port());
    let at_address = [&settings[..], &[("FOREBAY_LISTEN".into(), address.clone())]].concat();
    let data = disk.folder().join("data");
    let fleet = Fleet {
        url: format!("http://{address}/"),
        devices: 20,
        per_minute: 120,
        seconds: 5,
        photo_bytes: 10_000,
        ledger: folder.path().join("devices.ledger"),
    };
    let mut program = Program::start(role, &at_address, &data).await;
    let all_sent = Cell::new(false);
    let sending = async {
        fleet.run().await;
        all_sent.set(true);
    };
    let cutting = async {
        for _ in 0..3 {
            let before = fleet.acknowledged();
            // on a slow machine the last ones may have come while the disk was away
            let a_few = || fleet.acknowledged() > before + 15 || all_sent.get();
            eventually("a few acknowledgements", async || a_few().then_some(())).await;
            disk.shut_down();
            drop(program); // SIGKILL
            disk.remount();
            program = Program::start(role, &at_address, &data).await;
        }
        program
    };
    let (_, program) = tokio::join!(sending, cutting);
    rebuild(&settings, &data).await;
    let drain = if role == "serve" { program } else { Program::start("drain", &settings, &data).await };
    fleet.agrees_with(&drain, &settings, &data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_the_power_goes_under_serve() {
    tokio::join!(
        nothing_acknowledged_is_lost_by_power_cuts(Disk::ext4(EXT4_BYTES), "serve", None),
        nothing_acknowledged_is_lost_by_power_cuts(Disk::xfs(XFS_BYTES), "serve", None),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_the_power_goes_under_ingest_on_postgres() {
    let url = || async { Some(tokio::task::spawn_blocking(postgres::database).await.unwrap()) };
    tokio::join!(
        nothing_acknowledged_is_lost_by_power_cuts(Disk::ext4(EXT4_BYTES), "ingest", url().await),
        nothing_acknowledged_is_lost_by_power_cuts(Disk::xfs(XFS_BYTES), "ingest", url().await),
    );
}

/// What is set aside but never written would lie where the disk is to have its last room.
fn give_up_ballast(data: &Path) {
    std::fs::remove_file(data.join("spool/ballast")).unwrap();
}

/// Which fails to do `what` with photos that come slowly, or at once.
async fn a_disk_that_failed_is_given_nothing_more(what: &str, slowly: bool) {
    let disk = Disk::ext4(EXT4_BYTES);
    let spool = open(disk.folder());
    give_up_ballast(&disk.folder().join("data"));
    disk.ends_after(500_000);
    let mut stored = 0;
    let failed = loop {
        let (photo, upload) = (photo(stored), upload_of(&photo(stored), &stored.to_string()));
        let coming = if slowly { come_slowly(&spool, &photo).await } else { Unfinished::from(photo) };
        match spool.store(upload, coming).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 100, "the disk does not hold so many photos, and none was refused");
    };
    assert!(matches!(&failed, Error::Unavailable(why) if why.contains(&format!("failed to {what}"))), "{failed:?}");
    assert!(stored > 0);
    assert_eq!(spool.check_fault(), Err(failed.clone()));
    assert_eq!(spool.admit(0), Err(failed.clone()));
    assert_eq!(spool.store(upload_of(&photo(100), "100"), photo(100)).await, Err(failed.clone()));
    assert_eq!(spool.journal(upload_of(&photo(0), "0")).await, Err(failed));
    drop(spool);
    disk.remount();
    let spool = open(disk.folder());
    for number in 0..stored {
        is_there(&spool, number).await;
    }
    let mut photos = 0;
    spool.walk(|_, _| photos += 1).unwrap();
    assert_eq!(photos, stored, "and nothing else is");
}

#[tokio::test]
async fn a_disk_that_failed_a_sync_is_given_nothing_more_and_what_was_stored_before_is_there() {
    a_disk_that_failed_is_given_nothing_more("sync", true).await;
}

#[tokio::test]
async fn a_disk_that_failed_a_write_is_given_nothing_more_and_what_was_stored_before_is_there() {
    a_disk_that_failed_is_given_nothing_more("write", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_a_disk_that_failed_a_write_are_sent_away_and_readiness_says_why() {
    let disk = Disk::ext4(EXT4_BYTES);
    let data = disk.folder().join("data");
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let program = Program::start("ingest", &[("FOREBAY_QUEUE_URL".into(), url)], &data).await;
    give_up_ballast(&data);
    disk.ends_after(500_000);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let post = async |number: usize| {
        let body = json_upload("cam-1", None, &photo(number)).to_string();
        let request = client.post(&program.url).header("content-type", "application/json").body(body);
        Answer::of(request.send().await.unwrap()).await
    };
    let mut acknowledged = BTreeSet::new();
    let refused = loop {
        let answer = post(acknowledged.len()).await;
        if answer.status != 201 {
            break answer;
        }
        acknowledged.insert(answer.body["id"].as_str().unwrap().to_owned());
        assert!(acknowledged.len() < 100, "the disk does not hold so many photos, and none was refused");
    };
    for refused in [refused, post(100).await] {
        assert_eq!((refused.status, refused.problem()), (503, "unavailable"), "{refused:?}");
        assert!((5..=10).contains(&refused.retry_after.unwrap()), "{refused:?}");
    }
    let ready = Answer::of(client.get(format!("{}/readyz", program.url)).send().await.unwrap()).await;
    assert_eq!((ready.status, ready.problem()), (503, "unavailable"), "{ready:?}");
    assert!(ready.body["detail"].as_str().unwrap().contains("failed to write"), "{ready:?}");
    drop(program);
    disk.remount();
    let spool = open(disk.folder());
    let mut there = BTreeSet::new();
    for upload in records(&spool) {
        spool.read(upload.clone()).await.unwrap();
        there.insert(upload.id.to_string());
    }
    assert_eq!(there, acknowledged);
}

fn records(spool: &Spool) -> Vec<Arc<Upload>> {
    let mut records = Vec::new();
    spool.walk(|_, record| records.push(Arc::new(record.unwrap()))).unwrap();
    records
}

#[tokio::test]
async fn a_photo_that_finds_no_room_leaves_nothing_behind_and_the_disk_is_trusted_still() {
    let disk = Disk::ext4(EXT4_BYTES);
    let spool = open(disk.folder());
    fill(&disk, 500_000);
    let mut stored = 0;
    let failed = loop {
        match spool.store(upload_of(&photo(stored), &stored.to_string()), photo(stored)).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(failed, Error::Full("the disk is full".to_owned()));
    assert_eq!((spool.check_fault(), spool.incoming_count()), (Ok(()), Ok(0)));
    spool.remove(upload_of(&photo(0), "0")).await.unwrap();
    store(&spool, stored).await;
    for number in 1..=stored {
        is_there(&spool, number).await;
    }
}

/// Takes all of the disk but `left` bytes.
fn fill(disk: &Disk, left: u64) {
    let free = rustix::fs::statvfs(disk.folder()).map(|stat| stat.f_bavail * stat.f_frsize).unwrap();
    let filler = File::create(disk.folder().join("another program's")).unwrap();
    rustix::fs::fallocate(filler, FallocateFlags::empty(), 0, free - left).unwrap();
}

/// A site whose spool is on `disk`, and its queue too, unless it has one elsewhere.
async fn site_on(disk: &Disk, reserve: &str, queue: &str) -> Site {
    let data = disk.folder().join("data").display().to_string();
    Site::start(&[("data-dir", &data), ("spool-reserve", reserve), ("queue-url", queue)]).await
}

fn large_photo(number: usize) -> Vec<u8> {
    [photo(number), vec![0; 80_000]].concat()
}

/// Photos at once until one is refused for want of room; what was acknowledged is whole, on disk and at last in the bucket,
/// and there is room again once it is.
async fn a_full_disk_takes_photos_again_when_it_is_drained(site: &Site, why: &[&str]) {
    let mut acknowledged = Vec::new();
    let mut refused = 0;
    while refused == 0 {
        let from = acknowledged.len();
        let bodies = (from..from + 30).map(|number| json_upload("cam-1", None, &large_photo(number)).to_string());
        for answer in futures_util::future::join_all(bodies.map(|body| site.post_json(body))).await {
            if answer.status == 201 {
                acknowledged.push(answer.body["id"].as_str().unwrap().parse::<UploadId>().unwrap());
                continue;
            }
            refused += 1;
            assert_eq!((answer.status, answer.problem()), (503, "spool-full"), "{answer:?}");
            assert!((30..=60).contains(&answer.retry_after.unwrap()), "{answer:?}");
            let detail = answer.body["detail"].as_str().unwrap();
            assert!(why.iter().any(|why| detail.contains(why)), "{answer:?}");
        }
    }
    let kept = records(&site.spool);
    assert_eq!((kept.len(), site.files().await.1), (acknowledged.len(), 0), "and nothing of those that were refused");
    for upload in &kept {
        assert!(acknowledged.contains(&upload.id));
        site.spool.read(upload.clone()).await.unwrap();
    }

    let (_s3, bucket) = site.bucket().await;
    let (_pouring, _keeping) = (pour(site, &bucket, FAST), keep_house(site));
    eventually("a photo to be accepted again", async || {
        let answer = site.post_json(json_upload("cam-1", None, &large_photo(0)).to_string()).await;
        (answer.status == 201).then_some(())
    })
    .await;
    eventually("all photos to be uploaded and removed", async || (site.files().await == (0, 0)).then_some(())).await;
    for upload in kept {
        let object = bucket.read_back(&upload.object_key).await.unwrap();
        assert_eq!(object, Some((upload.size_bytes, upload.sha256)));
    }
}

#[tokio::test]
async fn a_disk_without_room_takes_photos_again_when_it_is_drained() {
    let disk = Disk::ext4(EXT4_BYTES);
    let site = site_on(&disk, "5%", "sqlite").await;
    // SQLite's log takes 4 MB of it
    fill(&disk, 9_000_000);
    a_full_disk_takes_photos_again_when_it_is_drained(&site, &["are free on the disk"]).await;
}

#[tokio::test]
async fn a_disk_that_is_full_to_the_last_byte_takes_photos_again_when_it_is_drained() {
    let disk = Disk::ext4(EXT4_BYTES);
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let site = site_on(&disk, "0%", &url).await;
    fill(&disk, 1_000_000);
    let why = ["the disk is full", "are free on the disk"];
    a_full_disk_takes_photos_again_when_it_is_drained(&site, &why).await;
}

#[tokio::test]
async fn a_disk_with_the_queue_on_it_that_is_full_to_the_last_byte_takes_photos_again_when_it_is_drained() {
    let disk = Disk::ext4(EXT4_BYTES);
    let site = site_on(&disk, "0%", "sqlite").await;
    // more than SQLite's log grows by, which it does not give back: what is then left beside the ballast must hold a photo
    fill(&disk, 4_000_000);
    let why = ["the disk is full", "are free on the disk"];
    a_full_disk_takes_photos_again_when_it_is_drained(&site, &why).await;
}

#[tokio::test]
async fn a_disk_without_inodes_takes_photos_again_when_it_is_drained() {
    let disk = Disk::ext4_of_inodes(EXT4_BYTES, 320);
    let site = site_on(&disk, "5%", "sqlite").await;
    a_full_disk_takes_photos_again_when_it_is_drained(&site, &["inodes are free on the disk"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_disk_with_few_inodes_no_more_is_usable_than_they_are_enough_for() {
    let disk = Disk::ext4_of_inodes(EXT4_BYTES, 320);
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let settings = [("FOREBAY_QUEUE_URL".into(), url)];
    let program = Program::start("ingest", &settings, &disk.folder().join("data")).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let (photo, json) = (photo(1), "application/json");
    let body = json_upload("cam-1", None, &photo).to_string();
    let answer = client.post(&program.url).header("content-type", json).body(body).send().await.unwrap();
    assert_eq!(answer.status(), 201);
    let photos = eventually("the books to know of a photo", async || {
        let status = client.get(format!("{}/status", program.console)).send().await.unwrap();
        let spool = serde_json::from_slice::<Value>(&status.bytes().await.unwrap()).unwrap()["spool"].take();
        let held = spool["held_bytes"].as_u64().unwrap() > 0;
        held.then(|| spool["usable_bytes"].as_u64().unwrap() / photo.len() as u64)
    });
    // two hundred and sixty are the spool's own folders
    let photos = photos.await;
    assert!((1..=60).contains(&photos), "{photos}");
}

#[tokio::test]
async fn a_photo_for_which_there_is_no_room_is_refused_by_its_head_alone() {
    let disk = Disk::ext4(EXT4_BYTES);
    let site = site_on(&disk, "5%", "sqlite").await;
    site.accept("cam-1", &photo(1)).await;
    fill(&disk, 1_000_000);
    let mut stream = tokio::net::TcpStream::connect(site.url.trim_start_matches("http://")).await.unwrap();
    let head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 30000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]);
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("spool-full"), "{answer}");
    assert!(answer.contains("retry-after: "), "{answer}");
}
