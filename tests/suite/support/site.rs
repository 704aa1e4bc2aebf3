//! The appliance's parts in this process: a spool and a queue of their own, a device listener, a bucket.

use std::time::Duration;

use forebay::bucket::Bucket;
use forebay::config::{Config, Source};
use forebay::embedded_s3::EmbeddedS3;
use forebay::http::listener;
use forebay::ingest::Ingest;
use forebay::queue::{Cursor, Filter, Queue, Record};
use forebay::spool::Spool;
use tokio_util::sync::CancellationToken;

/// A box with a SQLite queue whose devices are answered by this process.
pub struct Site {
    pub config: Config,
    pub spool: Spool,
    pub queue: Queue,
    pub url: String,
    pub client: reqwest::Client,
    stop: CancellationToken,
    pub folder: tempfile::TempDir,
}

impl Site {
    /// With the settings given as flags.
    pub async fn start(flags: &[(&str, &str)]) -> Site {
        let folder = tempfile::tempdir().unwrap();
        let mut source = Source::default();
        source.flags.insert("data-dir".into(), folder.path().join("data").display().to_string());
        source.flags.extend(flags.iter().map(|(name, text)| (name.to_string(), text.to_string())));
        let config = Config::load(&source).unwrap();
        let spool = Spool::open(&config.data_dir, config.spool).unwrap();
        let queue = Queue::open(&config.queue).unwrap();
        queue.migrate().await.unwrap();
        let stop = CancellationToken::new();
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", tcp.local_addr().unwrap());
        let router = Ingest::new(&config, spool.clone(), queue.clone(), stop.clone()).router();
        tokio::spawn(listener::serve(tcp, router, stop.clone(), Duration::from_secs(1)));
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Site { config, spool, queue, url, client, stop, folder }
    }

    /// Posts a JSON body as it is.
    pub async fn post_json(&self, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.client.post(&self.url).header("content-type", "application/json").body(body);
        Answer::of(request.send().await.unwrap()).await
    }

    /// Accepts `photo` and gives its record.
    pub async fn accept(&self, device: &str, photo: &[u8]) -> Record {
        let answer = self.post_json(super::json_upload(device, None, photo).to_string()).await;
        assert_eq!(answer.status, 201, "{:?}", answer.body);
        let id = answer.body["id"].as_str().unwrap().parse().unwrap();
        self.queue.get(id).await.unwrap().unwrap()
    }

    /// Accepts so many photos of one device, and gives their records.
    pub async fn accept_photos(&self, count: usize) -> Vec<Record> {
        let mut records = Vec::new();
        for number in 0..count {
            records.push(self.accept("cam-1", &super::photo(number)).await);
        }
        records
    }

    /// Every record, newest first.
    pub async fn records(&self) -> Vec<Record> {
        self.queue.list(&Filter::default(), Cursor::START, 500).await.unwrap()
    }

    /// Files in the spool: finished photos, and unfinished ones.
    pub async fn files(&self) -> (usize, usize) {
        let mut photos = 0;
        self.spool.walk(|_, _| photos += 1).unwrap();
        (photos, self.spool.incoming_count().unwrap())
    }

    /// A bucket on an S3 server in this process.
    pub async fn bucket(&self) -> (EmbeddedS3, Bucket) {
        let s3 = EmbeddedS3::start(&self.folder.path().join("s3")).await.unwrap();
        let bucket = Bucket::at(s3.endpoint(), "photos");
        bucket.create().await.unwrap();
        (s3, bucket)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// An answer to a device.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub content_type: String,
    pub retry_after: Option<u64>,
    pub location: Option<String>,
    pub body: serde_json::Value,
}

impl Answer {
    pub async fn of(response: reqwest::Response) -> Answer {
        let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let (content_type, location) = (header("content-type").unwrap_or_default(), header("location"));
        let retry_after = header("retry-after").map(|seconds| seconds.parse().unwrap());
        let status = response.status().as_u16();
        let text = response.bytes().await.unwrap();
        let body = serde_json::from_slice(&text).unwrap_or(serde_json::Value::Null);
        Answer { status, content_type, retry_after, location, body }
    }

    /// The end of the problem's type.
    pub fn problem(&self) -> &str {
        assert_eq!(self.content_type, "application/problem+json", "{self:?}");
        assert_eq!(self.body["status"], self.status, "{self:?}");
        self.body["type"].as_str().unwrap().strip_prefix("urn:forebay:problem:").unwrap()
    }
}
