//! What leaves at an allowance, while there is a backlog, after a start, after idling and after a change of the rate; and
//! beside it what rclone makes of the same rate with the same photos over the same link.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use forebay::fleet::photo::Camera;
use tempfile::TempDir;

use crate::counters::{Sampler, Trace};
use crate::link::Veth;
use crate::namespace::{Namespace, cpu_ms};
use crate::rig::{Far, PHOTO_BYTES, Site, allowing, change_rate};
use crate::support::process::{find_program, guarded, start};
use crate::support::program::Program;
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
            theirs.push(rclone.measure(rate, plan.seconds(40), far).await);
        }
        let each = |of: &[Seen], who: &str| -> Vec<String> {
            let single = of.iter().map(|seen| seen.line(rate, who)).collect();
            match of.len() {
                1 => single,
                _ => [single, vec![Seen::median(of).line(rate, &format!("{who}, median"))]].concat(),
            }
        };
        lines.extend(each(&ours, "forebay"));
        lines.extend(each(&theirs, &rclone.version));
    }
    println!("\n{HEAD}");
    lines.iter().for_each(|line| println!("{line}"));
}

/// A few seconds of one rate, and nothing beside it.
pub async fn short(far: &Far, verdicts: &mut Verdicts) {
    let rate = 2_000_000;
    let (_link, sampler, mut site, settings) = made_ready(far).await;
    site.add_backlog(rate * 5).await;
    let drain = Program::start("drain", &allowing(&settings, rate), &site.data()).await;
    verdicts.hold("the backlog is uploaded", site.all_uploaded(Duration::from_secs(30)).await);
    drop(drain);
    let highest = sampler.trace().highest(1);
    println!("{}: highest 1 s {}", rate, percent(highest, rate));
    verdicts.hold("no second above the allowance", highest <= rate as f64);
}

async fn made_ready(far: &Far) -> (Veth, Sampler, Site, Vec<(String, String)>) {
    let link = Veth::new(Namespace::here(), &far.namespace);
    let settings = far.bucket().await;
    let site = Site::new(None).await;
    let sampler = Sampler::start(&Namespace::here(), vec![link.counter()]);
    (link, sampler, site, settings)
}

/// One drain, from its start on.
async fn forebay(rate: u64, seconds: u64, far: &Far, verdicts: &mut Verdicts) -> Seen {
    let (_link, sampler, mut site, settings) = made_ready(far).await;
    site.add_backlog(rate * seconds).await;
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
    site.add_backlog(rate * SECOND_BATCH).await;
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
    let held = changed.is_some_and(|(lowered, raised)| lowered <= allowed / 2.0 && raised <= allowed);
    verdicts.hold(&of("no second above the allowance after a change of it"), held);
    seen
}

/// The highest seconds after the rate was lowered and after it was raised again.
async fn change_of_rate(
    site: &mut Site,
    sampler: &Sampler,
    drain: &Program,
    rate: u64,
    lower: &str,
    whole: &str,
) -> Option<(f64, f64)> {
    if !change_rate(drain, whole).await {
        return None;
    }
    site.add_backlog(rate * 13).await;
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

/// The other program.
struct Rclone {
    program: std::path::PathBuf,
    version: String,
}

impl Rclone {
    fn find() -> Rclone {
        let program = find_program("rclone", &[concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/rclone/bin")]);
        let told = std::process::Command::new(&program).arg("version").output().unwrap();
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        Rclone { program, version: format!("{} --bwlimit", told.lines().next().unwrap_or("rclone")) }
    }

    /// As many photos as files, copied at this rate.
    async fn measure(&self, rate: u64, seconds: u64, far: &Far) -> Seen {
        let link = Veth::new(Namespace::here(), &far.namespace);
        let settings: BTreeMap<String, String> = far.bucket().await.into_iter().collect();
        let folder = tempfile::Builder::new().prefix("forebay-wire-").tempdir().unwrap();
        let photos = (rate * seconds).div_ceil(PHOTO_BYTES);
        write_files(&folder, photos);
        let sampler = Sampler::start(&Namespace::here(), vec![link.counter()]);
        let started = Instant::now();
        let mut command = guarded(&self.program, "KILL", None);
        // in bytes, as its own units are powers of 1024; whatever is not said is as it comes
        command.args(["copy", "--config=", "--s3-no-check-bucket", &format!("--bwlimit={rate}B")]);
        command.arg(format!("--transfers={TRANSFERS}"));
        command.arg(folder.path()).arg(format!("far:{}/", settings["FOREBAY_S3_BUCKET"]));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        for (name, text) in [
            ("TYPE", "s3"),
            ("PROVIDER", "Other"),
            ("ENDPOINT", &settings["AWS_ENDPOINT_URL_S3"]),
            ("ACCESS_KEY_ID", &settings["AWS_ACCESS_KEY_ID"]),
            ("SECRET_ACCESS_KEY", &settings["AWS_SECRET_ACCESS_KEY"]),
            ("REGION", "us-east-1"),
        ] {
            command.env(format!("RCLONE_CONFIG_FAR_{name}"), text);
        }
        for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        let mut copy = Ended(start(command));
        let mut cpu = 0.0;
        let copied = loop {
            // what it has used is known only while it runs
            cpu = f64::max(cpu, cpu_ms(copy.0.id()));
            if let Some(status) = copy.0.try_wait().unwrap() {
                break status.success();
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
}

/// Ends its process when dropped.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn write_files(folder: &TempDir, photos: u64) {
    let camera = Camera::new(PHOTO_BYTES as usize).unwrap();
    for number in 0..photos as usize {
        let photo = camera.photo(number, &format!("file {number}"));
        std::fs::write(folder.path().join(format!("{number}.jpg")), photo).unwrap();
    }
}
