//! The rate as an operator rules it while everything runs: in any process, over restarts, until it ends.

use std::time::{Duration, Instant};

use forebay::allowance::{End, InForce, Standing, Uplink, Zone};
use forebay::config::Endpoint;
use forebay::drain::steering;
use forebay::pacer::Pacer;
use forebay::queue::Queue;
use forebay::timetable::{Amount, Timetable};
use forebay::units::{Rate, UnixMs};
use jiff::tz::{Offset, TimeZone};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::support::agreement::status;
use crate::support::program::{Program, run, s3_settings};
use crate::support::site::{Answer, Site};
use crate::support::{PATIENCE, eventually, json_upload, photo, postgres};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A change is to take effect within a second; a machine that is busy with other tests is given some more.
const SOON: Duration = Duration::from_secs(3);

async fn ask(method: &str, url: String, body: Option<Value>) -> Answer {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut request = client.request(method.parse().unwrap(), url);
    if let Some(body) = body {
        request = request.header("content-type", "application/json").body(body.to_string());
    }
    Answer::of(request.send().await.unwrap()).await
}

/// Waits until the program says this of its allowance, and gives its status.
async fn allowed(program: &Program, bytes_per_second: u64) -> Value {
    eventually(&format!("an allowance of {bytes_per_second}"), async || {
        let status = status(program).await;
        (status["drain"]["allowance_bytes_per_second"] == bytes_per_second).then_some(status)
    })
    .await
}

/// What can be reached: a store that nobody listens for.
fn nowhere() -> Endpoint {
    let url = format!("http://127.0.0.1:{}", crate::support::free_port());
    Endpoint { url, access_key: "a".to_owned(), secret_key: "s".to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_set_at_one_process_holds_in_another_and_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let mut settings = s3_settings(&nowhere(), "photos");
    settings.push(("FOREBAY_QUEUE_URL".to_owned(), url));
    let ingest = Program::start("ingest", &settings, &data).await;
    let drain = Program::start("drain", &settings, &data).await;
    let before = allowed(&drain, 5_000_000).await;
    assert_eq!(before["drain"]["allowance_rule"], "20% of 200 Mbit/s");

    let began = Instant::now();
    let body = json!({ "rate": "100%", "for": "1h", "who": "anna" });
    let set = ask("PUT", format!("{}/rate", ingest.console), Some(body)).await;
    assert_eq!((set.status, &set.body["allowance_bytes_per_second"]), (200, &json!(25_000_000)), "{set:?}");
    assert_eq!((&set.body["override"]["rate"], &set.body["override"]["who"]), (&json!("100%"), &json!("anna")));
    let status = allowed(&drain, 25_000_000).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    let rule = status["drain"]["allowance_rule"].as_str().unwrap();
    assert!(rule.starts_with("100% of 200 Mbit/s, set by anna at ") && rule.contains(" until "), "{rule}");
    assert_eq!(status["drain"]["allowance_until"], set.body["until"]);
    let logged =
        |drain: &Program| drain.log().iter().filter(|e| e["message"] == "another allowance is in force").count();
    assert_eq!(logged(&drain), 1, "{:?}", drain.log());

    assert!(drain.terminate().await);
    let drain = Program::start("drain", &settings, &data).await;
    allowed(&drain, 25_000_000).await;
    let cleared = ask("DELETE", format!("{}/rate", drain.console), None).await;
    assert_eq!((cleared.status, &cleared.body["override"]), (200, &Value::Null), "{cleared:?}");
    assert_eq!(ask("DELETE", format!("{}/rate", drain.console), None).await.status, 200, "there is none any more");
    allowed(&drain, 5_000_000).await;
    assert_eq!(allowed(&ingest, 5_000_000).await["drain"]["allowance_rule"], "20% of 200 Mbit/s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_set_for_a_time_ends_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let serve = Program::start("serve", &s3_settings(&nowhere(), "photos"), folder.path()).await;
    let body = json!({ "rate": "40Mbit/s", "for": "4s" });
    assert_eq!(ask("PUT", format!("{}/rate", serve.console), Some(body)).await.status, 200);
    // as much as the share allows, by another rule
    for rule in ["5.00 MB/s, set by somebody at ", "20% of 200 Mbit/s"] {
        eventually(rule, async || {
            let status = status(&serve).await;
            status["drain"]["allowance_rule"].as_str().unwrap().starts_with(rule).then_some(())
        })
        .await;
    }
    assert_eq!(ask("GET", format!("{}/rate", serve.console), None).await.body["override"], Value::Null);
}

/// A `serve` with one photo whose drain has found that nothing leaves; and why, in its words.
async fn pausing(settings: &[(String, String)], folder: &std::path::Path) -> (Program, String) {
    let serve = Program::start("serve", settings, folder).await;
    let posted = ask("POST", serve.url.clone(), Some(json_upload("cam-1", None, &photo(1)))).await;
    assert_eq!(posted.status, 201);
    let reason = eventually("the drain to pause", async || {
        let condition = &status(&serve).await["drain"]["condition"];
        (condition["is"] == "paused").then(|| condition["reason"].as_str().unwrap().to_owned())
    })
    .await;
    (serve, reason)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_credentials_the_status_says_in_one_line_how_to_give_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = s3_settings(&nowhere(), "photos");
    settings.retain(|(name, _)| !name.contains("KEY"));
    // neither this machine's role nor its user's files
    settings.push(("AWS_EC2_METADATA_DISABLED".to_owned(), "true".to_owned()));
    settings.push(("HOME".to_owned(), folder.path().display().to_string()));
    let (_serve, reason) = pausing(&settings, folder.path()).await;
    let expected = "there are no AWS credentials (set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ";
    assert!(reason.contains(expected) && !reason.contains('\n'), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_told_of_behind_a_pause_and_its_end_is_not_foretold() {
    let folder = tempfile::tempdir().unwrap();
    let (serve, reason) = pausing(&s3_settings(&nowhere(), "photos"), folder.path()).await;
    let console = serve.console.trim_start_matches("http://").to_owned();
    let done = run(&["pause", "--for", "1h", "--console-listen", &console], &[], folder.path()).await;
    assert!(done.status.success(), "{done:?}");
    let held = allowed(&serve, 0).await;
    let condition = &held["drain"]["condition"];
    assert_eq!(condition["is"], "held");
    // what was being done may be another thing with each probe
    let (_, cause) = reason.split_once(": ").unwrap();
    assert!(condition["outage"].as_str().is_some_and(|told| told.ends_with(cause)), "{condition}, not {cause}");
    let forecast = &held["forecast"];
    assert!(!forecast["words"].as_str().unwrap().contains("gone"), "{forecast}");
    assert_eq!(forecast["remedies"], json!([]), "to resume would not help");
    let metrics = reqwest::Client::builder().no_proxy().build().unwrap().get(format!("{}/metrics", serve.console));
    let metrics = metrics.send().await.unwrap().text().await.unwrap();
    let paused = metrics.lines().find(|line| line.starts_with("forebay_drain_paused")).unwrap_or_default();
    assert!(paused.ends_with(" 1"), "an alert would end: {paused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_pause_nothing_leaves_and_afterwards_everything_does() {
    let site = Site::start(&[]).await;
    let (s3, _bucket) = site.bucket().await;
    let (folder, settings) = (tempfile::tempdir().unwrap(), s3_settings(s3.endpoint(), "photos"));
    let serve = Program::start("serve", &settings, folder.path()).await;
    let cli = async |arguments: &[&str]| {
        let console = serve.console.trim_start_matches("http://").to_owned();
        let who = [("USER".to_owned(), "ben".to_owned())];
        let done = run(&[arguments, &["--console-listen", &console]].concat(), &who, folder.path()).await;
        assert!(done.status.success(), "{done:?}");
        String::from_utf8(done.stdout).unwrap()
    };
    let paused = cli(&["pause", "--for", "1h"]).await;
    assert!(paused.starts_with("allowance  nothing, paused by ben since "), "{paused}");
    allowed(&serve, 0).await;
    for number in 0..5 {
        let posted = ask("POST", serve.url.clone(), Some(json_upload("cam-1", None, &photo(number)))).await;
        assert_eq!(posted.status, 201, "photos are taken all the same");
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let held = status(&serve).await;
    assert_eq!((&held["books"]["uploaded"]["uploads"], &held["drain"]["sent_bytes"]), (&json!(0), &json!(0)), "{held}");
    assert_eq!(
        (&held["drain"]["condition"]["is"], &held["drain"]["condition"]["who"]),
        (&json!("held"), &json!("ben"))
    );
    let page = cli(&["status"]).await;
    assert!(page.contains("PAUSED by ben") && page.contains("allowance  nothing, paused by ben since"), "{page}");

    let resumed = cli(&["resume"]).await;
    assert!(resumed.starts_with("allowance  5.00 MB/s, 20% of 200 Mbit/s"), "{resumed}");
    eventually("all to be uploaded", async || {
        (status(&serve).await["books"]["uploaded"]["uploads"] == 5).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_in_a_browser_may_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let serve = Program::start("serve", &s3_settings(&nowhere(), "photos"), folder.path()).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for request in [client.put(format!("{}/rate", serve.console)), client.delete(format!("{}/rate", serve.console))] {
        let request = request.header("origin", "http://page.example:8081").header("content-type", "application/json");
        let answer = request.body(r#"{"rate":"50%"}"#).send().await.unwrap();
        assert_eq!(answer.status(), 403);
    }
    let read = client.get(format!("{}/rate", serve.console)).header("origin", "http://page.example:8081");
    assert_eq!(read.send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_with_what_was_found_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let serve = Program::start("serve", &s3_settings(&nowhere(), "photos"), folder.path()).await;
    let rate = format!("{}/rate", serve.console);
    for (body, told) in [
        (json!({ "rate": "120%" }), "found \"120%\""),
        (json!({ "rate": "0%" }), "above 0%"),
        (json!({ "rate": "300Mbit/s" }), "beyond the uplink's own rate"),
        (json!({ "rate": "fast" }), "found \"fast\""),
        (json!({ "rate": "off" }), "write 100%"),
        (json!({ "rate": "50%", "for": "31d" }), "30d at most"),
        (json!({ "rate": "50%", "for": "0s" }), "in the future"),
        (json!({ "rate": "50%", "for": "soon" }), "found \"soon\""),
        (json!({ "rate": "50%", "until": "2020-01-01T00:00:00Z" }), "from now"),
        (json!({ "rate": "50%", "until": "tomorrow" }), "RFC 3339"),
        (json!({ "rate": "50%", "for": "1h", "until": "2099-01-01T00:00:00Z" }), "found both"),
        (json!({ "rate": "50%", "who": "a\nb" }), "who"),
    ] {
        let answer = ask("PUT", rate.clone(), Some(body.clone())).await;
        assert_eq!((answer.status, answer.problem()), (422, "out-of-range"), "{body}");
        assert!(answer.body["detail"].as_str().unwrap().contains(told), "{body}: {answer:?}");
    }
    for (path, body) in
        [("rate", json!([])), ("rate", json!({})), ("rate", json!({ "rate": 5 })), ("pause", json!({ "fro": "1h" }))]
    {
        let method = if path == "rate" { "PUT" } else { "POST" };
        let answer = ask(method, format!("{}/{path}", serve.console), Some(body.clone())).await;
        assert_eq!((answer.status, answer.problem()), (400, "malformed-body"), "{body}");
    }
    // what a form on a page of another site could send
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"] {
        for path in ["pause", "resume"] {
            let request = client.post(format!("{}/{path}", serve.console)).header("content-type", kind).body("{}");
            assert_eq!(Answer::of(request.send().await.unwrap()).await.status, 415, "{kind}");
        }
    }
    // as curl sends it; a page would say where it comes from
    let resumed = client.post(format!("{}/resume", serve.console));
    assert_eq!(Answer::of(resumed.send().await.unwrap()).await.status, 200);
    let elsewhere = client.post(format!("{}/resume", serve.console)).header("origin", "http://example.com");
    assert_eq!(Answer::of(elsewhere.send().await.unwrap()).await.status, 403);
    let long = json!({ "rate": "50%", "who": "x".repeat(5000) });
    let refused = ask("PUT", rate.clone(), Some(long)).await;
    assert_eq!((refused.status, refused.problem()), (413, "too-large"));
    let shown = ask("GET", rate.clone(), None).await.body;
    assert_eq!((&shown["override"], &shown["pause"]), (&Value::Null, &Value::Null));

    let console = serve.console.trim_start_matches("http://").to_owned();
    let done = run(&["rate", "set", "300Mbit/s", "--console-listen", &console], &[], folder.path()).await;
    assert!(!done.status.success());
    assert!(String::from_utf8_lossy(&done.stderr).contains("beyond the uplink's own rate"), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_queue_is_away_nothing_can_be_said() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = s3_settings(&nowhere(), "photos");
    let away = format!("postgres://forebay@127.0.0.1:{}/forebay", crate::support::free_port());
    settings.push(("FOREBAY_QUEUE_URL".to_owned(), away));
    settings.push(("FOREBAY_DRAIN_TIMETABLE".to_owned(), "00:00,50%".to_owned()));
    let serve = Program::start("serve", &settings, folder.path()).await;
    let answer = ask("PUT", format!("{}/rate", serve.console), Some(json!({ "rate": "100%" }))).await;
    assert_eq!((answer.status, answer.problem()), (503, "queue-away"));
    let status = allowed(&serve, 12_500_000).await;
    assert_eq!(status["drain"]["allowance_rule"], "timetable: every day 00:00, 50%");
}

/// A pacer that follows a timetable, at a place where it is noon in so many seconds.
async fn steered(queue: &Queue, timetable: &str, noon_in: i64) -> (Pacer, watch::Receiver<Standing>, DropGuard) {
    let rate = Rate(25_000_000);
    let of_day = UnixMs::now().0.div_euclid(1000).rem_euclid(86_400);
    let rules = TimeZone::fixed(Offset::from_seconds((43_200 - noon_in - of_day) as i32).unwrap());
    let timetable = Some(Timetable::parse(timetable, rate).unwrap());
    let uplink = Uplink { rate, share: "20%".parse().unwrap(), timetable, zone: Zone { rules, name: String::new() } };
    let pacer = Pacer::new(rate);
    let look = steering::look(queue).await;
    let (sender, standing) = watch::channel(steering::standing(&look, &uplink));
    let (looks, _) = watch::channel(look);
    let stop = CancellationToken::new();
    tokio::spawn(steering::steer(
        Some(pacer.clone()),
        queue.clone(),
        uplink,
        looks,
        sender,
        stop.clone().cancelled_owned(),
    ));
    (pacer, standing, stop.drop_guard())
}

/// What is in force once `allowance` is.
async fn another_allowance(standing: &mut watch::Receiver<Standing>, allowance: Rate) -> InForce {
    let change = standing.wait_for(|standing| standing.in_force.allowance == Some(allowance));
    tokio::time::timeout(PATIENCE, change).await.expect("another allowance").unwrap().in_force.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pacer_follows_the_timetable() {
    let site = Site::start(&[]).await;
    let (pacer, mut standing, _stop) = steered(&site.queue, "00:00,20% 12:00,60%", 6).await;
    let morning = standing.borrow().in_force.clone();
    assert_eq!(morning.allowance, Some(Rate(5_000_000)));
    let noon = morning.until.expect("it ends");
    let morning_or_over = async || (pacer.allowance() == morning.allowance || UnixMs::now() >= noon).then_some(());
    eventually("the morning's share", morning_or_over).await;
    let afternoon = another_allowance(&mut standing, Rate(15_000_000)).await;
    let changed = UnixMs::now();
    assert!(changed >= noon && changed.since(noon) < SOON, "{changed}, not {noon}");
    assert_eq!(pacer.allowance(), Some(Rate(15_000_000)));
    let rule = afternoon.rule.to_string();
    assert!(rule.starts_with("timetable: every day 12:00, 60%, until ") && rule.ends_with(" 00:00"), "{rule}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_holds_while_the_queue_is_away_and_still_ends_by_itself() {
    let site = Site::start(&[]).await;
    let (pacer, mut standing, _stop) = steered(&site.queue, "00:00,20%", 3600).await;
    let end = End::After(Duration::from_secs(6));
    site.queue.set_rate(Amount::Share("100%".parse().unwrap()), "anna", end).await.unwrap();
    let end = another_allowance(&mut standing, Rate(25_000_000)).await.until.expect("it ends");
    site.queue.close().await;
    assert!(site.queue.control().await.is_err(), "it is away");
    let held = pacer.allowance();
    assert!(held == Some(Rate(25_000_000)) || UnixMs::now() >= end, "{held:?}");
    another_allowance(&mut standing, Rate(5_000_000)).await;
    assert!(UnixMs::now() >= end, "it was dropped before its end");
    assert_eq!(pacer.allowance(), Some(Rate(5_000_000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_forecast_is_in_the_metrics_and_in_status() {
    let folder = tempfile::tempdir().unwrap();
    let serve = Program::start("serve", &s3_settings(&nowhere(), "photos"), folder.path()).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let metrics = client.get(format!("{}/metrics", serve.console)).send().await.unwrap().text().await.unwrap();
    for (name, value) in [
        ("forebay_forecast_full_in_seconds", "5184000"),
        ("forebay_forecast_clear_in_seconds", "0"),
        ("forebay_forecast_growth_bytes_per_day", "0"),
    ] {
        assert!(metrics.lines().any(|line| line == format!("{name} {value}")), "{name} {value}: {metrics}");
    }
    let forecast = status(&serve).await["forecast"].clone();
    assert_eq!((&forecast["outlook"], &forecast["words"]), (&json!("sound"), &json!("steady")));
}
