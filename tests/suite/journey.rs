//! One upload's journey through the real program: device to spool to queue to a real S3 server, and the audit of it.

use std::path::Path;

use axum::http::StatusCode;
use axum::response::IntoResponse;
use forebay::config::Endpoint;
use forebay::ledger::{Ack, Entry, Ledger};
use forebay::units::UnixMs;
use forebay::upload::{Sha256, UploadId};
use serde_json::{Value, json};

use crate::support::program::{Program, run, s3_settings};
use crate::support::site::{Answer, Site};
use crate::support::{PATIENCE, eventually, free_port, json_upload, photo, postgres, weed};

async fn get(url: &str) -> Answer {
    Answer::of(reqwest::Client::builder().no_proxy().build().unwrap().get(url).send().await.unwrap()).await
}

async fn uploaded(program: &Program, id: &Value) -> Value {
    let url = format!("{}/v1/uploads/{}", program.url, id.as_str().unwrap());
    eventually("an upload to be uploaded", async || {
        let view = get(&url).await.body;
        (view["state"] == "uploaded").then_some(view)
    })
    .await
}

/// `curl` as the README has it.
async fn curl(arguments: &[&str]) -> Value {
    let mut command = tokio::process::Command::new("curl");
    command.args(["-sS", "--noproxy", "*", "--fail-with-body"]).args(arguments);
    let done = command.output().await.expect("curl is not installed; run tests/install-parts");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{text} {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_str(&text).unwrap()
}

/// Sends a photo by each of the three bodies to a running `serve`, and finds each in the bucket.
async fn three_bodies_end_in_the_bucket(queue: Option<String>) {
    let folder = tempfile::tempdir().unwrap();
    let (bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    settings.push(("FOREBAY_S3_PREFIX".into(), "site-7".into()));
    settings.extend(queue.map(|url| ("FOREBAY_QUEUE_URL".to_owned(), url)));
    let data = folder.path().join("data");
    let program = Program::start("serve", &settings, &data).await;

    let file = |n: usize| {
        let path = folder.path().join(format!("photo-{n}.jpg"));
        std::fs::write(&path, photo(n)).unwrap();
        path.display().to_string()
    };
    let json = folder.path().join("body.json");
    std::fs::write(&json, json_upload("cam-1", Some("1"), &photo(1)).to_string()).unwrap();
    let answers = [
        curl(&["-H", "Content-Type: application/json", "--data-binary", &format!("@{}", json.display()), &program.url])
            .await,
        curl(&["-F", "device_id=cam-1", "-F", &format!("image=@{}", file(2)), &program.url]).await,
        curl(&[
            "-H",
            "Content-Type: image/jpeg",
            "-H",
            "X-Device-Id: cam-1",
            "--data-binary",
            &format!("@{}", file(3)),
            &program.url,
        ])
        .await,
    ];
    for (n, answer) in answers.iter().enumerate() {
        let view = uploaded(&program, &answer["id"]).await;
        let sent = photo(n + 1);
        let key = view["object_key"].as_str().unwrap();
        assert!(key.starts_with("site-7/cam-1/"), "{key}");
        assert_eq!(bucket.read_back(key).await.unwrap(), Some((sent.len() as u64, Sha256::of(&sent))));
    }

    let status = eventually("the books to be balanced", async || {
        let status = get(&format!("{}/status", program.console)).await.body;
        (status["books"]["uploaded"]["uploads"] == 3 && status["backlog"]["uploads"] == 0).then_some(status)
    })
    .await;
    assert_eq!(status["books"]["accepted"]["uploads"], 3);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let metrics = client.get(format!("{}/metrics", program.console)).send().await.unwrap().text().await.unwrap();
    for line in [
        "forebay_ingest_answers_total{status=\"201\"} 3",
        "forebay_drain_attempts_total{outcome=\"uploaded\"} 3",
        "forebay_uploads{state=\"uploaded\"} 3",
        "forebay_backlog_uploads 0",
        "forebay_drain_allowance_bytes_per_second 5000000",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    assert!(program.terminate().await, "a clean end on SIGTERM");

    settings.push(("FOREBAY_DATA_DIR".into(), data.display().to_string()));
    let verified = run(&["verify", "--bytes", "--json"], &settings, folder.path()).await;
    let report: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert!(verified.status.success(), "{report}");
    assert_eq!((report["verified"].as_u64(), report["disagreements"].as_u64()), (Some(3), Some(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn three_bodies_end_in_the_bucket_by_a_sqlite_queue() {
    three_bodies_end_in_the_bucket(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_bodies_end_in_the_bucket_by_a_postgres_queue() {
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    three_bodies_end_in_the_bucket(Some(url)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_names_upload_and_device_in_every_line_that_concerns_one() {
    let folder = tempfile::tempdir().unwrap();
    let (_bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    settings.push(("FOREBAY_LOG".into(), "forebay=debug".into()));
    let program = Program::start("serve", &settings, &folder.path().join("data")).await;
    let body = json_upload("cam-17", None, &photo(1)).to_string();
    let request = reqwest::Client::builder().no_proxy().build().unwrap().post(&program.url);
    let answer = Answer::of(request.header("content-type", "application/json").body(body).send().await.unwrap()).await;
    uploaded(&program, &answer.body["id"]).await;
    for message in ["acknowledged", "uploaded"] {
        let line =
            eventually("the line", async || program.log().into_iter().find(|line| line["message"] == message)).await;
        assert_eq!(line["span"]["upload"], answer.body["id"], "{line}");
        assert_eq!(line["span"]["device"], "cam-17", "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_finds_what_is_missing_damaged_or_unknown() {
    let folder = tempfile::tempdir().unwrap();
    let (bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    settings.push(("FOREBAY_RETAIN".into(), "1h".into()));
    let data = folder.path().join("data");
    let program = Program::start("serve", &settings, &data).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut views = Vec::new();
    for n in 0..3 {
        let body = json_upload("cam-1", None, &photo(n)).to_string();
        let request = client.post(&program.url).header("content-type", "application/json").body(body);
        let answer = Answer::of(request.send().await.unwrap()).await;
        views.push(uploaded(&program, &answer.body["id"]).await);
    }
    program.terminate().await;
    settings.push(("FOREBAY_DATA_DIR".into(), data.display().to_string()));
    let audit = async || {
        let done = run(&["verify", "--bytes", "--json"], &settings, folder.path()).await;
        (done.status.success(), serde_json::from_slice::<Value>(&done.stdout).unwrap())
    };
    assert!(audit().await.0);

    // another object under the first one's key, a damaged photo on disk, a photo that the queue does not know
    let (other, key) = (bytes::Bytes::from(photo(9)), views[0]["object_key"].as_str().unwrap());
    let object = forebay::bucket::Object {
        key,
        content_type: forebay::upload::ImageType::Jpeg,
        sha256: Sha256::of(&other),
        photo: &other,
        turn: &forebay::pacer::Turn::default(),
    };
    bucket.put(&object).await.unwrap();
    let on_disk = |view: &Value| {
        let id = view["id"].as_str().unwrap();
        data.join("spool").join(&id[id.len() - 2..]).join(id)
    };
    let mut bytes = std::fs::read(on_disk(&views[1])).unwrap();
    bytes[3_000] ^= 1;
    std::fs::write(on_disk(&views[1]), bytes).unwrap();
    let stranger = data.join("spool/ff/01936f0e-7b1c-7e3a-9d2f-0c4b8a6d5eff");
    std::fs::write(stranger, b"no photo").unwrap();
    let (agrees, report) = audit().await;
    assert!(!agrees);
    assert_eq!(report["disagreements"], 3, "{report}");
    let shown = report["shown"].to_string();
    for part in [key, views[1]["id"].as_str().unwrap(), "01936f0e-7b1c-7e3a-9d2f-0c4b8a6d5eff"] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
}

/// A ledger of devices that were told yes for photos whose records are purged by now.
fn acknowledgements_of_purged_photos(path: &Path, photos: usize) {
    let ledger = Ledger::create(path).unwrap();
    for number in 0..photos {
        let (at, device_id, upload_id) = (UnixMs::now(), "cam-2".to_owned(), number.to_string());
        let (size_bytes, sha256) = (photo(number).len() as u64, Sha256::of(&photo(number)));
        let ack = Ack { id: UploadId::new(), object_key: format!("cam-2/{number}.jpg"), size_bytes, sha256 };
        let answered = Entry::Answered {
            at,
            device_id: device_id.clone(),
            upload_id: upload_id.clone(),
            status: 201,
            ack: Some(ack),
        };
        ledger.write(&Entry::Sent { at, device_id, upload_id, size_bytes, sha256, try_number: 1 }).unwrap();
        ledger.write(&answered).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_bucket_cannot_be_reached_verify_tells_of_disk_and_queue() {
    let site = Site::start(&[]).await;
    site.accept("cam-1", &photo(1)).await;
    let url = format!("http://127.0.0.1:{}", free_port());
    let mut settings = s3_settings(&Endpoint { url, access_key: "a".into(), secret_key: "s".into() }, "photos");
    settings.push(("FOREBAY_DATA_DIR".into(), site.config.data_dir.display().to_string()));
    let verify = async |arguments: &[&str]| {
        let done = run(&[&["verify", "--json"], arguments].concat(), &settings, site.folder.path()).await;
        assert!(!done.status.success());
        serde_json::from_slice::<Value>(&done.stdout).unwrap()
    };
    let report = verify(&[]).await;
    assert_eq!((&report["waiting"], &report["disagreements"]), (&json!(1), &json!(1)), "{report}");
    let shown = report["shown"][0].as_str().unwrap();
    assert!(shown.starts_with("the bucket was not looked at to the end: LIST: no connection to "), "{shown}");

    // what only the bucket could tell of is not called lost, and not asked for one by one
    let ledger = site.folder.path().join("devices.ledger");
    acknowledgements_of_purged_photos(&ledger, 3);
    let report = verify(&["--ledger", ledger.to_str().unwrap()]).await;
    assert_eq!((&report["lost"], &report["not_looked_for"]), (&json!(0), &json!(3)), "{report}");
    assert_eq!(report["disagreements"], 2, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_and_metrics_go_to_a_collector_that_is_named() {
    let (seen, mut requests) = tokio::sync::mpsc::unbounded_channel();
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", tcp.local_addr().unwrap());
    let collect = move |request: axum::extract::Request| async move {
        let path = request.uri().path().to_owned();
        let body = axum::body::to_bytes(request.into_body(), 1 << 24).await.unwrap();
        let _ = seen.send((path, String::from_utf8_lossy(&body).into_owned()));
    };
    tokio::spawn(async move { axum::serve(tcp, axum::Router::new().fallback(collect)).await });

    let folder = tempfile::tempdir().unwrap();
    let (_bucket, store, name) = weed::bucket().await;
    let mut settings = s3_settings(&store, &name);
    settings.push(("OTEL_EXPORTER_OTLP_ENDPOINT".into(), endpoint));
    let program = Program::start("serve", &settings, &folder.path().join("data")).await;
    let body = json_upload("cam-1", None, &photo(1)).to_string();
    let request = reqwest::Client::builder().no_proxy().build().unwrap().post(&program.url);
    let answer = Answer::of(request.header("content-type", "application/json").body(body).send().await.unwrap()).await;
    uploaded(&program, &answer.body["id"]).await;
    assert!(program.terminate().await, "what is left is sent at the end");

    let mut sent = std::collections::BTreeMap::<String, String>::new();
    while let Ok((path, body)) = requests.try_recv() {
        sent.entry(path).or_default().push_str(&body);
    }
    assert!(sent["/v1/traces"].contains("ingest") && sent["/v1/traces"].contains("drain"), "{sent:?}");
    assert!(sent["/v1/metrics"].contains("forebay_ingest_answers_total"), "{:?}", sent.keys());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machines_role_gives_the_credentials() {
    // no real one is to be had here: the container's endpoint and the store, which keeps how requests were signed
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", tcp.local_addr().unwrap());
    let (signed, mut signatures) = tokio::sync::mpsc::unbounded_channel();
    let answer = move |request: axum::extract::Request| async move {
        if request.uri().path() == "/role" {
            let role = json!({
                "AccessKeyId": "of-the-role", "SecretAccessKey": "secret", "Token": "token", "Expiration": "2099-01-01T00:00:00Z",
            });
            return axum::Json(role).into_response();
        }
        let _ = signed.send(request.headers()["authorization"].to_str().unwrap().to_owned());
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    };
    tokio::spawn(async move { axum::serve(tcp, axum::Router::new().fallback(answer)).await });
    let folder = tempfile::tempdir().unwrap();
    let mut settings = s3_settings(
        &Endpoint { url: endpoint.clone(), access_key: String::new(), secret_key: String::new() },
        "photos",
    );
    settings.retain(|(name, _)| !["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"].contains(&name.as_str()));
    settings.push(("AWS_CONTAINER_CREDENTIALS_FULL_URI".to_owned(), format!("{endpoint}/role")));
    settings.push(("HOME".to_owned(), folder.path().display().to_string()));
    let serve = Program::start("serve", &settings, folder.path()).await;
    let body = json_upload("cam-1", None, &photo(1)).to_string();
    let request = reqwest::Client::builder().no_proxy().build().unwrap().post(&serve.url);
    let posted = request.header("content-type", "application/json").body(body).send().await.unwrap();
    assert_eq!(posted.status(), StatusCode::CREATED);
    let signature = tokio::time::timeout(PATIENCE, signatures.recv()).await.expect("nothing is sent").unwrap();
    assert!(signature.contains("Credential=of-the-role/"), "{signature}");
}
