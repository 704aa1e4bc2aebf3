//! Several ingest processes on one spool and one queue are one to the devices.

use forebay::spool::Spool;

use crate::support::program::Program;
use crate::support::site::Answer;
use crate::support::{NO_LIMITS, json_upload, photo, postgres};

#[tokio::test(flavor = "multi_thread")]
async fn fifty_retries_at_once_over_three_replicas_are_one_upload() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let settings = [("FOREBAY_QUEUE_URL".to_owned(), url)];
    let mut replicas = Vec::new();
    for _ in 0..3 {
        replicas.push(Program::start("ingest", &settings, &data).await);
    }
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let post = async |replica: &Program, body: String| {
        let request = client.post(&replica.url).header("content-type", "application/json").body(body);
        Answer::of(request.send().await.unwrap()).await
    };

    let body = json_upload("cam-1", Some("42"), &photo(1)).to_string();
    let all = (0..50).map(|number| post(&replicas[number % 3], body.clone()));
    let answers = futures_util::future::join_all(all).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1);
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 49);
    assert!(answers.iter().all(|answer| answer.body == answers[0].body), "{answers:?}");

    for replica in &replicas {
        let other = post(replica, json_upload("cam-1", Some("42"), &photo(2)).to_string()).await;
        assert_eq!((other.status, other.problem()), (422, "upload-id-reused"));
        let list = client.get(format!("{}/list", replica.url)).send().await.unwrap();
        let list = Answer::of(list).await.body["uploads"].clone();
        assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
        assert_eq!(list[0]["id"], answers[0].body["id"]);
    }
    let spool = Spool::open(&data, NO_LIMITS).unwrap();
    let mut photos = Vec::new();
    spool.walk(|_, record| photos.push(record.unwrap().sha256.to_string())).unwrap();
    assert_eq!(photos, [answers[0].body["sha256"].as_str().unwrap()]);
    assert_eq!(spool.incoming_count().unwrap(), 0);
}
