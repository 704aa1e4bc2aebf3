//! When the disk is full: devices are refused, or queued photos are given up by the policy that is set, each with a tombstone.

use std::path::Path;
use std::time::Duration;

use forebay::bucket::Bucket;
use forebay::embedded_s3::EmbeddedS3;
use forebay::units::UnixMs;
use serde_json::Value;

use crate::support::agreement::{backlog_gone, disk_empty, everything_agrees, status};
use crate::support::fleet::Fleet;
use crate::support::pouring::keep_house;
use crate::support::program::{Program, s3_settings};
use crate::support::site::{Answer, Site};
use crate::support::{eventually, free_port, json_upload, photo};

/// Room for some two hundred photos of the fleet.
const SPOOL_MAX: &str = "4MB";

fn set(settings: &[(String, String)], more: &[(&str, &str)]) -> Vec<(String, String)> {
    let more = more.iter().map(|(name, text)| (name.to_string(), text.to_string()));
    settings.iter().cloned().chain(more).collect()
}

/// What a fleet has sent that has half as much again as the spool may hold.
async fn more_than_fits(program: &Program, folder: &Path) -> Fleet {
    let fleet = Fleet {
        url: format!("{}/", program.url),
        devices: 20,
        per_minute: 60,
        seconds: 15,
        photo_bytes: 20_000,
        ledger: folder.join("devices.ledger"),
    };
    fleet.send().await;
    fleet
}

/// When a status was taken.
fn at(status: &Value) -> UnixMs {
    serde_json::from_value(status["at"].clone()).unwrap()
}

fn uploads(status: &Value, state: &str) -> i64 {
    status["books"][state]["uploads"].as_i64().unwrap()
}

/// A fleet pours in half as much again as the spool may hold while S3 cannot be reached: everybody is told yes, what did not fit is
/// accounted for, and what was kept is uploaded when S3 is back.
async fn everything_is_accepted_and_accounted_for(policy: &str) {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let s3 = EmbeddedS3::start(&folder.path().join("s3")).await.unwrap();
    Bucket::at(s3.endpoint(), "photos").create().await.unwrap();
    let settings = s3_settings(s3.endpoint(), "photos");
    let settings = set(&settings, &[("FOREBAY_SPOOL_MAX", SPOOL_MAX), ("FOREBAY_SPOOL_FULL", policy)]);
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let cut_off = set(&settings, &[("AWS_ENDPOINT_URL_S3", &nowhere)]);
    let program = Program::start("serve", &cut_off, &data).await;
    let fleet = more_than_fits(&program, folder.path()).await;
    let acknowledged = fleet.acknowledged() as i64;

    let shown = eventually("the books to say what was shed", async || {
        let status = status(&program).await;
        (uploads(&status, "accepted") == acknowledged && uploads(&status, "shed") > 0).then_some(status)
    })
    .await;
    let stands = ["queued", "uploading", "uploaded", "dead", "shed"].map(|state| uploads(&shown, state));
    assert_eq!(stands.iter().sum::<i64>(), acknowledged, "{shown}");
    let (queued, lost) = (stands[0] + stands[1], stands[4]);
    assert!(queued >= 50 && lost >= 50 && queued + lost == acknowledged, "{shown}");
    assert_eq!((&shown["shed"]["policy"], shown["shed"]["most"].as_array().unwrap().len()), (&policy.into(), 5));
    let warned = program.log().iter().any(|line| line["message"].as_str().unwrap_or("").contains("given up"));
    assert!(warned, "never silently");
    assert!(program.terminate().await);

    let program = Program::start("serve", &settings, &data).await;
    backlog_gone(&program, &data).await;
    disk_empty(&data).await;
    let report = everything_agrees(&settings, &data, &fleet.ledger.display().to_string()).await;
    let (verified, shed) = (report["verified"].as_i64().unwrap(), report["shed"].as_i64().unwrap());
    assert_eq!((verified + shed, report["acknowledged"].as_i64().unwrap()), (acknowledged, acknowledged), "{report}");
    assert!(shed >= lost, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_accepted_and_accounted_for_when_the_oldest_are_shed() {
    everything_is_accepted_and_accounted_for("shed-oldest").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_accepted_and_accounted_for_when_devices_are_thinned() {
    everything_is_accepted_and_accounted_for("thin").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_bucket_already_gives_way_before_anything_is_shed() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let s3 = EmbeddedS3::start(&folder.path().join("s3")).await.unwrap();
    Bucket::at(s3.endpoint(), "photos").create().await.unwrap();
    let settings = s3_settings(s3.endpoint(), "photos");
    let policy = [("FOREBAY_SPOOL_MAX", SPOOL_MAX), ("FOREBAY_SPOOL_FULL", "thin"), ("FOREBAY_RETAIN", "1d")];
    let settings = set(&settings, &policy);
    let program = Program::start("serve", &settings, &data).await;
    let fleet = more_than_fits(&program, folder.path()).await;
    let acknowledged = fleet.acknowledged() as i64;
    assert!(acknowledged * 20_000 > 4_000_000, "more than the spool may hold");
    let shown = eventually("everything to be uploaded", async || {
        let status = status(&program).await;
        (uploads(&status, "uploaded") == acknowledged).then_some(status)
    })
    .await;
    assert_eq!(uploads(&shown, "shed"), 0, "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_shed_while_the_photos_disk_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let s3 = EmbeddedS3::start(&folder.path().join("s3")).await.unwrap();
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let settings = set(&s3_settings(s3.endpoint(), "photos"), &[("AWS_ENDPOINT_URL_S3", &nowhere)]);
    let program = Program::start("serve", &settings, &data).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for number in 0..50 {
        let body = json_upload("cam-1", None, &photo(number)).to_string();
        let request = client.post(&program.url).header("content-type", "application/json").body(body);
        assert_eq!(request.send().await.unwrap().status(), 201);
    }
    assert!(program.terminate().await);

    let (spool, elsewhere) = (data.join("spool"), data.join("elsewhere"));
    std::fs::rename(&spool, &elsewhere).unwrap();
    let no_room = set(&settings, &[("FOREBAY_SPOOL_MAX", "200kB"), ("FOREBAY_SPOOL_FULL", "shed-oldest")]);
    let program = Program::start("serve", &no_room, &data).await;
    let first = eventually("the drain to say what is wrong", async || {
        let status = status(&program).await;
        let reason = status["drain"]["condition"]["reason"].as_str().unwrap_or("");
        reason.contains("is its disk mounted?").then_some(status)
    })
    .await;
    let looked = eventually("the keeper to have looked at the room, each second", async || {
        let status = status(&program).await;
        (at(&status).since(at(&first)) > Duration::from_secs(5)).then_some(status)
    })
    .await;
    assert_eq!((uploads(&looked, "queued") + uploads(&looked, "uploading"), uploads(&looked, "shed")), (50, 0));
    assert!(program.terminate().await);

    std::fs::remove_dir_all(&spool).unwrap();
    std::fs::rename(&elsewhere, &spool).unwrap();
    let program = Program::start("serve", &no_room, &data).await;
    eventually("what makes room to be shed", async || (uploads(&status(&program).await, "shed") > 0).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_refused_when_nothing_may_be_shed() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let settings = set(
        &[],
        &[
            ("FOREBAY_SPOOL_MAX", "200kB"),
            ("FOREBAY_S3_BUCKET", "photos"),
            ("AWS_ENDPOINT_URL_S3", &nowhere),
            ("AWS_ACCESS_KEY_ID", "any"),
            ("AWS_SECRET_ACCESS_KEY", "any"),
            ("AWS_REGION", "us-east-1"),
        ],
    );
    let program = Program::start("serve", &settings, &folder.path().join("data")).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut acknowledged = 0;
    let refused = loop {
        let body = json_upload("cam-1", None, &photo(acknowledged)).to_string();
        let request = client.post(&program.url).header("content-type", "application/json").body(body);
        let answer = Answer::of(request.send().await.unwrap()).await;
        if answer.status != 201 {
            break answer;
        }
        acknowledged += 1;
        assert!(acknowledged < 50, "the spool takes more than it may hold");
    };
    assert_eq!((refused.status, refused.problem()), (503, "spool-full"));
    // the keeper has looked by then
    eventually("two more snapshots", async || {
        let status = status(&program).await;
        (uploads(&status, "accepted") == acknowledged as i64).then_some(())
    })
    .await;
    assert_eq!(uploads(&status(&program).await, "shed"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shed_photo_that_is_sent_again_is_answered_with_the_truth_and_leaves_nothing_behind() {
    let site = Site::start(&[]).await;
    let send = async |number| site.post_json(json_upload("cam-1", Some("1"), &photo(number)).to_string()).await;
    assert_eq!(send(1).await.status, 201);
    assert_eq!(site.queue.shed_oldest(1, 10).await.unwrap().len(), 1);

    let again = send(1).await;
    assert_eq!((again.status, &again.body["state"]), (200, &"shed".into()), "while its photo is still on disk");
    let keeper = keep_house(&site);
    eventually("the photo to be removed", async || (site.files().await == (0, 0)).then_some(())).await;
    eventually("its record to say so", async || site.records().await[0].removed_at).await;
    drop(keeper);
    let again = send(1).await;
    assert_eq!((again.status, &again.body["state"]), (200, &"shed".into()));
    assert_eq!(send(2).await.problem(), "upload-id-reused");
    assert_eq!(site.files().await, (0, 0));
    assert_eq!(site.records().await.len(), 1);

    let image = site.client.get(format!("{}/v1/uploads/{}/image", site.url, again.body["id"].as_str().unwrap()));
    let image = Answer::of(image.send().await.unwrap()).await;
    assert!(image.status == 404 && image.body["detail"].as_str().unwrap().contains("given up"), "{image:?}");
}
