//! Real disks at their worst: the power goes, a sync fails, there is no room. What was acknowledged is there afterwards, and
//! what cannot be kept is refused.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use forebay::error::Error;
use forebay::spool::{Spool, Stored};
use forebay::upload::Upload;

use crate::support::disk::Disk;
use crate::support::fleet::{Fleet, rebuild};
use crate::support::program::{Program, s3_settings};
use crate::support::site::Answer;
use crate::support::{NO_LIMITS, eventually, free_port, json_upload, photo, postgres, upload_of, weed};

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

async fn what_was_stored_survives_a_power_cut(disk: Disk) {
    let mut spool = open(disk.folder());
    // one by one, since the sync of a later photo may make an earlier one durable
    for number in 0..5 {
        store(&spool, number).await;
        spool = after_a_power_cut(&disk, spool);
        is_there(&spool, number).await;
    }
    futures_util::future::join_all((5..25).map(|number| store(&spool, number))).await;
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
    let cutting = async {
        for _ in 0..3 {
            let before = fleet.acknowledged();
            eventually("a few acknowledgements", async || (fleet.acknowledged() > before + 15).then_some(())).await;
            disk.shut_down();
            drop(program); // SIGKILL
            disk.remount();
            program = Program::start(role, &at_address, &data).await;
        }
        program
    };
    let (_, program) = tokio::join!(fleet.send(), cutting);
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

#[tokio::test]
async fn a_disk_that_failed_a_sync_is_given_nothing_more_and_what_was_stored_before_is_there() {
    let disk = Disk::ext4(EXT4_BYTES);
    let spool = open(disk.folder());
    disk.ends_after(500_000);
    let mut stored = 0;
    let failed = loop {
        let upload = upload_of(&photo(stored), &stored.to_string());
        match spool.store(upload, photo(stored)).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 100, "the disk does not hold so many photos, and none was refused");
    };
    assert!(matches!(&failed, Error::Unavailable(why) if why.contains("failed to sync")), "{failed:?}");
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

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_a_disk_that_failed_a_sync_are_sent_away_and_readiness_says_why() {
    let disk = Disk::ext4(EXT4_BYTES);
    let data = disk.folder().join("data");
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let program = Program::start("ingest", &[("FOREBAY_QUEUE_URL".into(), url)], &data).await;
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
    assert!(ready.body["detail"].as_str().unwrap().contains("failed to sync"), "{ready:?}");
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
