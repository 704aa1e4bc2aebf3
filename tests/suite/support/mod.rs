//! What the tests start and ask: servers on free ports, one appliance's parts in process, photos, and waiting.

pub mod agreement;
pub mod backlog;
pub mod disk;
pub mod faulty_s3;
pub mod fleet;
pub mod nginx;
pub mod postgres;
pub mod pouring;
pub mod process;
pub mod program;
pub mod proxy;
pub mod rclone;
pub mod scratch;
pub mod site;
pub mod weed;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use forebay::config::SpoolLimits;
use forebay::fleet::photo::Camera;
use forebay::units::{ByteSize, Reserve, UnixMs};
use forebay::upload::{ImageType, Priority, Sha256, Upload, UploadId};

/// The longest any condition is waited for. A test that needs it has failed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A port that is free, and still is when a server has come up or a program that was killed comes back: the kernel gives none
/// of these to connections, nor to whoever asks for any.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // another run of the tests begins elsewhere
    let first = (std::process::id() as u16).wrapping_mul(251);
    loop {
        let port = 12_000 + first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 18_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Waits until `condition` gives something, and gives it.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A real JPEG of some 20 kB; another number makes another photo.
pub fn photo(number: usize) -> Vec<u8> {
    static CAMERA: std::sync::OnceLock<Camera> = std::sync::OnceLock::new();
    CAMERA.get_or_init(|| Camera::new(20_000).unwrap()).photo(number, &format!("photo {number}"))
}

/// A photo as the body that devices send.
pub fn json_upload(device: &str, upload_id: Option<&str>, photo: &[u8]) -> serde_json::Value {
    let image = base64_simd::STANDARD.encode_to_string(photo);
    let mut body = serde_json::json!({ "device_id": device, "image": image });
    if let Some(upload_id) = upload_id {
        body["upload_id"] = upload_id.into();
    }
    body
}

/// A spool may take all of its disk.
pub const NO_LIMITS: SpoolLimits = SpoolLimits { reserve: Reserve::Bytes(ByteSize(0)), max: None };

/// What ingest would make of `photo`.
pub fn upload_of(photo: &[u8], upload_id: &str) -> Arc<Upload> {
    let device_id = "cam-1".parse().unwrap();
    Arc::new(Upload {
        id: UploadId::of_device(&device_id, upload_id),
        device_id,
        upload_id: Some(upload_id.to_owned()),
        object_key: format!("cam-1/{upload_id}.jpg"),
        size_bytes: photo.len() as u64,
        sha256: Sha256::of(photo),
        content_type: ImageType::Jpeg,
        filename: Some("north gate.jpg".to_owned()),
        captured_at: None,
        priority: Priority::High,
        metadata: BTreeMap::from([("site".to_owned(), "7".to_owned())]),
        traceparent: None,
        received_at: UnixMs(1_763_000_000_123),
    })
}
