//! A thousand devices, and then one of them sends a hundred times as much: what that costs the others, from the appliance's yes
//! to the bucket's. Once in the deficit of a full site, where photos wait in any case, and once where the others alone leave
//! the way free and the one fills it.

use std::sync::Arc;
use std::time::Duration;

use forebay::config::{Config, QueueUrl, Source};
use forebay::fleet::{self, Pattern, Tally};
use forebay::queue::{Cursor, Filter, Queue};
use forebay::units::UnixMs;
use forebay::upload::State;
use tokio_util::sync::CancellationToken;

use crate::link::Veth;
use crate::namespace::Namespace;
use crate::rig::{Far, metric};
use crate::support::backlog::allowing;
use crate::support::program::Program;
use crate::support::{PATIENCE, eventually};
use crate::{Plan, Verdicts};

const DEVICES: usize = 1000;
const PER_MINUTE: f64 = 2.0;
const PHOTO_BYTES: usize = 25_000;
const TIMES: u32 = 100;
/// What the others need of the allowance: 8.33 MB/s of 5, as at a full site.
const DEFICIT: f64 = 1.67;
/// A tenth more than this, which is what the talkative one adds, is beyond the allowance.
const NEARLY_ALL: f64 = 0.94;
const TRIAL: Duration = Duration::from_secs(20);
/// Not looked at: the fleet's first photos meet an appliance that has just started.
const WARM_UP_MS: i64 = 10_000;
/// Bytes per second that no trial comes near.
const PLENTY: u64 = 20_000_000;
const TALKATIVE: &str = "cam-0001";

pub async fn run(plan: &Plan, far: &Far, verdicts: &mut Verdicts) {
    let duration = Duration::from_secs(plan.seconds(90));
    let (_, sent_bytes) = trial(far, PLENTY, 1, TRIAL).await;
    println!(
        "\ntalkative: {DEVICES} devices, {PER_MINUTE} photos of {} kB a minute from each for {} s, without and with one that sends \
         {TIMES} times as often",
        PHOTO_BYTES / 1000,
        duration.as_secs()
    );
    let mut unanswered = 0;
    for (what, share) in [("a deficit as at a full site", DEFICIT), ("a way that the others leave free", NEARLY_ALL)] {
        let allowance = (sent_bytes / TRIAL.as_secs_f64() / share) as u64;
        println!("\n  {what}: an allowance of {:.3} MB/s", allowance as f64 / 1e6);
        let (without, _) = trial(far, allowance, 1, duration).await;
        let (with, _) = trial(far, allowance, TIMES, duration).await;
        unanswered += without.unanswered + with.unanswered;
        println!("                       photos       p50        p99");
        let line = |who: &str, times: &[f64]| {
            let (p50, p99) = (quantile(times, 0.5), quantile(times, 0.99));
            println!("    {who:<18} {:>6}  {p50:>7.3} s  {p99:>7.3} s", times.len());
        };
        line("others, without", &without.others);
        line("others, with", &with.others);
        line("the talkative one", &with.talkative);
        let (before, after) = (quantile(&without.others, 0.99), quantile(&with.others, 0.99));
        println!(
            "    the others' p99 with it is {:.2} times what it is without, {:+.3} s",
            after / before,
            after - before
        );
        if share > 1.0 {
            let held = after <= before * 1.10;
            verdicts.hold("talkative: the others' p99 time to S3 is what it was without it, within 10%", held);
        }
    }
    verdicts.hold("talkative: every photo was acknowledged", unanswered == 0);
}

/// Seconds from a photo's acceptance to its being in the bucket, each photo's, in order of length.
struct Times {
    others: Vec<f64>,
    talkative: Vec<f64>,
    unanswered: u64,
}

/// One fleet on an appliance of its own; and what the drain paid for.
async fn trial(far: &Far, allowance: u64, talkative: u32, duration: Duration) -> (Times, f64) {
    let link = Veth::new(Namespace::here(), &far.namespace);
    let settings = allowing(&far.bucket().await, allowance);
    let folder = tempfile::Builder::new().prefix("forebay-wire-").tempdir().unwrap();
    let data = folder.path().join("data");
    let serve = Program::start("serve", &settings, &data).await;
    let began = UnixMs::now();
    let plan = fleet::Plan {
        url: format!("{}/", serve.url),
        devices: DEVICES,
        per_minute: PER_MINUTE,
        talkative,
        photo_bytes: PHOTO_BYTES,
        pattern: Pattern::Steady,
        duration,
        last_tries: fleet::LAST_TRIES,
    };
    let tally = Arc::new(Tally::default());
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    fleet::run(plan, None, tally.clone(), stop).await.unwrap();

    let mut source = Source::default();
    source.flags.insert("data-dir".into(), data.display().to_string());
    let url: QueueUrl = Config::load(&source).unwrap().queue;
    let queue = Queue::open_existing(&url).unwrap();
    eventually(&format!("the backlog to be gone within {PATIENCE:?}"), async || {
        queue.books().await.ok().filter(|books| books.backlog().uploads == 0)
    })
    .await;
    let sent_bytes = metric(&serve, "forebay_drain_sent_bytes_total").await.iter().map(|(_, bytes)| bytes).sum();
    let photos = tally.photos.load(std::sync::atomic::Ordering::Relaxed);
    let acknowledged = tally.acknowledged.load(std::sync::atomic::Ordering::Relaxed);
    let mut times = Times { others: Vec::new(), talkative: Vec::new(), unanswered: photos - acknowledged };
    let mut cursor = Cursor::START;
    loop {
        let page = queue.list(&Filter::default(), cursor, forebay::queue::PAGE_RECORDS_MAX).await.unwrap();
        let Some(last) = page.last() else { break };
        cursor = Cursor { received_at: last.upload.received_at, id: last.upload.id };
        for record in page.iter().filter(|record| record.state == State::Uploaded) {
            let received_at = record.upload.received_at;
            if let Some(uploaded_at) = record.uploaded_at.filter(|_| received_at.0 >= began.0 + WARM_UP_MS) {
                let of_whom = match record.upload.device_id.as_str() {
                    TALKATIVE => &mut times.talkative,
                    _ => &mut times.others,
                };
                of_whom.push(uploaded_at.since(received_at).as_secs_f64());
            }
        }
    }
    queue.close().await;
    times.others.sort_by(f64::total_cmp);
    times.talkative.sort_by(f64::total_cmp);
    drop(link);
    (times, sent_bytes)
}

/// Of values in order.
fn quantile(values: &[f64], quantile: f64) -> f64 {
    let place = ((values.len() as f64 * quantile).ceil() as usize).saturating_sub(1);
    values.get(place).copied().unwrap_or(0.0)
}
