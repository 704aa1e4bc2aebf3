//! A fleet of simulated devices: what a site's cameras would send, against any URL.
//!
//! Always: every photo is distinct and has an `upload_id`; a device sends one photo at a time (only a talkative one sends a few),
//! tries again with the same id when it gets no answer, 408, 429 or 5xx, and waits as `Retry-After` says. Never: a yes that the
//! appliance did not give.

pub mod photo;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde::Deserialize;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::photo::Camera;
use crate::ledger::{Ack, Entry, Ledger};
use crate::units::UnixMs;
use crate::upload::{Sha256, UploadId};

/// Longest wait for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Photos that a device has kept up when it comes back, with [`Pattern::Reconnect`].
const KEPT_PHOTOS: u32 = 5;
/// Photos that a talkative device sends at once at most: with one at a time it could not send as often as it is to.
const SENDERS_MAX: u32 = 8;
/// How long a device that has a photo under way may go on after the end, where nothing else is said.
pub const LAST_TRIES: Duration = Duration::from_secs(30);

/// When devices send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Each in its own rhythm, spread evenly.
    Steady,
    /// All at the same moment, once a period.
    Burst,
    /// All come back from an outage at once with five photos each, then go on steadily.
    Reconnect,
}

/// What a fleet is.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where photos are posted.
    pub url: String,
    pub devices: usize,
    /// Photos a minute from each device.
    pub per_minute: f64,
    /// The first device sends so many times as often as the others.
    pub talkative: u32,
    pub photo_bytes: usize,
    pub pattern: Pattern,
    pub duration: Duration,
    /// How long a device that has a photo under way may go on after the end.
    pub last_tries: Duration,
}

/// What happened so far; readable while the fleet runs.
#[derive(Default)]
pub struct Tally {
    /// When devices began to send; before that their photos are made.
    pub began: OnceLock<Instant>,
    /// Photos taken.
    pub photos: AtomicU64,
    /// Photos acknowledged, each counted once.
    pub acknowledged: AtomicU64,
    pub acknowledged_bytes: AtomicU64,
    /// Answers that said: later, or that never came.
    pub retries: AtomicU64,
    /// Photos refused for good.
    pub refused: AtomicU64,
    /// Photos whose last answer by the end was to come again later.
    pub put_off: AtomicU64,
    /// Photos that had neither by the end: nobody answered their last try, or it was their first and still under way.
    pub unanswered: AtomicU64,
    /// Milliseconds from the first byte of a send to its acknowledgement.
    latencies_ms: Mutex<Vec<f32>>,
    /// What went wrong first, for people.
    first_trouble: Mutex<Option<String>>,
}

impl Tally {
    /// The `quantile` (0 to 1) of the acknowledgements' latencies, in milliseconds.
    pub fn latency_ms(&self, quantile: f64) -> f64 {
        let Ok(latencies) = self.latencies_ms.lock() else { return 0.0 };
        let mut sorted = latencies.clone();
        sorted.sort_by(f32::total_cmp);
        let place = ((sorted.len() as f64 * quantile).ceil() as usize).saturating_sub(1);
        sorted.get(place).copied().unwrap_or(0.0).into()
    }

    /// The first refusal or failure, if there was one.
    pub fn first_trouble(&self) -> Option<String> {
        self.first_trouble.lock().ok()?.clone()
    }

    fn trouble(&self, text: impl FnOnce() -> String) {
        if let Ok(mut first) = self.first_trouble.lock() {
            first.get_or_insert_with(text);
        }
    }
}

/// Runs the fleet until its time is over or `stop` is cancelled; photos under way then have their last tries.
pub async fn run(
    plan: Plan,
    ledger: Option<Arc<Ledger>>,
    tally: Arc<Tally>,
    stop: CancellationToken,
) -> Result<(), String> {
    let photo_bytes = plan.photo_bytes;
    let camera = tokio::task::spawn_blocking(move || Camera::new(photo_bytes)).await.map_err(|e| e.to_string())??;
    let loopback = ["//127.", "//localhost", "//[::1]"].iter().any(|host| plan.url.contains(host));
    let client = reqwest::Client::builder();
    let client = if loopback { client.no_proxy() } else { client };
    let client = client.timeout(ANSWER_TIMEOUT).tcp_nodelay(true).build().map_err(|e| crate::error::chain(&e))?;
    let began = *tally.began.get_or_init(Instant::now);
    let shared = Arc::new(Shared { plan: plan.clone(), camera, client, ledger, tally, run: rand::random() });
    let (end, last_tries) = (began + plan.duration, plan.last_tries);
    let giving_up = CancellationToken::new();
    let mut devices = tokio::task::JoinSet::new();
    for number in 0..plan.devices {
        for sender in Sender::of_device(&plan, number) {
            let (shared, stop, giving_up) = (shared.clone(), stop.clone(), giving_up.clone());
            devices.spawn(async move { device(&shared, sender, began, end, stop, giving_up).await });
        }
    }
    tokio::select! {
        () = sleep_until(end) => {}
        () = stop.cancelled() => {}
    }
    let deadline = Instant::now() + last_tries;
    while let Ok(Some(_)) = tokio::time::timeout_at(deadline, devices.join_next()).await {}
    giving_up.cancel();
    while devices.join_next().await.is_some() {}
    Ok(())
}

struct Shared {
    plan: Plan,
    camera: Camera,
    client: reqwest::Client,
    ledger: Option<Arc<Ledger>>,
    tally: Arc<Tally>,
    /// Tells this run's photos from another's.
    run: u32,
}

/// One of those that send a device's photos, mostly the only one.
#[derive(Debug, Clone, Copy)]
struct Sender {
    device: usize,
    /// Between two of its photos.
    period: Duration,
    /// Its first photo's place in the device's sequence, and the step to its next.
    first: u32,
    step: u32,
}

impl Sender {
    fn of_device(plan: &Plan, device: usize) -> impl Iterator<Item = Sender> + use<> {
        let times = if device == 0 { plan.talkative.max(1) } else { 1 };
        let step = times.min(SENDERS_MAX);
        let period = Duration::from_secs_f64(60.0 / plan.per_minute).mul_f64(f64::from(step) / f64::from(times));
        (0..step).map(move |first| Sender { device, period, first, step })
    }
}

/// The life of one device's sender.
async fn device(
    shared: &Shared,
    sender: Sender,
    began: Instant,
    end: Instant,
    stop: CancellationToken,
    giving_up: CancellationToken,
) {
    let plan = &shared.plan;
    let Sender { device: number, period, first, step } = sender;
    let place = period.mul_f64(number as f64 / plan.devices as f64 + f64::from(first) / f64::from(step));
    let mut kept = if plan.pattern == Pattern::Reconnect { KEPT_PHOTOS } else { 0 };
    let mut due = match plan.pattern {
        Pattern::Steady => began + place,
        Pattern::Burst | Pattern::Reconnect => began,
    };
    for sequence in (first..).step_by(step as usize) {
        if due >= end {
            return;
        }
        tokio::select! {
            () = sleep_until(due) => {}
            () = stop.cancelled() => return,
        }
        let put_off = AtomicBool::new(false);
        tokio::select! {
            () = send(shared, number, sequence, &put_off) => {}
            () = giving_up.cancelled() => {
                let tally = &shared.tally;
                let ended = if put_off.load(Ordering::Relaxed) { &tally.put_off } else { &tally.unanswered };
                ended.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
        if kept > 1 {
            kept -= 1;
            continue;
        }
        if std::mem::take(&mut kept) == 1 {
            due = began + place;
        }
        due += period;
    }
}

/// The part of an answer that a device reads.
#[derive(Deserialize)]
struct Answer {
    id: UploadId,
    object_key: String,
    size_bytes: u64,
    sha256: Sha256,
}

enum Answered {
    Yes(Ack),
    /// Come again, after this long if it was said.
    Later(Option<Duration>),
    /// Nobody did.
    Nothing,
    Never(String),
}

/// One photo, until it is acknowledged or refused for good; whether its last answer put it off stands in `put_off`.
async fn send(shared: &Shared, number: usize, sequence: u32, put_off: &AtomicBool) {
    let (tally, device_id) = (&shared.tally, format!("cam-{:04}", number + 1));
    let upload_id = format!("{:08x}-{sequence}", shared.run);
    let photo = shared.camera.photo(number + sequence as usize, &format!("{device_id} {upload_id}"));
    let (size_bytes, sha256) = (photo.len() as u64, Sha256::of(&photo));
    let body = bytes::Bytes::from(json(&device_id, &upload_id, &photo));
    drop(photo);
    tally.photos.fetch_add(1, Ordering::Relaxed);
    for try_number in 1.. {
        let at = UnixMs::now();
        note(
            shared,
            Entry::Sent {
                at,
                device_id: device_id.clone(),
                upload_id: upload_id.clone(),
                size_bytes,
                sha256,
                try_number,
            },
        );
        let began = Instant::now();
        let answered = post(shared, &device_id, &upload_id, body.clone()).await;
        put_off.store(matches!(answered, Answered::Later(_)), Ordering::Relaxed);
        let after = match answered {
            Answered::Yes(ack) if ack.sha256 == sha256 && ack.size_bytes == size_bytes => {
                tally.acknowledged.fetch_add(1, Ordering::Relaxed);
                tally.acknowledged_bytes.fetch_add(size_bytes, Ordering::Relaxed);
                if let Ok(mut latencies) = tally.latencies_ms.lock() {
                    latencies.push(began.elapsed().as_secs_f32() * 1e3);
                }
                return;
            }
            Answered::Yes(ack) => {
                tally.trouble(|| format!("{device_id}: the acknowledgement is of other bytes: {}", ack.sha256));
                tally.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Answered::Never(why) => {
                tally.trouble(|| why);
                tally.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Answered::Later(after) => after,
            Answered::Nothing => None,
        };
        tally.retries.fetch_add(1, Ordering::Relaxed);
        let own = Duration::from_millis(500).saturating_mul(1 << try_number.min(6)).min(PAUSE_MAX);
        sleep(after.unwrap_or(own).mul_f64(rand::random_range(1.0..1.2))).await;
    }
}

async fn post(shared: &Shared, device_id: &str, upload_id: &str, body: bytes::Bytes) -> Answered {
    let (device_id, upload_id) = (device_id.to_owned(), upload_id.to_owned());
    let request = shared.client.post(&shared.plan.url).header("content-type", "application/json").body(body);
    let answer = async {
        let response = request.send().await?;
        let status = response.status();
        let after =
            response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok()).map(Duration::from_secs);
        Ok::<_, reqwest::Error>((status, after, response.bytes().await?))
    };
    let (status, after, text) = match answer.await {
        Ok(answer) => answer,
        Err(error) => {
            let error = crate::error::chain(&error);
            shared.tally.trouble(|| error.clone());
            note(shared, Entry::Failed { at: UnixMs::now(), device_id, upload_id, error });
            return Answered::Nothing;
        }
    };
    let ack = status.is_success().then(|| serde_json::from_slice::<Answer>(&text).ok()).flatten();
    let ack = ack.map(|a| Ack { id: a.id, object_key: a.object_key, size_bytes: a.size_bytes, sha256: a.sha256 });
    note(
        shared,
        Entry::Answered { at: UnixMs::now(), device_id, upload_id, status: status.as_u16(), ack: ack.clone() },
    );
    match ack {
        Some(ack) => Answered::Yes(ack),
        None if status.is_server_error() || status.as_u16() == 429 || status.as_u16() == 408 => {
            shared.tally.trouble(|| format!("{status}: {}", String::from_utf8_lossy(&text)));
            Answered::Later(after)
        }
        None => Answered::Never(format!("{status}: {}", String::from_utf8_lossy(&text))),
    }
}

fn note(shared: &Shared, entry: Entry) {
    if let Some(ledger) = &shared.ledger
        && let Err(error) = ledger.write(&entry)
    {
        shared.tally.trouble(|| format!("the ledger cannot be written: {error}"));
    }
}

/// The body that the smallest firmware would send.
fn json(device_id: &str, upload_id: &str, photo: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(photo.len() / 3 * 4 + 256);
    let captured_at = UnixMs::now();
    body.extend_from_slice(
        format!(r#"{{"device_id":"{device_id}","upload_id":"{upload_id}","captured_at":"{captured_at}","image":""#)
            .as_bytes(),
    );
    base64_simd::STANDARD.encode_append(photo, &mut body);
    body.extend_from_slice(b"\"}");
    body
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// What becomes of one photo of one device, at this address.
    async fn of_one_photo(url: String) -> Arc<Tally> {
        let tally = Arc::new(Tally::default());
        let plan = Plan {
            url,
            devices: 1,
            per_minute: 1.0,
            talkative: 1,
            photo_bytes: 20_000,
            pattern: Pattern::Burst,
            duration: Duration::from_millis(500),
            last_tries: Duration::from_millis(500),
        };
        run(plan, None, tally.clone(), CancellationToken::new()).await.unwrap();
        tally
    }

    fn numbers(tally: &Tally) -> [u64; 3] {
        [&tally.photos, &tally.put_off, &tally.unanswered].map(|counter| counter.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn a_photo_that_is_put_off_to_the_end_is_not_one_that_nobody_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let later = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n";
        let answering = tokio::spawn(async move {
            let (mut device, _) = listener.accept().await.unwrap();
            let mut sent = Vec::new();
            while !sent.ends_with(b"\"}") {
                device.read_buf(&mut sent).await.unwrap();
            }
            device.write_all(later).await.unwrap();
            device
        });
        let put_off = of_one_photo(url.clone()).await;
        drop(answering.await.unwrap());
        // nobody listens there any more
        let unanswered = of_one_photo(url).await;
        assert_eq!((numbers(&put_off), numbers(&unanswered)), ([1, 1, 0], [1, 0, 1]));
    }
}
