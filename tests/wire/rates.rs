//! What leaves at an allowance, while there is a backlog, after a start, after idling and after a change of the rate; and
//! beside it what rclone makes of the same rate with the same photos over the same link.

use std::time::{Duration, Instant};

use crate::counters::{Sampler, Trace};
use crate::link::Veth;
use crate::namespace::{Namespace, cpu_ms};
use crate::rig::{Far, change_rate};
use crate::support::backlog::{Backlog, PHOTO_BYTES, allowing};
use crate::support::program::Program;
use crate::support::rclone::{Rclone, write_files};
use crate::{Plan, Verdicts, median, percent};

/// Uploads at once, for both.
const TRANSFERS: u64 = 8;
/// Of the backlog that comes after the drain had nothing to do.
const SECOND_BATCH: u64 = 6;
const IDLE: Duration = Duration::from_secs(5);
/// What a change of the rate may take to reach the wire.
const CHANGE: Duration = Duration::from_millis(200);

/// What was seen while there was a backlog.
#[derive(Clone, Copy)]
struct Seen {
    /// Bytes per second.
    highest_second: f64,
    /// The lowest and the highest ten seconds, if there were as many.
    ten_seconds: Option<(f64, f64)>,
    mean: f64,
    cpu_ms_per_mb: f64,
}

impl Seen {
    fn of(trace: &Trace, cpu_ms: f64) -> Seen {
        Seen {
            highest_second: trace.highest(1),
            ten_seconds: trace.lowest(10).map(|lowest| (lowest, trace.highest(10))),
            mean: trace.mean(),
            cpu_ms_per_mb: cpu_ms / (trace.bytes() as f64 / 1e6),
        }
    }

    fn median(of: &[Seen]) -> Seen {
        let by = |value: fn(&Seen) -> f64| median(of.iter().map(value).collect());
        let ten = of.iter().all(|seen| seen.ten_seconds.is_some());
        Seen {
            highest_second: by(|seen| seen.highest_second),
            ten_seconds: ten.then(|| {
                (by(|seen| seen.ten_seconds.unwrap_or_default().0), by(|seen| seen.ten_seconds.unwrap_or_default().1))
            }),
            mean: by(|seen| seen.mean),
            cpu_ms_per_mb: by(|seen| seen.cpu_ms_per_mb),
        }
    }

    fn line(&self, rate: u64, who: &str) -> String {
        let ten = self.ten_seconds.map_or("-".to_owned(), |(lowest, highest)| {
            format!("{} to {}", percent(lowest, rate), percent(highest, rate))
        });
        format!(
            "{:>9}  {who:<24} {:>8}  {ten:>18}  {:>8}  {:>6.1} ms",
            format!("{} MB/s", rate as f64 / 1e6),
            percent(self.highest_second, rate),
            percent(self.mean, rate),
            self.cpu_ms_per_mb
        )
    }
}

const HEAD: &str = "allowance  who                      highest 1s  any 10 s (low-high)      mean  CPU per MB";

/// All rates of the plan, forebay and rclone in turns.
pub async fn run(plan: &Plan, far: &Far, verdicts: &mut Verdicts) {
    println!("\nrates: {} s of backlog at each, photos of {} kB", plan.seconds(40), PHOTO_BYTES / 1000);
    let rclone = Rclone::find();
    let mut lines = Vec::new();
    for &rate in &plan.rates {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..plan.rounds {
            ours.push(forebay(rate, plan.seconds(40), far, verdicts).await);
            theirs.push(copied_by(&rclone, rate, plan.seconds(40), far).await);
        }
        let each = |of: &[Seen], who: &str| -> Vec<String> {
            let single = of.iter().map(|seen| seen.line(rate, who)).collect();
            match of.len() {
                1 => single,
                _ => [single, vec![Seen::median(of).line(rate, &format!("{who}, median"))]].concat(),
            }
        };
        lines.extend(each(&ours, "forebay"));
        lines.extend(each(&theirs, &format!("{} --bwlimit", rclone.version)));
    }
    println!("\n{HEAD}");
    lines.iter().for_each(|line| println!("{line}"));
}

/// A few seconds of one rate, and nothing beside it.
pub async fn short(far: &Far, verdicts: &mut Verdicts) {
    let rate = 2_000_000;
    let (_link, sampler, mut site, settings) = made_ready(far).await;
    site.add(rate * 5).await;
    let drain = Program::start("drain", &allowing(&settings, rate), &site.data()).await;
    verdicts.hold("the backlog is uploaded", site.all_uploaded(Duration::from_secs(30)).await);
    drop(drain);
    let highest = sampler.trace().highest(1);
    println!("{}: highest 1 s {}", rate, percent(highest, rate));
    verdicts.hold("no second above the allowance", highest <= rate as f64);
}

async fn made_ready(far: &Far) -> (Veth, Sampler, Backlog, Vec<(String, String)>) {
    let link = Veth::new(Namespace::here(), &far.namespace);
    let settings = far.bucket().await;
    let site = Backlog::new(None).await;
    let sampler = Sampler::start(&Namespace::here(), vec![link.counter()]);
    (link, sampler, site, settings)
}

/// One drain, from its start on.
async fn forebay(rate: u64, seconds: u64, far: &Far, verdicts: &mut Verdicts) -> Seen {
    let (_link, sampler, mut site, settings) = made_ready(far).await;
    site.add(rate * seconds).await;
    let started = Instant::now();
    let drain = Program::start("drain", &allowing(&settings, rate), &site.data()).await;
    let cpu_before = cpu_ms(drain.pid());
    let patience = Duration::from_secs(seconds * 2 + 30);
    let gone = site.backlog_gone(patience).await;
    let cpu = cpu_ms(drain.pid()) - cpu_before;
    let until = Instant::now() - Duration::from_secs(1);
    let uploaded = site.all_uploaded(patience).await && site.books().await.uploaded.uploads as u64 == site.photos;
    let began = sampler.trace().since(started).first_payload().map_or(started, |(from, _)| from);
    let seen = Seen::of(&sampler.trace().between(began, until), cpu);

    let allowed = rate as f64;
    println!("\n{} MB/s", allowed / 1e6);
    let tell = |what: &str, highest: f64, of: f64| println!("  {what:<44} highest 1 s {}", percent(highest, of as u64));
    let start = sampler.trace().between(started, began + Duration::from_secs(2)).highest(1);
    tell("its first two seconds", start, allowed);
    tell("while there is a backlog", seen.highest_second, allowed);

    tokio::time::sleep(IDLE).await;
    let idle_until = Instant::now();
    site.add(rate * SECOND_BATCH).await;
    let second = site.all_uploaded(patience).await;
    let after_idling = sampler.trace().since(idle_until).highest(1);
    tell("after idling", after_idling, allowed);

    let whole = format!("{rate}B/s");
    let half = format!("{}B/s", rate / 2);
    let changed = change_of_rate(&mut site, &sampler, &drain, rate, &half, &whole).await;
    match &changed {
        None => println!("  a change of the rate was refused"),
        Some((lowered, raised)) => {
            tell("from a change to the half on, of the half", *lowered, allowed / 2.0);
            tell("from a change to the whole on", *raised, allowed);
        }
    }
    let is_all = gone && uploaded && second;
    let of = |what: &str| format!("{} MB/s: {what}", allowed / 1e6);
    verdicts.hold(&of("every photo is uploaded"), is_all);
    let highest = [start, seen.highest_second, after_idling].into_iter().fold(0.0, f64::max);
    verdicts.hold(&of("no second above the allowance"), highest <= allowed);
    if let Some((lowest, highest)) = seen.ten_seconds {
        verdicts.hold(&of("every 10 s at 98 to 100%"), lowest >= 0.98 * allowed && highest <= allowed);
    }
    verdicts.hold(&of("a change of the allowance is taken"), changed.is_some());
    if let Some((lowered, raised)) = changed {
        let held = lowered <= allowed / 2.0 && raised <= allowed;
        verdicts.hold(&of("no second above the allowance after a change of it"), held);
    }
    seen
}

/// The highest seconds after the rate was lowered and after it was raised again.
async fn change_of_rate(
    site: &mut Backlog,
    sampler: &Sampler,
    drain: &Program,
    rate: u64,
    lower: &str,
    whole: &str,
) -> Option<(f64, f64)> {
    if !change_rate(drain, whole).await {
        return None;
    }
    site.add(rate * 13).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    if !change_rate(drain, lower).await {
        return None;
    }
    let lowered = Instant::now() + CHANGE;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let raise = Instant::now();
    if !change_rate(drain, whole).await {
        return None;
    }
    site.all_uploaded(Duration::from_secs(60)).await;
    let trace = sampler.trace();
    Some((trace.between(lowered, raise).highest(1), trace.since(raise).highest(1)))
}

/// As many photos as files, copied at this rate.
async fn copied_by(rclone: &Rclone, rate: u64, seconds: u64, far: &Far) -> Seen {
    let link = Veth::new(Namespace::here(), &far.namespace);
    let settings = far.bucket().await;
    let folder = tempfile::Builder::new().prefix("forebay-wire-").tempdir().unwrap();
    let photos = (rate * seconds).div_ceil(PHOTO_BYTES);
    write_files(folder.path(), photos);
    let sampler = Sampler::start(&Namespace::here(), vec![link.counter()]);
    let started = Instant::now();
    let mut copy = rclone.copy(folder.path(), &settings, TRANSFERS, Some(rate));
    let mut cpu = 0.0;
    let copied = loop {
        // what it has used is known only while it runs
        cpu = f64::max(cpu, cpu_ms(copy.pid()));
        if let Some(copied) = copy.ended() {
            break copied;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(copied, "rclone did not copy");
    let trace = sampler.trace().since(started);
    // while there is a backlog: until no more is left than can be on its way at once
    let total = trace.bytes();
    let began = trace.first_payload().map_or(started, |(from, _)| from);
    let until = trace.until_bytes(total.saturating_sub(TRANSFERS * PHOTO_BYTES)).unwrap_or(started);
    let mut seen = Seen::of(&trace.between(began, until), cpu);
    seen.cpu_ms_per_mb = cpu / (total as f64 / 1e6);
    seen
}
