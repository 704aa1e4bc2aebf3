//! `forebay demo`: the whole thing on one machine, with nothing to set up.
//!
//! The appliance is the real one, wired by the same code as `serve`; only its surroundings are made up: an S3 server in this
//! process, and a fleet of devices that sends to the loopback. At the end the devices' ledger is held against the bucket,
//! byte by byte.

use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::appliance::{Appliance, Roles};
use super::{Failure, Outcome, stop_signal};
use crate::allowance::Control;
use crate::audit::{Depth, Report, Subjects, audit};
use crate::bucket::Bucket;
use crate::config::{BucketConfig, Config, Source};
use crate::embedded_s3::EmbeddedS3;
use crate::fleet::{self, LAST_TRIES, Pattern, Plan};
use crate::ledger::Ledger;
use crate::pacer::Pacer;
use crate::status::Status;
use crate::telemetry;
use crate::units::{ByteSize, Rate, Share, UnixMs, parse_span};

const BUCKET: &str = "photos";

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  forebay demo                                        a thousand devices for a minute
  forebay demo --devices 100 --for 20s                smaller
  forebay demo --uplink-share 40%                     enough of the link: no deficit
  forebay demo --data-dir /var/tmp/forebay --keep     look at the photos afterwards")]
pub struct Args {
    /// How many devices
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    devices: u32,
    /// For how long
    #[arg(long = "for", value_name = "SPAN", default_value = "60s", value_parser = parse_span)]
    duration: Duration,
    /// Photos a minute from each device
    #[arg(long, default_value_t = 2.0)]
    per_minute: f64,
    /// The size of a photo
    #[arg(long, default_value = "250kB")]
    photo_bytes: ByteSize,
    /// When devices send
    #[arg(long, value_enum, default_value_t = Pattern::Steady)]
    pattern: Pattern,
    /// The site's uplink
    #[arg(long, default_value = "200Mbit/s")]
    uplink_rate: Rate,
    /// The share of it that uploads may use
    #[arg(long, default_value = "20%")]
    uplink_share: Share,
    /// Where spool, queue and bucket go; it must not exist yet
    #[arg(long, value_name = "DIR", default_value = "./forebay-demo")]
    data_dir: PathBuf,
    /// Keep the data dir
    #[arg(long)]
    keep: bool,
}

pub async fn run(args: Args) -> Outcome {
    if !(args.per_minute > 0.0 && args.per_minute <= 6000.0) {
        return Err(Failure(format!("--per-minute must be above 0 and at most 6000, not {}", args.per_minute)));
    }
    let data = DataDir::create(&args.data_dir, args.keep)?;
    let config = config(&args, &data.path)?;
    let telemetry = telemetry::start(&config.log)?;
    let interrupted = stop_signal();

    let s3 = EmbeddedS3::start(&data.path.join("s3")).await?;
    let bucket = Bucket::at(s3.endpoint(), BUCKET);
    bucket.create().await?;
    let stop = CancellationToken::new();
    let appliance =
        Appliance::start(&config, Roles::All, Some(bucket.clone()), Some(telemetry.registry()), stop.clone()).await?;
    let (queue, spool, pacer) = (appliance.queue.clone(), appliance.spool.clone(), appliance.pacer.clone());
    let url = appliance.ingest_address.map(|address| format!("http://{address}/")).unwrap_or_default();

    let fleet_rate = args.devices as f64 * args.per_minute / 60.0 * args.photo_bytes.0 as f64;
    say!(
        "Forebay demo: {} devices, {} photos a minute each, {} a photo",
        args.devices,
        args.per_minute,
        args.photo_bytes
    );
    say!("  in       {} ({:.1} Mbit/s)", Rate(fleet_rate as u64), fleet_rate * 8.0 / 1e6);
    let in_force = config.uplink.in_force(UnixMs::now(), &Control::default());
    let allowance = in_force.allowance.unwrap_or(config.uplink.rate);
    say!("  out      {allowance} ({:.1} Mbit/s): {}", allowance.mbit(), in_force.rule);
    say!("  devices  {url}   (docs at {url}docs/)");
    say!("  console  http://{}/   (/status, /metrics)", appliance.console_address);
    say!("  bucket   {}, embedded S3 at {}", data.path.join("s3").join(BUCKET).display(), s3.endpoint().url);
    say!();

    let ledger_path = data.path.join("devices.ledger");
    let ledger = Arc::new(Ledger::create(&ledger_path).map_err(|e| Failure(format!("cannot write the ledger: {e}")))?);
    let tally = Arc::new(fleet::Tally::default());
    let plan = Plan {
        url,
        devices: args.devices as usize,
        per_minute: args.per_minute,
        talkative: 1,
        photo_bytes: args.photo_bytes.0 as usize,
        pattern: args.pattern,
        duration: args.duration,
        last_tries: LAST_TRIES,
    };
    let over = CancellationToken::new();
    let watching = tokio::spawn(watch(pacer.clone(), appliance.snapshots.clone(), over.clone()));
    let ran = fleet::run(plan, Some(ledger), tally.clone(), interrupted.clone()).await;
    over.cancel();
    let drained = watching.await.unwrap_or_default();
    let forecast = appliance.snapshots.borrow().forecast.words.clone();
    if interrupted.is_cancelled() {
        say!("interrupted; counting what there is");
    }
    ran.map_err(Failure)?;

    stop.cancel();
    // the roles stop, but the queue stays open for the audit
    let (queue_for_audit, spool_for_audit) = (queue.clone(), spool.clone());
    appliance.roles_stopped().await;
    let subjects = Subjects {
        queue: &queue_for_audit,
        spool: &spool_for_audit,
        bucket: Some((&bucket, "")),
        ledger: Some(&ledger_path),
    };
    say!("reading every photo back …");
    let report = audit(&subjects, Depth::Bytes, |_| {}).await?;
    queue.close().await;
    let agrees = summary(&report, &drained, &tally, allowance, &forecast);
    if args.keep {
        say!("kept in {}", data.path.display());
    }
    let _ = tokio::task::spawn_blocking(move || telemetry.stop()).await;
    Ok(if agrees && report.acknowledged > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The folder of one demo, removed at the end unless it is to be kept.
struct DataDir {
    path: PathBuf,
    keep: bool,
}

impl DataDir {
    fn create(path: &Path, keep: bool) -> Result<DataDir, Failure> {
        let failed = |e: std::io::Error| Failure(format!("cannot make {}: {e}", path.display()));
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        std::fs::create_dir(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Failure(format!("{} exists already; remove it, or name another with --data-dir", path.display()))
            }
            _ => failed(error),
        })?;
        Ok(DataDir { path: path.canonicalize().map_err(failed)?, keep })
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            eprintln!("forebay: {} could not be removed: {error}", self.path.display());
        }
    }
}

/// The defaults of the appliance, with what the demo sets; the environment has no say but for the log.
fn config(args: &Args, data_dir: &Path) -> Result<Config, Failure> {
    let process = Source::process(Default::default());
    let log = process.environment.get("FOREBAY_LOG").cloned().unwrap_or_else(|| "warn".to_owned());
    let set = |port: u16| match std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        Err(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), // taken: any free one will do
    };
    let flags = [
        ("listen", set(8080).to_string()),
        ("console-listen", set(8081).to_string()),
        ("data-dir", data_dir.display().to_string()),
        ("uplink-rate", "200Mbit/s".to_owned()),
        ("uplink-share", args.uplink_share.to_string()),
        ("log", log),
    ];
    let flags = flags.into_iter().map(|(name, text)| (name.to_owned(), text)).collect();
    let mut config = Config::load(&Source { flags, environment: Default::default() })?;
    config.uplink.rate = args.uplink_rate;
    config.bucket = Some(BucketConfig { name: BUCKET.to_owned(), prefix: String::new(), path_style: true });
    Ok(config)
}

/// What left over the time in which there was something to send.
#[derive(Default)]
struct Drained {
    bytes: u64,
    seconds: f64,
}

/// Shows progress until `over`, and measures what the drain puts on the wire while there is a backlog.
async fn watch(pacer: Pacer, snapshots: tokio::sync::watch::Receiver<Arc<Status>>, over: CancellationToken) -> Drained {
    let terminal = std::io::stdout().is_terminal();
    let (began, mut shown) = (Instant::now(), Instant::now());
    let mut drained = Drained::default();
    let (mut at, mut paid) = (Instant::now(), pacer.paid_bytes());
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = over.cancelled() => break,
        }
        let status = snapshots.borrow().clone();
        let (now, paid_now) = (Instant::now(), pacer.paid_bytes());
        // more waits than the drain has in hand: the allowance is what limits it
        if status.books.queued.uploads > 8 {
            drained.bytes += paid_now - paid;
            drained.seconds += (now - at).as_secs_f64();
        }
        (at, paid) = (now, paid_now);
        if shown.elapsed() < if terminal { Duration::from_secs(1) } else { Duration::from_secs(5) } {
            continue;
        }
        shown = now;
        let line = format!(
            "{:>4}s  arriving {}  |  allowed {}  |  draining {}  |  backlog {} photos, {}  |  {}",
            began.elapsed().as_secs(),
            status.arriving,
            Rate(status.drain.allowance_bytes_per_second),
            Rate(status.draining.bytes_per_second as u64),
            status.backlog.uploads,
            ByteSize(status.backlog.bytes.max(0) as u64),
            status.forecast.in_short(),
        );
        if terminal {
            use std::io::Write;
            print!("\r\x1b[2K{line}");
            let _ = std::io::stdout().flush();
        } else {
            say!("{line}");
        }
    }
    say!();
    drained
}

/// The last page. True when everything that was acknowledged is accounted for.
fn summary(report: &Report, drained: &Drained, tally: &fleet::Tally, allowance: Rate, forecast: &str) -> bool {
    let line = |what: &str, uploads: u64, bytes: u64, how: &str| {
        say!("  {what:<22}{uploads:>8}  {:>9}   {how}", ByteSize(bytes).to_string());
    };
    say!();
    line("acknowledged", report.acknowledged, report.acknowledged_bytes, "by the devices' own ledger");
    line("verified in S3", report.verified, report.verified_bytes, "read back, every digest as it was sent");
    line("still queued", report.waiting, report.waiting_bytes, "on disk, every digest as it was sent");
    say!("  {:<22}{:>8}", "lost", report.lost);
    if drained.seconds >= 1.0 {
        let rate = drained.bytes as f64 / drained.seconds;
        say!(
            "  {:<22}{:>6.1} %   {} of {allowance}, while photos waited",
            "of the allowance",
            rate / allowance.0 as f64 * 100.0,
            Rate(rate as u64)
        );
    }
    say!("  acknowledged in {:.0} ms (median), {:.0} ms (p99)", tally.latency_ms(0.5), tally.latency_ms(0.99));
    say!("  had it gone on like this: {forecast}");
    if let Some(trouble) = tally.first_trouble() {
        say!("  the first trouble a device had: {trouble}");
    }
    report.shown.iter().for_each(|text| say!("  DISAGREES: {text}"));
    let agrees = report.agrees() && report.acknowledged == report.verified + report.waiting + report.journaled;
    say!();
    match (agrees, report.acknowledged) {
        (true, 0) => say!("NO photo was acknowledged, so this shows nothing"),
        (true, _) => say!("acknowledged = verified + still queued: nothing was lost"),
        (false, _) => say!("acknowledged and verified DO NOT AGREE"),
    }
    agrees
}
