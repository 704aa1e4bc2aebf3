//! The device API: every kind of body, every answer, and that what is refused leaves nothing behind.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use forebay::fleet::photo::Camera;
use forebay::upload::Sha256;

use crate::support::site::{Answer, Site};
use crate::support::{eventually, json_upload, photo};

/// Posts `body` and checks that it is refused as `status` and `problem`, and that nothing is kept of it.
async fn refused(site: &Site, body: impl Into<reqwest::Body>, status: u16, problem: &str) {
    let answer = site.post_json(body).await;
    assert_eq!((answer.status, answer.problem()), (status, problem), "{answer:?}");
    nothing_is_kept(site).await;
}

async fn nothing_is_kept(site: &Site) {
    assert_eq!(site.records().await, []);
    assert_eq!(site.files().await, (0, 0));
}

fn with(field: &str, value: Value) -> String {
    let mut body = json_upload("cam-1", None, &photo(1));
    body[field] = value;
    body.to_string()
}

#[tokio::test]
async fn a_json_upload_is_acknowledged_with_all_that_the_device_needs() {
    let site = Site::start(&[("s3-prefix", "site-7")]).await;
    let photo = photo(1);
    let answer = site.post_json(json_upload("cam-1", Some("42"), &photo).to_string()).await;
    assert_eq!(answer.status, 201);
    let id = answer.body["id"].as_str().unwrap();
    assert_eq!(answer.location, Some(format!("/v1/uploads/{id}")));
    assert_eq!(answer.body["device_id"], "cam-1");
    assert_eq!(answer.body["size_bytes"], photo.len());
    assert_eq!(answer.body["sha256"], Sha256::of(&photo).to_string());
    assert_eq!(answer.body["state"], "queued");
    let key = answer.body["object_key"].as_str().unwrap();
    assert!(key.starts_with("site-7/cam-1/") && key.ends_with(&format!("/{id}.jpg")), "{key}");
    assert!(answer.body["received_at"].as_str().unwrap().ends_with('Z'));
}

#[tokio::test]
async fn the_three_bodies_have_one_meaning() {
    let site = Site::start(&[]).await;
    let photo = photo(1);
    let sha256 = Sha256::of(&photo);

    let mut body = json_upload("cam-1", Some("json"), &photo);
    body["captured_at"] = "2026-11-21T08:30:00+01:00".into();
    body["filename"] = "gate.jpg".into();
    body["priority"] = "high".into();
    body["sha256"] = sha256.to_string().into();
    body["metadata"] = json!({"site": "7"});
    assert_eq!(site.post_json(body.to_string()).await.status, 201);

    let form = reqwest::multipart::Form::new()
        .text("device_id", "cam-1")
        .text("upload_id", "multipart")
        .text("captured_at", "2026-11-21T08:30:00+01:00")
        .text("priority", "high")
        .text("sha256", sha256.to_string())
        .text("metadata", r#"{"site":"7"}"#)
        .part("image", reqwest::multipart::Part::bytes(photo.clone()).file_name("gate.jpg"));
    let request = site.client.post(format!("{}/v1/uploads", site.url)).multipart(form);
    assert_eq!(request.send().await.unwrap().status(), 201);

    let query =
        "captured_at=2026-11-21T08:30:00%2B01:00&filename=gate.jpg&priority=high&metadata=%7B%22site%22%3A%227%22%7D";
    let request = site
        .client
        .post(format!("{}/?{query}", site.url))
        .header("content-type", "image/jpeg")
        .header("x-device-id", "cam-1")
        .header("idempotency-key", "raw")
        .header("content-digest", format!("sha-256=:{}:", sha256.base64()))
        .body(photo.clone());
    assert_eq!(request.send().await.unwrap().status(), 201);

    let records = site.records().await;
    assert_eq!(records.len(), 3);
    for record in records {
        let upload = &record.upload;
        assert_eq!(site.spool.read(upload.clone()).await.unwrap(), photo, "{:?}", upload.upload_id);
        assert_eq!(upload.device_id.as_str(), "cam-1");
        assert_eq!(upload.captured_at, Some("2026-11-21T07:30:00Z".parse().unwrap()));
        assert_eq!(upload.filename.as_deref(), Some("gate.jpg"));
        assert_eq!(upload.priority, forebay::upload::Priority::High);
        assert_eq!(upload.metadata.get("site").map(String::as_str), Some("7"));
    }
}

#[tokio::test]
async fn base64_is_taken_in_every_form_that_devices_write() {
    let site = Site::start(&[]).await;
    let photo = photo(1);
    let standard = base64_simd::STANDARD.encode_to_string(&photo);
    let lines: Vec<&str> = standard.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
    for image in [
        standard.clone(),
        lines.join("\r\n"),
        base64_simd::URL_SAFE.encode_to_string(&photo),
        base64_simd::STANDARD_NO_PAD.encode_to_string(&photo),
        base64_simd::URL_SAFE_NO_PAD.encode_to_string(&photo),
        format!("data:image/jpeg;base64,{standard}"),
    ] {
        let answer = site.post_json(json!({"device_id": "cam-1", "image": image}).to_string()).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        assert_eq!(answer.body["sha256"], Sha256::of(&photo).to_string());
    }
}

#[tokio::test]
async fn a_retry_is_the_same_upload_and_gets_the_same_answer() {
    let site = Site::start(&[]).await;
    let body = json_upload("cam-1", Some("42"), &photo(1)).to_string();
    let first = site.post_json(body.clone()).await;
    let again = site.post_json(body).await;
    assert_eq!((first.status, again.status), (201, 200));
    assert_eq!(first.body, again.body);
    assert_eq!(site.files().await, (1, 0));
}

#[tokio::test]
async fn fifty_retries_at_once_are_one_upload() {
    let site = Site::start(&[]).await;
    let body = json_upload("cam-1", Some("42"), &photo(1)).to_string();
    let answers = futures_util::future::join_all((0..50).map(|_| site.post_json(body.clone()))).await;
    assert_eq!(answers.iter().filter(|a| a.status == 201).count(), 1);
    assert!(answers.iter().all(|a| a.body == answers[0].body));
    assert_eq!((site.records().await.len(), site.files().await), (1, (1, 0)));
}

#[tokio::test]
async fn other_bytes_under_the_same_upload_id_are_refused_and_the_first_are_kept() {
    let site = Site::start(&[]).await;
    let first = site.post_json(json_upload("cam-1", Some("42"), &photo(1)).to_string()).await;
    let other = site.post_json(json_upload("cam-1", Some("42"), &photo(2)).to_string()).await;
    assert_eq!((other.status, other.problem()), (422, "upload-id-reused"));
    assert_eq!(site.files().await, (1, 0));
    assert_eq!(site.records().await[0].upload.sha256.to_string(), first.body["sha256"].as_str().unwrap());
}

#[tokio::test]
async fn a_retry_long_after_the_photo_was_uploaded_and_removed_is_answered_from_its_record() {
    let site = Site::start(&[]).await;
    let body = json_upload("cam-1", Some("42"), &photo(1)).to_string();
    site.post_json(body.clone()).await;
    let lease = site
        .queue
        .claim("drain", 1, std::time::Duration::from_secs(60), forebay::queue::Pick::Oldest)
        .await
        .unwrap()
        .remove(0);
    site.queue.finish(&lease).await.unwrap();
    site.spool.remove(lease.upload.clone()).await.unwrap();
    site.queue.removed(&[lease.upload.id]).await.unwrap();
    let again = site.post_json(body).await;
    assert_eq!((again.status, again.body["state"].as_str()), (200, Some("uploaded")));
    assert_eq!(site.files().await, (0, 0), "its photo is not needed again");
    let other = site.post_json(json_upload("cam-1", Some("42"), &photo(2)).to_string()).await;
    assert_eq!((other.status, site.files().await), (422, (0, 0)));
}

#[tokio::test]
async fn without_a_body_a_length_is_asked_for() {
    let site = Site::start(&[]).await;
    let mut stream = tokio::net::TcpStream::connect(site.url.trim_start_matches("http://")).await.unwrap();
    let head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 411 ") && answer.contains("urn:forebay:problem:length-required"), "{answer}");
    refused(&site, "", 411, "length-required").await;
    refused(&site, " ", 400, "malformed-body").await;
}

#[tokio::test]
async fn what_is_not_json_is_refused() {
    let site = Site::start(&[]).await;
    let upload = json_upload("cam-1", None, &photo(1)).to_string();
    for body in [
        "this is no JSON".to_owned(),
        "[1, 2]".to_owned(),
        "[".repeat(10_000),
        format!(r#"{{"device_id": {}"#, "[".repeat(10_000)),
        format!("{upload}{upload}"),
    ] {
        refused(&site, body, 400, "malformed-body").await;
    }
}

#[tokio::test]
async fn json_cut_off_anywhere_is_refused() {
    let site = Site::start(&[]).await;
    let upload = json_upload("cam-1", None, &photo(1)).to_string();
    let near_the_ends = (1..60).chain(upload.len() - 60..upload.len());
    for end in near_the_ends.chain((60..upload.len() - 60).step_by(997)) {
        let answer = site.post_json(upload[..end].to_owned()).await;
        assert_eq!(answer.status, 400, "cut off at {end}: {answer:?}");
    }
    nothing_is_kept(&site).await;
}

#[tokio::test]
async fn a_missing_or_empty_image_is_refused() {
    let site = Site::start(&[]).await;
    refused(&site, json!({"device_id": "cam-1"}).to_string(), 400, "invalid-field").await;
    for image in [json!(""), json!(null), json!(17), json!({})] {
        refused(&site, with("image", image), 400, "invalid-field").await;
    }
}

#[tokio::test]
async fn bad_base64_is_refused_wherever_it_is() {
    let site = Site::start(&[]).await;
    let good = base64_simd::STANDARD.encode_to_string(photo(1));
    for place in [0, good.len() / 2, good.len() - 5] {
        let mut bad = good.clone();
        bad.replace_range(place..place + 1, "*");
        let answer = site.post_json(with("image", bad.into())).await;
        assert_eq!((answer.status, answer.problem()), (400, "malformed-body"));
        assert!(answer.body["detail"].as_str().unwrap().contains(&place.to_string()), "{answer:?}");
    }
    refused(&site, with("image", "data:image/jpeg,%FF%D8".into()), 400, "malformed-body").await;
    refused(&site, with("image", format!("{good}A").into()), 400, "malformed-body").await;
}

#[tokio::test]
async fn an_image_over_the_limit_is_refused_declared_or_not() {
    let site = Site::start(&[("upload-max-bytes", "10kB")]).await;
    refused(&site, json_upload("cam-1", None, &photo(1)).to_string(), 413, "too-large").await;
    let body = json_upload("cam-1", None, &photo(1)).to_string();
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = body.as_bytes().chunks(1000).map(|c| Ok(c.to_vec())).collect();
    let undeclared = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    refused(&site, undeclared, 413, "too-large").await;
    let raw =
        site.client.post(format!("{}/?device_id=cam-1", site.url)).header("content-type", "image/jpeg").body(photo(1));
    assert_eq!(Answer::of(raw.send().await.unwrap()).await.problem(), "too-large");
    let form = reqwest::multipart::Form::new()
        .text("device_id", "cam-1")
        .part("file", reqwest::multipart::Part::bytes(photo(1)));
    let answer = Answer::of(site.client.post(&site.url).multipart(form).send().await.unwrap()).await;
    assert_eq!(answer.problem(), "too-large");
    nothing_is_kept(&site).await;
}

#[tokio::test]
async fn a_device_that_is_still_sending_gets_its_refusal_and_not_a_reset() {
    let site = Site::start(&[("upload-max-bytes", "10kB")]).await;
    for _ in 0..20 {
        let answer = site.post_json(vec![b'x'; 3_000_000]).await;
        assert_eq!(answer.status, 413);
    }
}

#[tokio::test]
async fn text_that_claims_to_be_a_jpeg_is_refused() {
    let site = Site::start(&[]).await;
    let text = base64_simd::STANDARD.encode_to_string(b"this is text that claims to be a JPEG");
    let body = json!({"device_id": "cam-1", "image": text, "content_type": "image/jpeg", "filename": "photo.jpg"});
    refused(&site, body.to_string(), 415, "not-an-image").await;
    refused(&site, with("content_type", "text/html".into()), 415, "not-an-image").await;
}

#[tokio::test]
async fn other_kinds_of_body_are_refused() {
    let site = Site::start(&[]).await;
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", ""] {
        let request = site.client.post(&site.url).header("content-type", content_type).body("x");
        let answer = Answer::of(request.send().await.unwrap()).await;
        assert_eq!((answer.status, answer.problem()), (415, "unsupported-media-type"), "{content_type}");
    }
    let request = site.client.post(&site.url).header("content-type", "multipart/form-data").body("x");
    assert_eq!(Answer::of(request.send().await.unwrap()).await.problem(), "malformed-body");
}

#[tokio::test]
async fn a_multipart_body_that_is_cut_off_or_has_no_photo_is_refused() {
    let site = Site::start(&[]).await;
    let post = async |body: String| {
        let request = site.client.post(&site.url).header("content-type", "multipart/form-data; boundary=b").body(body);
        Answer::of(request.send().await.unwrap()).await
    };
    let cut = post("--b\r\nContent-Disposition: form-data; name=\"image\"\r\n\r\nhalf a ph".to_owned()).await;
    assert_eq!((cut.status, cut.problem()), (400, "malformed-body"));
    let none =
        post("--b\r\nContent-Disposition: form-data; name=\"device_id\"\r\n\r\ncam-1\r\n--b--\r\n".to_owned()).await;
    assert_eq!((none.status, none.problem()), (400, "invalid-field"));
    let part = "--b\r\nContent-Disposition: form-data; name=\"image\"\r\n\r\nx\r\n";
    let two = post(format!("{part}{part}--b--\r\n")).await;
    assert_eq!((two.status, two.problem()), (400, "invalid-field"));
    nothing_is_kept(&site).await;
}

#[tokio::test]
async fn a_multipart_body_is_given_up_when_all_but_its_photo_is_too_long_declared_or_not() {
    let site = Site::start(&[]).await;
    let post = async |body: reqwest::Body| {
        let request = site.client.post(&site.url).header("content-type", "multipart/form-data; boundary=b").body(body);
        Answer::of(request.send().await.unwrap()).await
    };
    let undeclared = |body: String| {
        let pieces: Vec<_> =
            body.as_bytes().chunks(1000).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
        reqwest::Body::wrap_stream(futures_util::stream::iter(pieces))
    };
    let another_boundary = format!("--c\r\n{}", "x".repeat(300_000));
    let endless_head = format!("--b\r\nContent-Disposition: form-data; name=\"{}", "x".repeat(300_000));
    for body in [another_boundary, endless_head] {
        for answer in [post(undeclared(body.clone())).await, post(body.into()).await] {
            assert_eq!((answer.status, answer.problem()), (413, "too-large"), "{answer:?}");
            assert!(
                answer.body["detail"].as_str().unwrap().contains("is the boundary the declared one?"),
                "{answer:?}"
            );
        }
    }
    nothing_is_kept(&site).await;
}

#[tokio::test]
async fn a_multipart_photo_of_several_pieces_is_taken_with_long_fields_before_or_after_it() {
    let site = Site::start(&[]).await;
    let photo = Camera::new(1_000_000).unwrap().photo(1, "in many pieces");
    let part = |name: &str, bytes: &[u8]| {
        let head = format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        [head.as_bytes(), bytes, b"\r\n"].concat()
    };
    let (image, note) = (part("image", &photo), part("note", &[b'x'; 60_000]));
    for (number, piece_bytes) in [1000, 10_000, 100_000, 2_000_000].into_iter().enumerate() {
        for (place, parts) in [[&note, &image], [&image, &note]].into_iter().enumerate() {
            let upload_id = format!("{number}-{place}");
            let head = [part("device_id", b"cam-1"), part("upload_id", upload_id.as_bytes())].concat();
            let body = [&head, parts[0], parts[1], b"--b--\r\n".as_slice()].concat();
            let pieces: Vec<_> =
                body.chunks(piece_bytes).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
            let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
            let request =
                site.client.post(&site.url).header("content-type", "multipart/form-data; boundary=b").body(body);
            let answer = Answer::of(request.send().await.unwrap()).await;
            assert_eq!(answer.status, 201, "{answer:?}");
            assert_eq!(answer.body["sha256"], Sha256::of(&photo).to_string());
        }
    }
}

#[tokio::test]
async fn a_device_id_that_could_be_a_path_or_is_none_is_refused() {
    let site = Site::start(&[]).await;
    for device in ["../../etc/passwd", "a/b", "cam\0", "", "caméra", ".", &"x".repeat(300)] {
        refused(&site, json_upload(device, None, &photo(1)).to_string(), 400, "invalid-field").await;
    }
    let none = json!({"image": base64_simd::STANDARD.encode_to_string(photo(1))});
    refused(&site, none.to_string(), 400, "invalid-field").await;
}

#[tokio::test]
async fn a_field_that_is_not_valid_is_refused_by_name() {
    let site = Site::start(&[]).await;
    for (field, value) in [
        ("metadata", json!({"site": 7})),
        ("metadata", json!({"nested": {"a": "b"}})),
        ("metadata", json!({"nul": "\0"})),
        ("metadata", json!("site")),
        ("captured_at", json!("yesterday")),
        ("captured_at", json!(1_763_000_000)),
        ("priority", json!("urgent")),
        ("sha256", json!("abc")),
        ("upload_id", json!("x".repeat(201))),
        ("upload_id", json!("line\nbreak")),
        ("filename", json!("x".repeat(256))),
    ] {
        let answer = site.post_json(with(field, value.clone())).await;
        assert_eq!((answer.status, answer.problem()), (400, "invalid-field"), "{field} {value}");
    }
    nothing_is_kept(&site).await;
}

#[tokio::test]
async fn a_digest_that_does_not_match_is_refused() {
    let site = Site::start(&[]).await;
    refused(&site, with("sha256", Sha256::of(b"other").to_string().into()), 422, "digest-mismatch").await;
    let request = site
        .client
        .post(format!("{}/?device_id=cam-1", site.url))
        .header("content-type", "image/jpeg")
        .header("content-digest", format!("sha-256=:{}:", Sha256::of(b"other").base64()))
        .body(photo(1));
    let answer = Answer::of(request.send().await.unwrap()).await;
    assert_eq!((answer.status, answer.problem()), (422, "digest-mismatch"));
    nothing_is_kept(&site).await;
}

#[tokio::test]
async fn a_device_that_hangs_up_in_the_middle_leaves_nothing_behind() {
    let photo = photo(1);
    let json = json_upload("cam-1", None, &photo).to_string().into_bytes();
    let form: [&[u8]; 3] = [b"--b\r\nContent-Disposition: form-data; name=\"image\"\r\n\r\n", &photo, b"\r\n--b--"];
    let bodies =
        [("application/json", json), ("multipart/form-data; boundary=b", form.concat()), ("image/jpeg", photo.clone())];
    for (content_type, body) in bodies {
        let site = Site::start(&[]).await;
        let length = body.len();
        let head = format!(
            "POST / HTTP/1.1\r\nHost: x\r\nX-Device-Id: cam-1\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n"
        );
        let near_the_ends = (0..60).chain(length - 60..length);
        for end in near_the_ends.chain((60..length - 60).step_by(199)) {
            let mut stream = tokio::net::TcpStream::connect(site.url.trim_start_matches("http://")).await.unwrap();
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(&body[..end]).await.unwrap();
            drop(stream);
        }
        // once a later photo is answered, what came before it was seen
        site.accept("cam-2", &self::photo(2)).await;
        assert_eq!((site.records().await.len(), site.files().await), (1, (1, 0)), "{content_type}");
    }
}

#[tokio::test]
async fn a_device_that_hangs_up_right_after_its_last_byte_is_kept_or_not_but_never_by_half() {
    let site = Site::start(&[]).await;
    for n in 0..20 {
        let body = json_upload("cam-1", Some(&n.to_string()), &photo(n)).to_string();
        let head = format!(
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = tokio::net::TcpStream::connect(site.url.trim_start_matches("http://")).await.unwrap();
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        drop(stream);
    }
    eventually("files and records to agree", async || {
        let (photos, unfinished) = site.files().await;
        (photos == site.records().await.len() && unfinished == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn uploads_that_come_together_over_one_connection_are_all_answered() {
    let site = Site::start(&[]).await;
    let requests: Vec<String> = (0..3)
        .map(|n| {
            let body = json_upload("cam-1", Some(&n.to_string()), &photo(n)).to_string();
            let last = if n == 2 { "Connection: close\r\n" } else { "" };
            format!(
                "POST / HTTP/1.1\r\nHost: x\r\n{last}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
        })
        .collect();
    let mut stream = tokio::net::TcpStream::connect(site.url.trim_start_matches("http://")).await.unwrap();
    stream.write_all(requests.concat().as_bytes()).await.unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).await.unwrap();
    assert_eq!(answers.matches("HTTP/1.1 201 ").count(), 3, "{answers}");
    assert_eq!(site.files().await, (3, 0));
}

#[tokio::test]
async fn a_body_that_comes_too_slowly_is_told_so() {
    let site = Site::start(&[("body-timeout", "300ms")]).await;
    let mut stream = tokio::net::TcpStream::connect(site.url.trim_start_matches("http://")).await.unwrap();
    let head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = stream.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]);
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body-too-slow"), "{answer}");
    nothing_is_kept(&site).await;
}

#[tokio::test]
async fn a_full_spool_says_when_to_come_again() {
    let site = Site::start(&[("spool-max", "1kB")]).await;
    let answer = site.post_json(json_upload("cam-1", None, &photo(1)).to_string()).await;
    assert_eq!((answer.status, answer.problem()), (503, "spool-full"));
    assert!((30..=60).contains(&answer.retry_after.unwrap()), "{answer:?}");
    nothing_is_kept(&site).await;
}

#[tokio::test]
async fn lists_are_paged_and_filtered() {
    let site = Site::start(&[]).await;
    for n in 0..5 {
        site.accept(if n % 2 == 0 { "cam-even" } else { "cam-odd" }, &photo(n)).await;
    }
    let get = async |query: &str| {
        Answer::of(site.client.get(format!("{}/list?{query}", site.url)).send().await.unwrap()).await
    };
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = get(&format!("limit=2&cursor={cursor}")).await.body;
        seen.extend(page["uploads"].as_array().unwrap().iter().map(|u| u["id"].as_str().unwrap().to_owned()));
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = next.to_owned();
    }
    let newest_first: Vec<String> = site.records().await.iter().map(|r| r.upload.id.to_string()).collect();
    assert_eq!(seen, newest_first);
    assert_eq!(get("device_id=cam-odd").await.body["uploads"].as_array().unwrap().len(), 2);
    assert_eq!(get("state=uploaded").await.body["uploads"].as_array().unwrap().len(), 0);
    for wrong in
        ["limit=1&limit=2", "limit=0", "limit=501", "limit=many", "cursor=nonsense", "state=lost", "device_id=../x"]
    {
        let answer = get(wrong).await;
        assert_eq!((answer.status, answer.problem()), (400, "invalid-field"), "{wrong}");
    }
}

#[tokio::test]
async fn an_upload_and_its_photo_can_be_fetched() {
    let site = Site::start(&[]).await;
    let record = site.accept("cam-1", &photo(1)).await;
    let at = |path: &str| site.client.get(format!("{}/v1/uploads/{path}", site.url)).send();
    let view = Answer::of(at(&record.upload.id.to_string()).await.unwrap()).await;
    assert_eq!((view.status, view.body["state"].as_str()), (200, Some("queued")));
    let image = at(&format!("{}/image", record.upload.id)).await.unwrap();
    assert_eq!(image.headers()["content-type"], "image/jpeg");
    assert_eq!(image.bytes().await.unwrap(), photo(1));
    for nowhere in ["no-uuid", "01936f0e-7b1c-7e3a-9d2f-0c4b8a6d5e1f", "01936f0e-7b1c-7e3a-9d2f-0c4b8a6d5e1f/image"] {
        let answer = Answer::of(at(nowhere).await.unwrap()).await;
        assert_eq!((answer.status, answer.problem()), (404, "not-found"), "{nowhere}");
    }
    site.spool.remove(record.upload.clone()).await.unwrap();
    let gone = Answer::of(at(&format!("{}/image", record.upload.id)).await.unwrap()).await;
    assert!(gone.body["detail"].as_str().unwrap().contains(&record.upload.object_key), "{gone:?}");
}

#[tokio::test]
async fn paths_and_methods_that_are_not_served_are_problems_too() {
    let site = Site::start(&[]).await;
    let nowhere = Answer::of(site.client.get(format!("{}/nowhere", site.url)).send().await.unwrap()).await;
    assert_eq!((nowhere.status, nowhere.problem()), (404, "not-found"));
    let method = Answer::of(site.client.delete(format!("{}/list", site.url)).send().await.unwrap()).await;
    assert_eq!((method.status, method.problem()), (405, "method-not-allowed"));
}

#[tokio::test]
async fn health_the_description_and_its_page_are_served() {
    let site = Site::start(&[]).await;
    let get = async |path: &str| site.client.get(format!("{}{path}", site.url)).send().await.unwrap();
    assert_eq!(get("/livez").await.status(), 200);
    assert_eq!(Answer::of(get("/readyz").await).await.body["status"], "ready");
    let description = Answer::of(get("/openapi.json").await).await.body;
    assert!(description["openapi"].as_str().unwrap().starts_with("3.1"), "{}", description["openapi"]);
    for path in ["/v1/uploads", "/v1/uploads/{id}", "/v1/uploads/{id}/image", "/livez", "/readyz"] {
        assert!(description["paths"].get(path).is_some(), "{path} is not described");
    }
    let page = get("/docs/").await.text().await.unwrap();
    assert!(page.contains("swagger-ui"), "{page}");
    assert!(!page.contains("src=\"http") && !page.contains("href=\"http"), "its assets are embedded");
    assert_eq!(get("/docs/swagger-ui-bundle.js").await.status(), 200);
}

#[tokio::test]
async fn while_the_queue_is_away_photos_are_acknowledged_and_taken_in_later() {
    let site = Site::start(&[]).await;
    site.queue.close().await; // as good as away
    let answer = site.post_json(json_upload("cam-1", Some("42"), &photo(1)).to_string()).await;
    assert_eq!(answer.status, 201);
    let journaled = site.spool.journaled(10).await.unwrap();
    assert_eq!(journaled.iter().map(|u| u.id.to_string()).collect::<Vec<_>>(), [answer.body["id"].as_str().unwrap()]);
    let ready = Answer::of(site.client.get(format!("{}/readyz", site.url)).send().await.unwrap()).await;
    assert_eq!((ready.status, ready.body["status"].as_str()), (200, Some("degraded")));
}

#[tokio::test]
async fn an_empty_upload_id_is_none_so_the_idempotency_key_counts() {
    let site = Site::start(&[]).await;
    let mut body = json_upload("cam-1", None, &photo(1));
    body["upload_id"] = "".into();
    let post = async || {
        let request = site.client.post(&site.url).header("content-type", "application/json");
        let request = request.header("idempotency-key", "k1").body(body.to_string());
        Answer::of(request.send().await.unwrap()).await
    };
    let (first, again) = (post().await, post().await);
    assert_eq!((first.status, again.status), (201, 200));
    assert_eq!(first.body, again.body);
}

#[tokio::test]
async fn while_the_queue_is_away_other_bytes_under_one_upload_id_are_refused_whatever_they_are() {
    let site = Site::start(&[]).await;
    site.queue.close().await;
    let first = site.post_json(json_upload("cam-1", Some("42"), &photo(1)).to_string()).await;
    assert_eq!(first.status, 201);
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    png.extend_from_slice(&[0; 100]);
    for other in [photo(2), png] {
        let answer = site.post_json(json_upload("cam-1", Some("42"), &other).to_string()).await;
        assert_eq!((answer.status, answer.problem()), (422, "upload-id-reused"));
    }
    assert_eq!(site.files().await, (1, 0));
}

#[tokio::test]
async fn readiness_says_that_there_is_no_room_for_a_photo() {
    let site = Site::start(&[("spool-max", "100kB")]).await;
    let ready = Answer::of(site.client.get(format!("{}/readyz", site.url)).send().await.unwrap()).await;
    assert_eq!((ready.status, ready.problem()), (503, "spool-full"), "{ready:?}");
}

/// Twelve photos of which the first halves are there, more than may wait in memory: they are on disk before they are whole.
#[tokio::test(flavor = "multi_thread")]
async fn photos_that_come_slowly_are_on_disk_before_they_are_whole_when_memory_is_short() {
    let site = Site::start(&[]).await;
    let photos: Vec<Vec<u8>> = (0..12).map(|n| [photo(n), vec![n as u8; 5_000_000]].concat()).collect();
    let (go_on, may_go_on) = tokio::sync::watch::channel(false);
    let sent = photos.iter().map(|photo| {
        let body = json_upload("cam-1", None, photo).to_string().into_bytes();
        let halves = [body[..body.len() / 2].to_vec(), body[body.len() / 2..].to_vec()];
        let may_go_on = may_go_on.clone();
        let pieces =
            futures_util::stream::unfold((halves.into_iter(), may_go_on), async |(mut halves, mut may_go_on)| {
                let half = halves.next()?;
                if halves.len() == 0 {
                    may_go_on.wait_for(|go_on| *go_on).await.unwrap();
                }
                Some((Ok::<_, std::io::Error>(half), (halves, may_go_on)))
            });
        site.post_json(reqwest::Body::wrap_stream(Box::pin(pieces)))
    });
    let begun = async {
        let begun =
            eventually("photos to be begun on disk", async || Some(site.files().await.1).filter(|n| *n > 0)).await;
        go_on.send_replace(true);
        begun
    };
    let (answers, begun) = tokio::join!(futures_util::future::join_all(sent), begun);
    assert!(begun <= 12, "{begun} files for twelve photos");
    for (photo, answer) in photos.iter().zip(answers) {
        assert_eq!((answer.status, &answer.body["sha256"]), (201, &Sha256::of(photo).to_string().into()));
    }
    for record in site.records().await {
        site.spool.read(record.upload).await.unwrap();
    }
    assert_eq!(site.files().await, (12, 0));
}

/// What was begun on disk for a device that hangs up is gone with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_hangs_up_leaves_nothing_of_a_photo_that_was_begun_on_disk() {
    let site = Site::start(&[]).await;
    let half = |n| {
        let body = json_upload("cam-1", None, &[photo(n), vec![0; 5_000_000]].concat()).to_string().into_bytes();
        let first = futures_util::stream::iter([Ok::<_, std::io::Error>(body[..body.len() / 2].to_vec())]);
        let pieces = futures_util::StreamExt::chain(first, futures_util::stream::pending());
        site.post_json(reqwest::Body::wrap_stream(pieces))
    };
    let sent = futures_util::future::join_all((0..12).map(half));
    let begun = eventually("photos to be begun on disk", async || {
        Some(()).filter(|()| site.spool.incoming_count().unwrap() > 0)
    });
    tokio::select! {
        _ = sent => panic!("half a body was answered"),
        () = begun => {}
    }
    eventually("nothing to be left", async || (site.files().await == (0, 0)).then_some(())).await;
    nothing_is_kept(&site).await;
}
