//! A site with a backlog: a spool and a queue with photos in them as ingest would have left them, for a drain to be started on.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay::config::{Config, QueueUrl, Source};
use forebay::fleet::photo::Camera;
use forebay::queue::{Books, Queue};
use forebay::spool::Spool;
use forebay::units::UnixMs;
use forebay::upload::{DeviceId, Priority, Upload, UploadId};
use tempfile::TempDir;

use super::{NO_LIMITS, upload_of};

/// The size of a photo.
pub const PHOTO_BYTES: u64 = 250_000;
/// Photos that are written at once.
const WRITERS: usize = 16;
/// How often the queue is asked how far it is.
const LOOK: Duration = Duration::from_millis(50);

/// A data folder and a queue, and photos in them.
pub struct Backlog {
    pub queue: Queue,
    /// Photos put there so far.
    pub photos: u64,
    spool: Spool,
    camera: Arc<Camera>,
    folder: TempDir,
}

impl Backlog {
    /// With a SQLite queue in its folder, or with that one.
    pub async fn new(queue_url: Option<&str>) -> Backlog {
        let folder = tempfile::Builder::new().prefix("forebay-backlog-").tempdir().unwrap();
        let data = folder.path().join("data");
        let mut source = Source::default();
        source.flags.insert("data-dir".into(), data.display().to_string());
        let mut config = Config::load(&source).unwrap();
        if let Some(url) = queue_url {
            config.queue = QueueUrl::Postgres(url.to_owned());
        }
        let spool = Spool::open(&data, NO_LIMITS).unwrap();
        let queue = Queue::open(&config.queue).unwrap();
        queue.migrate().await.unwrap();
        let camera = Arc::new(Camera::new(PHOTO_BYTES as usize).unwrap());
        Backlog { queue, photos: 0, spool, camera, folder }
    }

    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Puts so many bytes of photos there, as ingest would; how many photos.
    pub async fn add(&mut self, bytes: u64) -> u64 {
        let photos = bytes.div_ceil(PHOTO_BYTES);
        let mut writers = tokio::task::JoinSet::new();
        for _ in 0..photos {
            if writers.len() == WRITERS {
                writers.join_next().await.unwrap().unwrap();
            }
            self.photos += 1;
            let (spool, queue, camera, number) =
                (self.spool.clone(), self.queue.clone(), self.camera.clone(), self.photos);
            writers.spawn(async move {
                let (upload, photo) =
                    tokio::task::spawn_blocking(move || made(&camera, number as usize)).await.unwrap();
                spool.store(upload.clone(), photo).await.unwrap();
                queue.accept(upload).await.unwrap();
            });
        }
        while let Some(written) = writers.join_next().await {
            written.unwrap();
        }
        photos
    }

    pub async fn books(&self) -> Books {
        self.queue.books().await.unwrap()
    }

    /// Waits until no upload is queued any more; false when that takes longer than `patience`.
    pub async fn backlog_gone(&self, patience: Duration) -> bool {
        self.waited(patience, |books| books.queued.uploads == 0).await
    }

    /// Waits until every upload is in the bucket.
    pub async fn all_uploaded(&self, patience: Duration) -> bool {
        self.waited(patience, |books| books.backlog().uploads == 0).await
    }

    async fn waited(&self, patience: Duration, done: impl Fn(&Books) -> bool) -> bool {
        let began = Instant::now();
        loop {
            // a SQLite that others write to may be busy for a moment
            if self.queue.books().await.is_ok_and(|books| done(&books)) {
                return true;
            }
            if began.elapsed() > patience {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn made(camera: &Camera, number: usize) -> (Arc<Upload>, Vec<u8>) {
    let device_id: DeviceId = format!("cam-{:04}", number % 1000 + 1).parse().unwrap();
    let upload_id = format!("{number}");
    let photo = camera.photo(number, &format!("{device_id} {upload_id}"));
    let mut upload = Arc::unwrap_or_clone(upload_of(&photo, &upload_id));
    upload.id = UploadId::of_device(&device_id, &upload_id);
    upload.object_key = format!("{device_id}/{upload_id}.jpg");
    upload.device_id = device_id;
    upload.priority = Priority::Normal;
    upload.received_at = UnixMs::now();
    (Arc::new(upload), photo)
}

/// Settings with the whole of an uplink of `rate` as the allowance.
pub fn allowing(settings: &[(String, String)], rate: u64) -> Vec<(String, String)> {
    let more = [("FOREBAY_UPLINK_RATE", format!("{rate}B/s")), ("FOREBAY_UPLINK_SHARE", "100%".to_owned())];
    settings.iter().cloned().chain(more.map(|(name, text)| (name.to_owned(), text))).collect()
}
