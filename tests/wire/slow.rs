//! Links that are slow, long, or stand still for a while: what arrives, what that costs in bytes on the wire and in attempts,
//! and how soon it goes on.

use std::time::{Duration, Instant};

use crate::counters::{Sampler, Trace};
use crate::link::{Emulated, Shape};
use crate::namespace::Namespace;
use crate::rig::{Far, metric};
use crate::support::backlog::{Backlog, PHOTO_BYTES, allowing};
use crate::support::program::Program;
use crate::{Plan, Verdicts, percent};

const ALLOWANCE: u64 = 5_000_000;
/// Of the link that is slower than the allowance: bytes of packets per second.
const SLOW_RATE: u64 = 1_000_000;
const STALL: Duration = Duration::from_secs(30);
/// From a stall's end to pouring again.
const AGAIN_MAX: Duration = Duration::from_secs(15);
/// Bytes on the wire for a byte of a photo that arrives, at most.
const WASTE_MAX: f64 = 1.15;
/// What a stall may cost on top of that, in photos that are sent once more.
const RESENT_PHOTOS_MAX: f64 = 16.0;

pub async fn run(plan: &Plan, far: &Far, verdicts: &mut Verdicts) {
    let seconds = plan.seconds(60);
    println!("\nslow: an allowance of {} MB/s, {seconds} s of backlog each", ALLOWANCE as f64 / 1e6);
    let one_way = |ms| Duration::from_millis(ms);

    let slow = Shape { delay: one_way(10), rate: Some(SLOW_RATE) };
    let poured = pour(far, slow, SLOW_RATE * seconds, None).await;
    poured.tell("an uplink of 1 MB/s, 20 ms round trips");
    verdicts.hold("slow uplink: everything arrives", poured.all_arrived);
    verdicts.hold("slow uplink: 1.15 bytes on the wire for a byte that arrives, at most", poured.waste() <= WASTE_MAX);

    let long = Shape { delay: one_way(150), rate: None };
    let poured = pour(far, long, ALLOWANCE * seconds, None).await;
    poured.tell("300 ms round trips");
    verdicts.hold("300 ms: everything arrives", poured.all_arrived);
    verdicts.hold("300 ms: 1.15 bytes on the wire for a byte that arrives, at most", poured.waste() <= WASTE_MAX);
    let later = poured.while_backlog.since(poured.began + Duration::from_secs(30));
    if let Some(lowest) = later.lowest(10) {
        println!("    any 10 s after the first 30 s: {} at least", percent(lowest, ALLOWANCE));
        verdicts.hold("300 ms: 95% of the allowance after 30 s", lowest >= 0.95 * ALLOWANCE as f64);
    }
    verdicts.hold("300 ms: no second above the allowance", poured.trace.highest(1) <= ALLOWANCE as f64);

    let plain = Shape { delay: one_way(10), rate: None };
    let middle = Duration::from_secs(seconds / 2);
    let poured = pour(far, plain, ALLOWANCE * seconds, Some(middle)).await;
    poured.tell("20 ms round trips, and a stall of 30 s in the middle");
    let again = poured.stall_over.and_then(|over| {
        let at = poured.trace.since(over).reaches(0.9 * ALLOWANCE as f64, 1)?;
        // the window ends a second after it began
        Some(at.saturating_duration_since(over).saturating_sub(Duration::from_secs(1)))
    });
    println!(
        "    pours at 90% again {} s after the stall",
        again.map_or("never".into(), |at| format!("{:.1}", at.as_secs_f64()))
    );
    verdicts.hold("stall: everything arrives", poured.all_arrived);
    verdicts.hold("stall: pours again within 15 s", again.is_some_and(|again| again <= AGAIN_MAX));
    let excess = poured.wire_bytes() - WASTE_MAX * poured.arrived_bytes as f64;
    let small = excess <= RESENT_PHOTOS_MAX * PHOTO_BYTES as f64;
    verdicts.hold("stall: no more sent again than what was on its way", small);
    verdicts.hold("stall: no second above the allowance", poured.trace.highest(1) <= ALLOWANCE as f64);
}

/// What was seen of one backlog, from its first byte to its end.
struct Poured {
    began: Instant,
    /// A second before no upload waited any more.
    gone: Instant,
    trace: Trace,
    while_backlog: Trace,
    stall_over: Option<Instant>,
    all_arrived: bool,
    arrived_uploads: i64,
    arrived_bytes: i64,
    attempts: Vec<(String, f64)>,
    dropped: u64,
}

impl Poured {
    fn wire_bytes(&self) -> f64 {
        self.trace.bytes() as f64
    }

    fn waste(&self) -> f64 {
        self.wire_bytes() / (self.arrived_bytes as f64).max(1.0)
    }

    fn tell(&self, what: &str) {
        let seconds = self.wire_bytes() / self.trace.mean().max(1.0);
        println!("\n  {what}");
        println!(
            "    {} uploads arrived in {seconds:.0} s: {:.2} MB/s of photos; {:.3} bytes on the wire for each; {} packets dropped",
            self.arrived_uploads,
            self.arrived_bytes as f64 / 1e6 / seconds,
            self.waste(),
            self.dropped
        );
        let highest_ends = self.trace.highest_ends(1).unwrap_or(self.began).saturating_duration_since(self.began);
        println!(
            "    highest 1 s {}, until {:.1} s after the first byte",
            percent(self.trace.highest(1), ALLOWANCE),
            highest_ends.as_secs_f64()
        );
        let tens: Vec<String> =
            self.tens().iter().map(|rate| format!("{:.0}", rate * 100.0 / ALLOWANCE as f64)).collect();
        println!("    % of the allowance in each 10 s: {}", tens.join(" "));
        let begun: f64 = self.attempts.iter().map(|(_, number)| number).sum();
        let by_outcome: Vec<String> =
            self.attempts.iter().map(|(outcome, number)| format!("{outcome} {number}")).collect();
        println!("    {begun} attempts: {}", by_outcome.join(", "));
    }

    /// Bytes per second in each ten seconds from the first byte on.
    fn tens(&self) -> Vec<f64> {
        let ten = Duration::from_secs(10);
        let starts = (0..).map(|n| self.began + ten * n).take_while(|from| *from + ten <= self.gone);
        starts.map(|from| self.while_backlog.between(from, from + ten).mean()).collect()
    }
}

/// A backlog of so many bytes over such a link, which stands still from `stall_after` on for [`STALL`].
async fn pour(far: &Far, shape: Shape, bytes: u64, stall_after: Option<Duration>) -> Poured {
    let settings = allowing(&far.bucket_by_a_link_of_its_own().await, ALLOWANCE);
    let mut site = Backlog::new(None).await;
    site.add(bytes).await;
    let link = Emulated::new(&far.namespace, shape);
    let sampler = Sampler::start(&Namespace::here(), vec![link.counter()]);
    let started = Instant::now();
    let drain = Program::start("drain", &settings, &site.data()).await;
    let first = || sampler.trace().since(started).first_payload().map(|(from, _)| from);
    while first().is_none() && started.elapsed() < STALL {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let began = first().unwrap_or(started);
    let mut stall_over = None;
    if let Some(after) = stall_after {
        tokio::time::sleep((began + after).saturating_duration_since(Instant::now())).await;
        link.stall(true);
        tokio::time::sleep(STALL).await;
        link.stall(false);
        stall_over = Some(Instant::now());
    }
    let slower = shape.rate.map_or(ALLOWANCE, |rate| rate.min(ALLOWANCE));
    let patience = Duration::from_secs(bytes / slower * 3 + 120);
    site.backlog_gone(patience).await;
    let gone = Instant::now() - Duration::from_secs(1);
    let all_arrived = site.all_uploaded(patience).await;
    let trace = sampler.trace().since(began);
    let attempts = metric(&drain, "forebay_drain_attempts_total").await;
    let attempts = attempts.into_iter().map(|(labels, number)| (outcome(&labels), number)).collect();
    let arrived = site.books().await.uploaded;
    Poured {
        began,
        gone,
        while_backlog: trace.between(began, gone),
        trace,
        stall_over,
        all_arrived,
        arrived_uploads: arrived.uploads,
        arrived_bytes: arrived.bytes,
        attempts,
        dropped: link.dropped(),
    }
}

/// Of a metric's labels.
fn outcome(labels: &str) -> String {
    let text = labels.split_once("outcome=\"").map_or(labels, |(_, rest)| rest);
    text.split('"').next().unwrap_or(text).to_owned()
}
