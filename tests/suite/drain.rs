//! The way out: what is accepted ends in the bucket, paced; what goes wrong is charged to whom it belongs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use axum::response::IntoResponse;
use forebay::audit::{Depth, Subjects, audit};
use forebay::bucket::{Bucket, Object};
use forebay::config::Endpoint;
use forebay::drain::Drain;
use forebay::fleet::photo::Camera;
use forebay::pacer::{Pacer, Turn};
use forebay::queue::Pick;
use forebay::status::Condition;
use forebay::units::{Rate, UnixMs};
use forebay::upload::{Sha256, State};
use sqlx::{Connection, SqliteConnection};
use tokio_util::sync::CancellationToken;

use crate::support::pouring::{FAST, Pouring, in_state, keep_house, paused, pour};
use crate::support::site::Site;
use crate::support::{eventually, json_upload, photo, weed};

#[tokio::test]
async fn an_accepted_photo_ends_as_one_object_with_its_bytes() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let record = site.accept("cam-1", &photo(1)).await;
    let _pouring = pour(&site, &bucket, FAST);
    in_state(&site, &record, State::Uploaded).await;
    let upload = &record.upload;
    assert_eq!(bucket.read_back(&upload.object_key).await.unwrap(), Some((upload.size_bytes, upload.sha256)));
    let mut objects = Vec::new();
    bucket.list("", |object| objects.push(object.key)).await.unwrap();
    assert_eq!(objects, std::slice::from_ref(&upload.object_key));
}

#[tokio::test]
async fn what_leaves_is_paid_for_and_never_above_the_allowance() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let records = site.accept_photos(30).await;
    let allowance = 300_000;
    let began = Instant::now();
    let pouring = pour(&site, &bucket, Rate(allowance));
    for record in &records {
        in_state(&site, record, State::Uploaded).await;
        let most = began.elapsed().as_secs_f64() * allowance as f64;
        let paid = pouring.pacer.paid_bytes() as f64;
        assert!(paid <= most, "{paid} bytes were paid for when {most} were allowed");
    }
    let photos: u64 = records.iter().map(|r| r.upload.size_bytes).sum();
    let paid = pouring.pacer.paid_bytes();
    // a header on each small packet, a request's head for each photo, and what a busy machine's kernel sends again
    let most = photos + photos / 20 + 30 * 3_000;
    assert!(paid > photos && paid < most, "{paid} bytes were paid for {photos} bytes of photos");
}

/// A drain that has claimed more than are on their way or have just landed. Nobody is there to queue again what runs out.
async fn claiming_ahead(site: &Site, bucket: &Bucket) -> Pouring {
    for n in 0..150 {
        site.accept("cam-1", &photo(n)).await;
    }
    // twenty a second
    let pouring = pour(site, bucket, Rate(400_000));
    eventually("a claim ahead", async || (site.queue.books().await.unwrap().uploading.uploads > 24).then_some(()))
        .await;
    pouring
}

async fn all_given_back(site: &Site) {
    eventually("all leases to be given back", async || {
        (site.queue.books().await.unwrap().uploading.uploads == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_was_claimed_ahead_goes_back_to_the_queue_when_the_drain_pauses() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let pouring = claiming_ahead(&site, &bucket).await;
    pouring.pacer.set_allowance(None);
    all_given_back(&site).await;
}

#[tokio::test]
async fn what_was_claimed_ahead_goes_back_to_the_queue_when_the_drain_stops() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    drop(claiming_ahead(&site, &bucket).await);
    all_given_back(&site).await;
}

#[tokio::test]
async fn an_uploaded_photo_leaves_the_disk() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let record = site.accept("cam-1", &photo(1)).await;
    let _pouring = pour(&site, &bucket, FAST);
    let _keeping = keep_house(&site);
    let removed = eventually("the photo to be removed", async || {
        site.queue.get(record.upload.id).await.unwrap().filter(|r| r.removed_at.is_some())
    })
    .await;
    assert_eq!(removed.state, State::Uploaded);
    assert_eq!(site.files().await, (0, 0));
}

#[tokio::test]
async fn an_uploaded_photo_stays_while_it_is_to_be_retained() {
    let site = Site::start(&[("retain", "1h")]).await;
    let (_s3, bucket) = site.bucket().await;
    let record = site.accept("cam-1", &photo(1)).await;
    let _pouring = pour(&site, &bucket, FAST);
    in_state(&site, &record, State::Uploaded).await;
    assert_eq!(site.queue.removable(site.config.retain, 10).await.unwrap(), []);
    assert_eq!(site.files().await, (1, 0));
}

#[tokio::test]
async fn books_that_are_wrong_are_told_of() {
    let site = Site::start(&[]).await;
    site.accept_photos(2).await;
    let subjects = Subjects { queue: &site.queue, spool: &site.spool, bucket: None, ledger: None };
    let right = audit(&subjects, Depth::Names, |_| {}).await.unwrap();
    assert!(right.agrees() && right.books_compared, "{right:?}");
    let queue = format!("sqlite:{}", site.config.data_dir.join("queue.sqlite").display());
    let mut queue = SqliteConnection::connect(&queue).await.unwrap();
    sqlx::query("UPDATE books SET uploads = uploads + 1").execute(&mut queue).await.unwrap();
    let wrong = audit(&subjects, Depth::Names, |_| {}).await.unwrap();
    assert!(
        wrong.books_compared && wrong.disagreements == 1 && wrong.shown[0].starts_with("the books say"),
        "{wrong:?}"
    );
}

#[tokio::test]
async fn a_photo_that_cannot_be_removed_keeps_no_other_on_the_disk() {
    let site = Site::start(&[]).await;
    let records = site.accept_photos(3).await;
    for record in &records {
        let lease = site.queue.claim("test", 1, Duration::from_secs(60), Pick::Backlog).await.unwrap().remove(0);
        site.queue.finish(&lease).await.unwrap();
        assert_eq!(lease.upload.id, record.upload.id);
    }
    // what is not a file is not removed as one
    let stuck = site.spool.path(records[0].upload.id);
    std::fs::remove_file(&stuck).unwrap();
    std::fs::create_dir(&stuck).unwrap();
    let _house = keep_house(&site);
    eventually("the others to be removed", async || (site.files().await == (1, 0)).then_some(())).await;
    let on_disk = eventually("the books to know it", async || {
        let on_disk = site.queue.books().await.unwrap().on_disk;
        (on_disk.uploads == 1).then_some(on_disk)
    });
    assert_eq!(on_disk.await.bytes as u64, records[0].upload.size_bytes);
}

#[tokio::test]
async fn a_photo_damaged_on_disk_is_set_aside_and_never_uploaded_and_the_others_go_on() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let camera = Camera::new(250_000).unwrap();
    let (small, large) = (photo(1), [2, 3].map(|number| camera.photo(number, "in several slices")));
    let mut damaged = Vec::new();
    for (photo, at) in [(&small, 5_000), (&large[0], 5_000), (&large[1], 249_000)] {
        let record = site.accept("cam-1", photo).await;
        let path = site.spool.path(record.upload.id);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        damaged.push(record);
    }
    let sound_photo = camera.photo(4, "in several slices");
    let sound = site.accept("cam-2", &sound_photo).await;
    let _pouring = pour(&site, &bucket, FAST);
    for damaged in damaged {
        let dead = in_state(&site, &damaged, State::Dead).await;
        assert!(dead.reason.unwrap().contains("damaged on disk"));
        assert_eq!(bucket.read_back(&damaged.upload.object_key).await.unwrap(), None);
    }
    in_state(&site, &sound, State::Uploaded).await;
    let held = bucket.read_back(&sound.upload.object_key).await.unwrap();
    assert_eq!(held, Some((sound_photo.len() as u64, sound.upload.sha256)));
}

#[tokio::test]
async fn a_dead_photo_that_its_device_sends_again_is_uploaded_after_all() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let body = json_upload("cam-1", Some("42"), &photo(1)).to_string();
    site.post_json(body.clone()).await;
    let record = site.records().await.remove(0);
    let path = site.spool.path(record.upload.id);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[5_000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let _pouring = pour(&site, &bucket, FAST);
    in_state(&site, &record, State::Dead).await;
    let answer = site.post_json(body).await;
    assert_eq!((answer.status, answer.body["state"].as_str()), (200, Some("queued")), "{answer:?}");
    in_state(&site, &record, State::Uploaded).await;
    let upload = &record.upload;
    assert_eq!(bucket.read_back(&upload.object_key).await.unwrap(), Some((upload.size_bytes, upload.sha256)));
}

#[tokio::test]
async fn a_dead_upload_whose_photo_is_gone_is_a_disagreement() {
    let site = Site::start(&[]).await;
    let record = site.accept("cam-1", &photo(1)).await;
    let lease =
        site.queue.claim("drain", 1, Duration::from_secs(60), forebay::queue::Pick::Oldest).await.unwrap().remove(0);
    site.queue.charge(&lease, "refused", None).await.unwrap();
    let subjects = Subjects { queue: &site.queue, spool: &site.spool, bucket: None, ledger: None };
    assert!(audit(&subjects, Depth::Names, |_| {}).await.unwrap().agrees());
    std::fs::remove_file(site.spool.path(record.upload.id)).unwrap();
    let report = audit(&subjects, Depth::Names, |_| {}).await.unwrap();
    assert_eq!((report.dead, report.disagreements), (1, 1), "{report:?}");
}

#[tokio::test]
async fn a_photo_that_is_not_on_disk_is_set_aside_after_a_few_looks() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let record = site.accept("cam-1", &photo(1)).await;
    site.spool.remove(record.upload.clone()).await.unwrap();
    let _pouring = pour(&site, &bucket, FAST);
    let dead = in_state(&site, &record, State::Dead).await;
    assert_eq!(dead.failures, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spool_that_is_not_there_pauses_the_drain_and_charges_nobody() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let records = site.accept_photos(8).await;
    let paths: Vec<PathBuf> = records.iter().map(|record| site.spool.path(record.upload.id)).collect();
    let aside = tempfile::tempdir_in(site.config.data_dir.parent().unwrap()).unwrap();
    for path in &paths {
        std::fs::rename(path, aside.path().join(path.file_name().unwrap())).unwrap();
    }
    let mut pouring = pour(&site, &bucket, FAST);
    let paused = paused(&mut pouring).await.in_words(UnixMs::now());
    assert!(paused.contains("is its disk mounted?"), "{paused}");
    let attempts = async || site.records().await.iter().map(|record| record.attempt).sum::<i32>();
    eventually("several probes", async || (attempts().await >= 12).then_some(())).await;
    assert!(site.records().await.iter().all(|record| record.failures == 0));
    for path in &paths {
        std::fs::rename(aside.path().join(path.file_name().unwrap()), path).unwrap();
    }
    for record in &records {
        in_state(&site, record, State::Uploaded).await;
    }
}

#[tokio::test]
async fn a_later_attempt_that_finds_the_object_there_does_not_send_it_again() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let record = site.accept("cam-1", &photo(1)).await;
    let lease = site
        .queue
        .claim("drain that died", 1, Duration::from_secs(60), forebay::queue::Pick::Oldest)
        .await
        .unwrap()
        .remove(0);
    let bytes = bytes::Bytes::from(photo(1));
    let upload = &record.upload;
    let object = Object {
        key: &upload.object_key,
        content_type: upload.content_type,
        sha256: upload.sha256,
        photo: &bytes,
        turn: &Turn::default(),
    };
    bucket.put(&object).await.unwrap();
    site.queue.release(&lease, Duration::ZERO).await.unwrap();

    let pouring = pour(&site, &bucket, FAST);
    in_state(&site, &record, State::Uploaded).await;
    assert!(pouring.pacer.paid_bytes() < 2_000, "{} bytes were sent", pouring.pacer.paid_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_bucket_pauses_the_drain_and_charges_nobody() {
    let site = Site::start(&[]).await;
    let (_, endpoint, name) = weed::bucket().await;
    let bucket = Bucket::at(&endpoint, &format!("{name}-made-later"));
    let record = site.accept("cam-1", &photo(1)).await;
    let mut pouring = pour(&site, &bucket, FAST);
    let paused = paused(&mut pouring).await;
    assert!(paused.in_words(UnixMs::now()).contains("NoSuchBucket"), "{paused:?}");
    let waiting = in_state(&site, &record, State::Queued).await;
    assert_eq!(waiting.failures, 0);
    bucket.create().await.unwrap();
    in_state(&site, &record, State::Uploaded).await;
}

#[tokio::test]
async fn a_store_that_is_not_there_pauses_the_drain_and_charges_nobody() {
    let site = Site::start(&[]).await;
    let url = format!("http://127.0.0.1:{}", crate::support::free_port());
    let endpoint = Endpoint { url: url.clone(), access_key: "a".into(), secret_key: "s3cret".into() };
    let bucket = Bucket::at(&endpoint, "photos");
    let record = site.accept("cam-1", &photo(1)).await;
    let mut pouring = pour(&site, &bucket, FAST);
    let paused = paused(&mut pouring).await.in_words(UnixMs::now());
    let address = url.trim_start_matches("http://");
    assert!(paused.starts_with(&format!("PAUSED, for 0s so far: PUT {}: ", record.upload.object_key)), "{paused}");
    assert!(paused.contains(&format!("no connection to {address}: ")) && !paused.contains("s3cret"), "{paused}");
    assert_eq!(site.queue.get(record.upload.id).await.unwrap().unwrap().failures, 0);
}

/// A store that holds nothing and answers every PUT in the same way: what a sound one cannot be made to do.
async fn fake_store(status: StatusCode, code: &'static str) -> Bucket {
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", tcp.local_addr().unwrap());
    let answer = move |request: axum::extract::Request| async move {
        if request.method() == axum::http::Method::HEAD {
            return StatusCode::NOT_FOUND.into_response();
        }
        let _ = axum::body::to_bytes(request.into_body(), 1 << 24).await;
        let error = format!("<Error><Code>{code}</Code><Message>made up</Message></Error>");
        (status, if status.is_success() { String::new() } else { error }).into_response()
    };
    tokio::spawn(async move { axum::serve(tcp, axum::Router::new().fallback(answer)).await });
    Bucket::at(&Endpoint { url, access_key: "a".into(), secret_key: "s".into() }, "photos")
}

#[tokio::test]
async fn an_object_that_the_store_refuses_is_dead_after_five_failures_and_says_why() {
    let site = Site::start(&[]).await;
    let bucket = fake_store(StatusCode::BAD_REQUEST, "EntityTooLarge").await;
    let record = site.accept("cam-1", &photo(1)).await;
    let _pouring = pour(&site, &bucket, FAST);
    let dead = in_state(&site, &record, State::Dead).await;
    assert_eq!(dead.failures, 5);
    assert!(dead.reason.unwrap().contains("EntityTooLarge"));
    assert_eq!(site.files().await, (1, 0), "an operator decides what becomes of the photo");
}

#[tokio::test]
async fn a_store_that_says_success_but_confirms_nothing_is_not_believed() {
    let site = Site::start(&[]).await;
    let bucket = fake_store(StatusCode::OK, "").await;
    let record = site.accept("cam-1", &photo(1)).await;
    let _pouring = pour(&site, &bucket, FAST);
    eventually("a few attempts", async || site.queue.get(record.upload.id).await.unwrap().filter(|r| r.attempt > 2))
        .await;
    let record = site.queue.get(record.upload.id).await.unwrap().unwrap();
    assert_ne!(record.state, State::Uploaded);
    assert_eq!(site.spool.read(record.upload).await.unwrap(), photo(1), "what nobody confirmed is on disk still");
}

#[tokio::test]
async fn a_drain_that_stops_gives_its_leases_back() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let record = site.accept("cam-1", &photo(1)).await;
    let drain = Drain::new(site.spool.clone(), site.queue.clone(), bucket, Pacer::new(Rate(1_000)));
    let stop = CancellationToken::new();
    let (running, stopped) = (Arc::new(drain), stop.clone());
    let run = tokio::spawn(async move { running.run(stopped, Duration::from_millis(50)).await });
    in_state(&site, &record, State::Uploading).await;
    stop.cancel();
    run.await.unwrap();
    assert_eq!(site.queue.get(record.upload.id).await.unwrap().unwrap().state, State::Queued);
}

#[tokio::test]
async fn what_was_journaled_is_taken_into_the_queue_once() {
    let site = Site::start(&[]).await;
    let photo = photo(1);
    let upload = site.accept("cam-1", &photo).await.upload;
    let mut waiting = (*upload).clone();
    waiting.id = forebay::upload::UploadId::new();
    waiting.sha256 = Sha256::of(&photo);
    let waiting = Arc::new(waiting);
    site.spool.store(waiting.clone(), photo).await.unwrap();
    site.spool.journal(waiting.clone()).await.unwrap();
    site.spool.journal(upload.clone()).await.unwrap(); // its commit was made, only the reply was lost
    let _keeping = keep_house(&site);
    eventually("the journal to be empty", async || site.spool.journaled(10).await.unwrap().is_empty().then_some(()))
        .await;
    assert_eq!(site.records().await.len(), 2);
    assert!(site.queue.get(waiting.id).await.unwrap().is_some());
}

/// A store that takes every PUT but those under `poison/`, and forbids HEAD, as S3 does to those who may only put.
async fn put_only_store() -> Bucket {
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", tcp.local_addr().unwrap());
    let answer = |request: axum::extract::Request| async move {
        let (head, body) = request.into_parts();
        let _ = axum::body::to_bytes(body, 1 << 24).await;
        if head.method == axum::http::Method::HEAD || head.uri.path().contains("/poison/") {
            return (StatusCode::FORBIDDEN, "<Error><Code>AccessDenied</Code></Error>").into_response();
        }
        let digest = head.headers["x-amz-checksum-sha256"].clone();
        (StatusCode::OK, [("x-amz-checksum-sha256", digest)], "").into_response()
    };
    tokio::spawn(async move { axum::serve(tcp, axum::Router::new().fallback(answer)).await });
    Bucket::at(&Endpoint { url, access_key: "a".into(), secret_key: "s".into() }, "photos")
}

#[tokio::test]
async fn a_store_that_forbids_looking_does_not_stop_a_second_attempt() {
    let site = Site::start(&[]).await;
    let bucket = put_only_store().await;
    let record = site.accept("cam-1", &photo(1)).await;
    let lease = site
        .queue
        .claim("drain that died", 1, Duration::from_secs(60), forebay::queue::Pick::Oldest)
        .await
        .unwrap()
        .remove(0);
    site.queue.release(&lease, Duration::ZERO).await.unwrap();
    let _pouring = pour(&site, &bucket, FAST);
    in_state(&site, &record, State::Uploaded).await;
}

#[tokio::test]
async fn an_upload_that_never_passes_does_not_hold_up_the_others_and_is_set_aside_in_the_end() {
    let site = Site::start(&[("s3-key", "{device}/{id}")]).await;
    let bucket = put_only_store().await;
    let poison = site.accept("poison", &photo(0)).await;
    let _pouring = pour(&site, &bucket, FAST);
    let began = Instant::now();
    for number in 1.. {
        let sound = site.accept("cam-1", &photo(number)).await;
        assert_eq!(in_state(&site, &sound, State::Uploaded).await.failures, 0);
        match site.queue.get(poison.upload.id).await.unwrap().unwrap() {
            record if record.state == State::Dead => {
                return assert!(record.attempt > 10, "it may be the environment: {record:?}");
            }
            _ => assert!(began.elapsed() < 2 * crate::support::PATIENCE, "it is never set aside"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn of_two_drains_one_pours_and_the_other_takes_over() {
    let site = Site::start(&[]).await;
    let (_s3, bucket) = site.bucket().await;
    let first = pour(&site, &bucket, FAST);
    let record = site.accept("cam-1", &photo(1)).await;
    in_state(&site, &record, State::Uploaded).await;
    let mut second = pour(&site, &bucket, FAST);
    second.condition.wait_for(|condition| *condition == Condition::Standby).await.unwrap();
    let record = site.accept("cam-1", &photo(2)).await;
    in_state(&site, &record, State::Uploaded).await;
    assert_eq!(second.pacer.paid_bytes(), 0, "the allowance is one");
    drop(first);
    let record = site.accept("cam-1", &photo(3)).await;
    in_state(&site, &record, State::Uploaded).await;
    assert!(second.pacer.paid_bytes() > 0);
}
