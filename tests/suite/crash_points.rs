//! Every step of persistence goes wrong in every way, under a fleet that keeps its own ledger: the process dies there, the
//! step fails, or it hangs. Then the process is killed and started again. Whatever was acknowledged is there, once, with the
//! bytes that were sent.
//!
//! A step that is never reached is a failure too: then the walk has not looked at it.

use std::cell::Cell;
use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::{Duration, Instant};

use forebay::bucket::Bucket;
use forebay::config::Endpoint;
use forebay::crash_points::{Action, Armed, Point};
use forebay::ledger::Entry;
use futures_util::{FutureExt, StreamExt, stream};
use rustix::process::Signal;
use serde_json::Value;
use tokio::sync::{OnceCell, Semaphore};

use crate::support::agreement::{backlog_gone, disk_empty, everything_agrees, rebuild, status};
use crate::support::program::{Program, run, s3_settings};
use crate::support::site::Answer;
use crate::support::{eventually, free_port, json_upload, photo, postgres, weed};

/// Appliances under load at once. Most of a case is waiting for the leases of the dead, and that is free.
const AT_WORK_AT_ONCE: usize = 8;
const WAITING_AT_ONCE: usize = 40;
/// Longer than a commit and a claim may take, so that those that hang are given up.
const STALL: Duration = Duration::from_millis(2500);
/// A device that waits for longer was forgotten.
const UNANSWERED_MAX: Duration = Duration::from_secs(40);
/// In which the keeper looks at the journal, whenever it did before.
const STALL_OF_LOOKS: Duration = Duration::from_secs(5);

/// One bucket for all; each case has a prefix of its own in it.
async fn bucket() -> (&'static Endpoint, &'static str) {
    static BUCKET: OnceCell<(Endpoint, String)> = OnceCell::const_new();
    let made = async || {
        let (_bucket, endpoint, name) = weed::bucket().await;
        (endpoint, name)
    };
    let (endpoint, name) = BUCKET.get_or_init(made).await;
    (endpoint, name)
}

/// A place of its own: settings for a prefix in the bucket, an address that lasts, and maybe a database.
async fn settings_of_its_own(name: &str, postgres: bool) -> Vec<(String, String)> {
    let (endpoint, bucket) = bucket().await;
    let mut settings = s3_settings(endpoint, bucket);
    settings.push(("FOREBAY_S3_PREFIX".into(), format!("{name}/")));
    settings.push(("FOREBAY_LISTEN".into(), format!("127.0.0.1:{}", free_port())));
    if postgres {
        let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
        settings.push(("FOREBAY_QUEUE_URL".into(), url));
    }
    settings
}

/// With points armed, for one start.
fn armed(settings: &[(String, String)], points: String) -> Vec<(String, String)> {
    let mut settings = settings.to_vec();
    settings.push(("FOREBAY_CRASH_POINTS".into(), points));
    settings
}

/// How many objects a case has left in the bucket.
async fn objects(name: &str) -> u64 {
    let (endpoint, bucket) = bucket().await;
    let mut objects = 0;
    Bucket::at(endpoint, bucket).list(&format!("{name}/"), |_| objects += 1).await.unwrap();
    objects
}

/// What the devices wrote of photos that were not acknowledged.
fn unacknowledged(ledger: &str) -> String {
    let lines: Vec<Value> = ledger.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let photo = |line: &Value| [line["device_id"].clone(), line["upload_id"].clone()];
    let acknowledged: Vec<_> = lines.iter().filter(|line| !line["ack"].is_null()).map(photo).collect();
    let others = lines.iter().filter(|line| !acknowledged.contains(&photo(line)));
    others.map(Value::to_string).collect::<Vec<_>>().join("\n")
}

/// The longest that a device waited for an answer, or to hear that there will be none.
fn longest_wait(ledger: &str) -> Duration {
    let mut under_way = HashMap::new();
    let mut longest = Duration::ZERO;
    for entry in ledger.lines().filter_map(|line| serde_json::from_str(line).ok()) {
        match entry {
            Entry::Sent { at, device_id, upload_id, .. } => drop(under_way.insert((device_id, upload_id), at)),
            Entry::Answered { at, device_id, upload_id, .. } | Entry::Failed { at, device_id, upload_id, .. } => {
                longest = longest.max(at.since(under_way[&(device_id, upload_id)]));
            }
        }
    }
    longest
}

/// The end of a program's log.
fn said_last(program: &Program) -> String {
    let log = program.log();
    log[log.len().saturating_sub(20)..].iter().map(Value::to_string).collect::<Vec<_>>().join("\n")
}

/// At which passing the point acts: not at the first, where there are others soon.
fn passing(point: Point) -> u32 {
    match point {
        Point::JournalRename | Point::JournalRenamed | Point::JournalRenamedTold | Point::KeeperTold => 1,
        Point::JournalMark | Point::JournalSync | Point::JournalMarked | Point::DrainClaimed => 2,
        _ => 3,
    }
}

/// What makes the point be reached: a journal is written only while the queue is away. Both tries of the second commit fail.
fn surroundings(point: Point) -> &'static str {
    if point.name().starts_with("journal.") { "queue.commit:fail:2,queue.commit:fail:3," } else { "" }
}

fn is_renaming(point: Point) -> bool {
    matches!(point, Point::JournalRename | Point::JournalRenamed | Point::JournalRenamedTold)
}

/// A device gives two photos one upload_id, the second when the first is off the disk; its commit is the second of all, so
/// that the queue is away and cannot tell. How many photos were acknowledged.
async fn two_photos_under_one_upload_id(url: &str, data: &Path) -> u64 {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let acknowledged = async |number: usize| {
        let body = json_upload("cam-twice", Some("42"), &photo(number)).to_string();
        let request = client.post(url).header("content-type", "application/json").body(body);
        let answer = Answer::of(request.send().await.unwrap()).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.body["id"].as_str().unwrap().to_owned()
    };
    let id = acknowledged(1).await;
    let first = data.join("spool").join(&id[id.len() - 2..]).join(&id);
    eventually("the first photo to leave the disk", async || (!first.exists()).then_some(())).await;
    assert_eq!(acknowledged(2).await, id);
    2
}

/// One point, armed once, under a fleet; then a kill, and everything must agree.
async fn everything_is_sent_once(case: Armed, postgres: bool) {
    static AT_WORK: Semaphore = Semaphore::const_new(AT_WORK_AT_ONCE);
    let name = format!("{}-{}-{}", case.point, case.action, if postgres { "postgres" } else { "sqlite" });
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let settings = settings_of_its_own(&name, postgres).await;

    let at_work = AT_WORK.acquire().await.unwrap();
    let points = format!("{}{case}", surroundings(case.point));
    let mut program = Program::start("serve", &armed(&settings, points), &data).await;
    let url = format!("{}/", program.url);
    let beside = if is_renaming(case.point) { two_photos_under_one_upload_id(&url, &data).await } else { 0 };
    let ledger = folder.path().join("devices.ledger").display().to_string();
    let arguments = [
        "simulate",
        "--url",
        &url,
        "--devices",
        "10",
        "--per-minute",
        "150",
        "--for",
        "3s",
        "--photo-bytes",
        "4kB",
        "--last-tries", // a start may take long on a busy machine, and devices wait for twice as long
        "90s",
        "--ledger",
        &ledger,
    ];
    let all_sent = Cell::new(false);
    let simulate = async {
        let simulated = run(&arguments, &[], folder.path()).await;
        all_sent.set(true);
        simulated
    };
    let breaking = async {
        let reached = |line: &Value| {
            line["message"] == "crash point reached"
                && line["point"] == case.point.name()
                && line["action"] == case.action.to_string()
        };
        let at = eventually("the point to be reached", async || program.log().iter().position(reached)).await;
        match case.action {
            Action::Abort => {
                let ended = eventually("the process to be gone", async || program.ended()).await;
                assert_eq!(ended.signal(), Some(Signal::ABORT.as_raw()), "{ended}");
            }
            Action::Stall(_) => {
                let is_over = |line: &Value| {
                    let text = line["message"].as_str().unwrap_or("");
                    text == "the stall at a crash point is over" || text.starts_with("the queue is away")
                };
                eventually("the stall to be over", async || program.log()[at..].iter().any(is_over).then_some(()))
                    .await;
            }
            Action::Fail => {}
        }
        if case.action != Action::Abort {
            let length = || std::fs::metadata(&ledger).map(|ledger| ledger.len()).unwrap_or(0);
            let then = length();
            eventually("the devices to go on", async || (all_sent.get() || length() > then + 2_000).then_some(()))
                .await;
        }
        let said_before = said_last(&program);
        drop(program); // SIGKILL
        (said_before, Program::start("serve", &settings, &data).await)
    };
    let (simulated, (said_before, program)) = tokio::join!(simulate, breaking);
    let said = String::from_utf8_lossy(&simulated.stdout).into_owned();
    assert!(
        simulated.status.success(),
        "every photo is acknowledged in the end: {said}\nof the others:\n{}\nbefore the kill:\n{said_before}\nsince then:\n{}",
        unacknowledged(&std::fs::read_to_string(&ledger).unwrap_or_default()),
        said_last(&program),
    );
    let longest_wait = longest_wait(&std::fs::read_to_string(&ledger).unwrap());
    assert!(longest_wait < UNANSWERED_MAX, "a device waited for {longest_wait:?}");
    drop(at_work);
    backlog_gone(&program, &data).await;
    // each photo was acknowledged, so it is in the queue or has its mark; nothing is left for a walk over the spool to find
    disk_empty(&data).await;

    let _at_work = AT_WORK.acquire().await.unwrap();
    let rebuilt = rebuild(&settings, &data).await;
    assert!(rebuilt.starts_with("0 photos on disk"), "{rebuilt}");
    let report = everything_agrees(&settings, &data, &ledger).await;
    let acknowledged = report["acknowledged"].as_u64().unwrap();
    assert!(acknowledged >= 60, "{report}");
    assert_eq!(objects(&name).await, acknowledged + beside, "one object for each upload: {report}");
}

/// Every point with one action; those of the queue on both queues. All that goes wrong is told, by point.
async fn everything_is_sent_once_whatever_step(action: Action) {
    let cases = Point::ALL.iter().flat_map(|point| {
        let case = Armed { point: *point, action, at: passing(*point) };
        let on_postgres = point.name().starts_with("queue.").then_some((case, true));
        std::iter::once((case, false)).chain(on_postgres)
    });
    let ended = stream::iter(cases).map(|(case, postgres)| async move {
        let ended = AssertUnwindSafe(everything_is_sent_once(case, postgres)).catch_unwind().await;
        ended.map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            format!("{case}{}: {}", if postgres { " on Postgres" } else { "" }, text.unwrap_or_default())
        })
    });
    let wrong: Vec<String> =
        ended.buffer_unordered(WAITING_AT_ONCE).filter_map(async |ended| ended.err()).collect().await;
    assert!(wrong.is_empty(), "{} of the cases went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_photo_is_sent_once_whatever_step_the_process_dies_at() {
    everything_is_sent_once_whatever_step(Action::Abort).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_photo_is_sent_once_whatever_step_fails() {
    everything_is_sent_once_whatever_step(Action::Fail).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_photo_is_sent_once_whatever_step_hangs() {
    everything_is_sent_once_whatever_step(Action::Stall(STALL)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_answered_only_after_every_step_of_persistence() {
    const SLOW: Duration = Duration::from_millis(300);
    let folder = tempfile::tempdir().unwrap();
    let settings = settings_of_its_own("slow", false).await;
    let steps = Point::ALL.split(|point| *point == Point::IngestAnswer).next().unwrap();
    let (of_the_journal, others): (Vec<Point>, Vec<Point>) =
        steps.iter().partition(|point| point.name().starts_with("journal."));
    let slow = steps.iter().map(|point| Armed { point: *point, action: Action::Stall(SLOW), at: 1 }.to_string());
    // the queue is away for the second photo
    let points = [surroundings(of_the_journal[0]).to_owned(), slow.collect::<Vec<_>>().join(",")].concat();
    let program = Program::start("serve", &armed(&settings, points), &folder.path().join("data")).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for (number, steps) in [others, of_the_journal].into_iter().enumerate() {
        assert!(!steps.is_empty());
        let body = json_upload("cam-1", None, &photo(number)).to_string();
        let request = client.post(&program.url).header("content-type", "application/json").body(body);
        let began = Instant::now();
        let answer = Answer::of(request.send().await.unwrap()).await;
        let elapsed = began.elapsed();
        assert_eq!(answer.status, 201, "{answer:?}");
        assert!(elapsed >= SLOW * steps.len() as u32, "answered after {elapsed:?}, before all of {steps:?} were done");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_sent_again_while_it_is_being_removed_leaves_nothing_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let settings = settings_of_its_own("sent-again", false).await;
    let long = Duration::from_secs(10);
    let stall = Armed { point: Point::KeeperRemoved, action: Action::Stall(long), at: 1 };
    let program = Program::start("serve", &armed(&settings, stall.to_string()), &data).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = json_upload("cam-1", Some("1"), &photo(1)).to_string();
    let send = async || {
        let request = client.post(&program.url).header("content-type", "application/json").body(body.clone());
        Answer::of(request.send().await.unwrap()).await
    };
    let first = send().await;
    let said = |message: &str| program.log().iter().any(|line| line["message"] == message);
    eventually("the photo to be off the disk", async || said("crash point reached").then_some(())).await;
    let again = send().await;
    assert!(
        !said("the stall at a crash point is over"),
        "the answer took longer than the stall, so this shows nothing"
    );
    assert_eq!((again.status, &again.body["id"]), (200, &first.body["id"]), "{again:?}");

    let record = format!("{}{}", program.url, first.location.unwrap());
    eventually("its record to say that it is removed", async || {
        let record = Answer::of(client.get(&record).send().await.unwrap()).await.body;
        record["removed_at"].is_string().then_some(())
    })
    .await;
    disk_empty(&data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_whose_own_id_is_given_again_while_it_is_being_removed_leaves_nothing_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let name = "given-again";
    let settings = settings_of_its_own(name, false).await;
    let told = Point::JournalRenamedTold;
    let failing = [1, 2].map(|at| Armed { point: told, action: Action::Fail, at });
    // the first that is removed is the other photo under the same upload_id
    let held = Armed { point: Point::KeeperRemoved, action: Action::Stall(STALL_OF_LOOKS), at: 2 };
    let points = failing.iter().chain([&held]).map(Armed::to_string).collect::<Vec<_>>().join(",");
    let program = Program::start("serve", &armed(&settings, surroundings(told).to_owned() + &points), &data).await;
    let photos = two_photos_under_one_upload_id(&format!("{}/", program.url), &data).await;
    disk_empty(&data).await;
    let places = |what: &dyn Fn(&Value) -> bool| {
        let log = program.log();
        (0..log.len()).filter(|at| what(&log[*at])).collect::<Vec<usize>>()
    };
    let over = eventually("the removal to go on", async || {
        places(&|line| line["message"] == "the stall at a crash point is over").first().copied()
    })
    .await;
    let began = places(&|line| line["message"] == "crash point reached" && line["point"] == held.point.name())[0];
    let given = places(&|line| line["message"].as_str().unwrap_or("").starts_with("two photos have one upload_id"));
    assert!(given.iter().any(|at| (began..over).contains(at)), "its id was given again while it was being removed");
    assert_eq!(objects(name).await, photos);
}

/// A drain is held at `point`, for longer than its lead and its lease last; another takes over. While that one is at the same
/// point, the first goes on.
async fn the_late_word_of_a_drain_that_was_held_does_not_count(point: Point) {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let name = format!("held-{point}");
    let settings = settings_of_its_own(&name, true).await;
    let ingest = Program::start("ingest", &settings, &data).await;
    let stalled_for = |seconds| {
        let stall = Armed { point, action: Action::Stall(Duration::from_secs(seconds)), at: 1 };
        armed(&settings, stall.to_string())
    };
    let reached = async |drain: &Program| {
        let reached = |line: &Value| line["message"] == "crash point reached";
        eventually("the point to be reached", async || drain.log().iter().any(reached).then_some(())).await;
    };
    let first = Program::start("drain", &stalled_for(1), &data).await;

    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.post(&ingest.url).header("content-type", "application/json");
    let body = json_upload("cam-1", Some("1"), &photo(1)).to_string();
    let answer = Answer::of(request.body(body).send().await.unwrap()).await;
    let address = format!("{}{}", ingest.url, answer.location.unwrap());
    let record = async || Answer::of(client.get(&address).send().await.unwrap()).await.body;
    reached(&first).await;
    first.signal(Signal::STOP);
    let second = Program::start("drain", &stalled_for(10), &data).await;
    reached(&second).await;
    let taken_over = record().await;
    assert_eq!((&taken_over["state"], &taken_over["attempts"]), (&"uploading".into(), &2.into()), "{taken_over}");

    first.signal(Signal::CONT);
    eventually("the first drain to stand by", async || {
        Some(status(&first).await).filter(|status| status["drain"]["condition"]["is"] == "standby")
    })
    .await;
    let lost = |line: &Value| line["message"].as_str().unwrap_or("").starts_with("the lead is lost");
    eventually("the first drain to say so", async || first.log().iter().any(lost).then_some(())).await;
    assert_eq!(record().await, taken_over, "its late word does not count");
    let sent = eventually("the second drain to be done", async || {
        Some(record().await).filter(|record| record["state"] == "uploaded" && !record["removed_at"].is_null())
    })
    .await;
    assert_eq!((&sent["attempts"], &sent["failures"]), (&2.into(), &0.into()), "{sent}");
    let ledger = folder.path().join("no.ledger");
    std::fs::write(&ledger, "").unwrap();
    let report = everything_agrees(&settings, &data, &ledger.display().to_string()).await;
    assert_eq!((report["verified"].as_u64(), objects(&name).await), (Some(1), 1), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_was_held_before_it_sent_has_no_say_after_another_took_over() {
    the_late_word_of_a_drain_that_was_held_does_not_count(Point::DrainPut).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_was_held_before_it_told_the_queue_has_no_say_after_another_took_over() {
    the_late_word_of_a_drain_that_was_held_does_not_count(Point::DrainUploaded).await;
}
