//! S3 may misbehave: the environment's faults are charged to nobody, an object's own faults to that object, nothing is called
//! uploaded that is not there, and when S3 is well again the drain is at its allowance within seconds.

use std::time::{Duration, Instant};

use forebay::bucket::Bucket;
use forebay::queue::Record;
use forebay::status::Condition;
use forebay::units::{Rate, UnixMs};
use forebay::upload::State;

use crate::support::faulty_s3::{Fault, FaultyS3, Mood};
use crate::support::pouring::{FAST, in_state, paused, pour, pour_resting};
use crate::support::site::Site;
use crate::support::{eventually, photo, weed};

/// The longest way back to the allowance.
const WAY_BACK: Duration = Duration::from_secs(10);

/// A new bucket on the real server, directly and by way of a proxy that may misbehave.
async fn faulty_bucket() -> (Bucket, FaultyS3, Bucket) {
    let (direct, endpoint, name) = weed::bucket().await;
    let proxy = FaultyS3::before(&endpoint).await;
    let faulty = proxy.bucket(&name);
    (direct, proxy, faulty)
}

/// Every object is there once, with the bytes that were accepted.
async fn all_are_right(bucket: &Bucket, records: &[Record]) {
    let mut objects = 0;
    bucket.list("", |_| objects += 1).await.unwrap();
    assert_eq!(objects, records.len());
    for record in records {
        let upload = &record.upload;
        assert_eq!(bucket.read_back(&upload.object_key).await.unwrap(), Some((upload.size_bytes, upload.sha256)));
    }
}

/// Whatever the environment does to every request: no upload is charged or called uploaded, and all are, once it is over.
async fn nobody_is_charged_while_every_request_meets(fault: Fault) {
    let site = Site::start(&[]).await;
    let (direct, proxy, bucket) = faulty_bucket().await;
    let records = site.accept_photos(12).await;
    proxy.set(Mood::Always(fault));
    let mut pouring = pour(&site, &bucket, FAST);
    paused(&mut pouring).await;
    eventually("a few probes", async || (proxy.faults() >= 4).then_some(())).await;
    for record in site.records().await {
        assert_eq!((record.failures, record.state == State::Uploaded), (0, false), "{record:?}");
        assert!(site.spool.read(record.upload).await.is_ok(), "what nobody confirmed is on disk still");
    }

    proxy.set(Mood::Sound);
    let over = pouring.condition.wait_for(|condition| !matches!(condition, Condition::Paused { .. }));
    tokio::time::timeout(WAY_BACK, over).await.expect("the drain still pauses").unwrap();
    for record in &records {
        in_state(&site, record, State::Uploaded).await;
    }
    all_are_right(&direct, &records).await;
}

macro_rules! faults_of_the_environment {
    ($($name:ident: $fault:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                nobody_is_charged_while_every_request_meets(Fault::$fault).await;
            }
        )*

        #[test]
        fn every_fault_of_the_environment_has_a_test() {
            assert_eq!([$(Fault::$fault),*], Fault::OF_THE_ENVIRONMENT);
        }
    };
}

faults_of_the_environment! {
    nobody_is_charged_while_s3_cannot_be_reached: Unreachable,
    nobody_is_charged_while_s3_asks_to_slow_down: SlowDown,
    nobody_is_charged_while_s3_has_internal_errors: InternalError,
    nobody_is_charged_while_the_credentials_are_expired: ExpiredToken,
    nobody_is_charged_while_the_bucket_is_missing: NoSuchBucket,
    nobody_is_charged_while_the_clock_is_off: ClockSkewed,
    nobody_is_charged_while_connections_break_in_the_body: ResetInBody,
    nobody_is_charged_while_s3_hangs: Hang,
    nobody_is_charged_while_answers_are_cut_off: TruncatedAnswer,
    nobody_is_charged_while_answers_are_lost: AnswerLost,
    nobody_is_charged_while_s3_says_ok_with_an_error: OkWithErrorBody,
    nobody_is_charged_while_a_captive_portal_answers: CaptivePortal,
}

/// The photo whose bytes S3 has wrong is tried again, then set aside; the others pass.
async fn only_the_upload_itself_is_charged_for(fault: Fault) {
    let site = Site::start(&[("s3-key", "{device}/{id}")]).await;
    let (direct, proxy, bucket) = faulty_bucket().await;
    let wrong = site.accept("wrong", &photo(0)).await;
    let sound = site.accept_photos(4).await;
    proxy.set(Mood::ForKeysWith("/wrong/", fault));
    let pouring = pour(&site, &bucket, FAST);
    let dead = in_state(&site, &wrong, State::Dead).await;
    assert_eq!(dead.failures, 5);
    assert!(dead.reason.is_some());
    for record in &sound {
        assert_eq!(in_state(&site, record, State::Uploaded).await.failures, 0);
        let upload = &record.upload;
        assert_eq!(direct.read_back(&upload.object_key).await.unwrap(), Some((upload.size_bytes, upload.sha256)));
    }
    assert!(!matches!(*pouring.condition.borrow(), Condition::Paused { .. }), "one photo does not stop the drain");
    assert!(site.spool.read(wrong.upload.clone()).await.is_ok(), "an operator decides what becomes of the photo");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_that_is_changed_on_its_way_is_refused_by_s3_and_charged() {
    only_the_upload_itself_is_charged_for(Fault::BodyCorrupted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_whose_checksum_s3_confirms_wrongly_is_charged() {
    only_the_upload_itself_is_charged_for(Fault::WrongChecksum).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_whose_etag_is_wrong_is_charged() {
    only_the_upload_itself_is_charged_for(Fault::WrongEtag).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_lost_sends_no_photo_twice() {
    let site = Site::start(&[]).await;
    let (direct, proxy, bucket) = faulty_bucket().await;
    let records = site.accept_photos(1).await;
    proxy.set(Mood::Always(Fault::AnswerLost));
    let mut pouring = pour(&site, &bucket, FAST);
    paused(&mut pouring).await;
    let sent = proxy.body_bytes();
    assert_eq!(sent, records[0].upload.size_bytes);
    proxy.set(Mood::Sound);
    in_state(&site, &records[0], State::Uploaded).await;
    assert_eq!(proxy.body_bytes(), sent, "the second attempt found it there");
    all_are_right(&direct, &records).await;
}

/// With a backlog, and after everything on its way hung or broke: seconds until a second's worth of the allowance flows.
async fn the_allowance_flows_again_after(fault: Fault) {
    let site = Site::start(&[]).await;
    let (_direct, proxy, bucket) = faulty_bucket().await;
    site.accept_photos(150).await;
    let allowance = 200_000;
    let mut pouring = pour(&site, &bucket, Rate(allowance));
    eventually("photos to flow", async || (proxy.body_bytes() > 100_000).then_some(())).await;
    proxy.set(Mood::Always(fault));
    paused(&mut pouring).await;
    eventually("a few probes", async || (proxy.faults() >= 10).then_some(())).await;

    proxy.set(Mood::Sound);
    let healed = Instant::now();
    let mut seen = proxy.body_bytes();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = proxy.body_bytes();
        if now - seen >= allowance * 8 / 10 {
            break;
        }
        seen = now;
        assert!(
            healed.elapsed() < WAY_BACK,
            "the drain is not at its allowance {:?} after S3 is back",
            healed.elapsed()
        );
    }
    assert!(site.records().await.iter().all(|record| record.failures == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_allowance_flows_again_soon_after_s3_hung() {
    the_allowance_flows_again_after(Fault::Hang).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_allowance_flows_again_soon_after_s3_was_unreachable() {
    the_allowance_flows_again_after(Fault::Unreachable).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn single_faults_among_many_uploads_do_not_stop_the_drain() {
    let site = Site::start(&[]).await;
    let (direct, proxy, bucket) = faulty_bucket().await;
    let records = site.accept_photos(60).await;
    let mut faults = Fault::OF_THE_ENVIRONMENT.to_vec();
    faults.extend(Fault::OF_THE_DATA);
    proxy.set(Mood::Share(0.3, faults));
    let _pouring = pour(&site, &bucket, FAST);
    for record in &records {
        in_state(&site, record, State::Uploaded).await;
    }
    assert!(proxy.faults() > 10, "{} faults", proxy.faults());
    all_are_right(&direct, &records).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_that_land_count_against_faults_before_the_queue_has_heard_of_them() {
    let site = Site::start(&[("s3-key", "{device}/{id}")]).await;
    let (_direct, proxy, bucket) = faulty_bucket().await;
    let mut records = Vec::new();
    for number in 0..60 {
        // devices take turns, so that every fifth is at fault
        let device = if number % 5 == 0 { "wrong" } else { &format!("cam-{}", number % 5) };
        records.push(site.accept(device, &photo(number)).await);
    }
    proxy.set(Mood::ForKeysWith("/wrong/", Fault::InternalError));
    let mut pouring = pour(&site, &bucket, FAST);
    let row_of_faults = |condition: &Condition| match condition {
        // a store that stalls is another matter
        Condition::Paused { reason, .. } => !reason.contains("nothing moves"),
        _ => false,
    };
    let paused = tokio::spawn(async move { pouring.condition.wait_for(row_of_faults).await.is_ok() });
    eventually("each that is at fault has failed", async || (proxy.faults() >= 12).then_some(())).await;
    proxy.set(Mood::Sound);
    for record in &records {
        in_state(&site, record, State::Uploaded).await;
    }
    assert!(!paused.is_finished(), "the drain paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_never_pass_do_not_keep_an_outage_from_ending() {
    let site = Site::start(&[("s3-key", "{device}/{id}")]).await;
    let (_direct, proxy, bucket) = faulty_bucket().await;
    for number in 0..3 {
        site.accept("wrong", &photo(number)).await; // the oldest, so the first to be claimed
    }
    let sound = site.accept_photos(5).await;
    proxy.set(Mood::Always(Fault::Unreachable));
    let mut pouring = pour(&site, &bucket, FAST);
    paused(&mut pouring).await;
    proxy.set(Mood::ForKeysWith("/wrong/", Fault::InternalError));
    for record in &sound {
        in_state(&site, record, State::Uploaded).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_every_photo_is_changed_on_its_way_it_is_not_the_photos() {
    let site = Site::start(&[]).await;
    let (direct, proxy, bucket) = faulty_bucket().await;
    let records = site.accept_photos(12).await;
    proxy.set(Mood::Always(Fault::BodyCorrupted));
    let mut pouring = pour_resting(&site, &bucket, FAST, Duration::from_secs(2));
    assert!(paused(&mut pouring).await.in_words(UnixMs::now()).contains("every upload is refused"));
    eventually("a few probes", async || (proxy.faults() >= 20).then_some(())).await;
    assert!(site.records().await.iter().all(|record| record.state != State::Dead));
    proxy.set(Mood::Sound);
    for record in &records {
        in_state(&site, record, State::Uploaded).await;
    }
    all_are_right(&direct, &records).await;
}
