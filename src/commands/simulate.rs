//! `forebay simulate`: a fleet of devices against any URL.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Failure, Outcome, stop_signal};
use crate::fleet::{self, Pattern, Plan, Tally};
use crate::ledger::Ledger;
use crate::units::{ByteSize, parse_span};

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  forebay simulate --url http://127.0.0.1:8080/
  forebay simulate --url http://127.0.0.1:8080/ --devices 1000 --per-minute 2 --for 10m --ledger devices.ledger
  forebay simulate --url http://127.0.0.1:8080/ --pattern reconnect

Exit 0 only if every photo was acknowledged.")]
pub struct Args {
    /// Where devices post their photos
    #[arg(long)]
    url: String,
    /// How many devices
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    devices: u32,
    /// Photos a minute from each
    #[arg(long, default_value_t = 2.0)]
    per_minute: f64,
    /// The first device sends so many times as often as the others
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    talkative: u32,
    /// The size of a photo
    #[arg(long, default_value = "250kB")]
    photo_bytes: ByteSize,
    /// When devices send
    #[arg(long, value_enum, default_value_t = Pattern::Steady)]
    pattern: Pattern,
    /// For how long
    #[arg(long = "for", value_name = "SPAN", default_value = "60s", value_parser = parse_span)]
    duration: Duration,
    /// How long devices that have a photo under way at the end may go on
    #[arg(long, value_name = "SPAN", default_value = "30s", value_parser = parse_span)]
    last_tries: Duration,
    /// Write every send and every answer here
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
}

pub async fn run(args: Args) -> Outcome {
    if !(args.per_minute > 0.0 && args.per_minute <= 6000.0) {
        return Err(Failure(format!("--per-minute must be above 0 and at most 6000, not {}", args.per_minute)));
    }
    let plan = Plan {
        url: args.url,
        devices: args.devices as usize,
        per_minute: args.per_minute,
        talkative: args.talkative,
        photo_bytes: args.photo_bytes.0 as usize,
        pattern: args.pattern,
        duration: args.duration,
        last_tries: args.last_tries,
    };
    let ledger = match &args.ledger {
        None => None,
        Some(path) => {
            Some(Arc::new(Ledger::create(path).map_err(|e| Failure(format!("cannot write {}: {e}", path.display())))?))
        }
    };
    let tally = Arc::new(Tally::default());
    let stop = stop_signal();
    let over = CancellationToken::new();
    let progress = tokio::spawn(show_progress(tally.clone(), plan.clone(), stop.clone(), over.clone()));
    let ran = fleet::run(plan, ledger, tally.clone(), stop).await;
    over.cancel();
    let _ = progress.await;
    ran.map_err(Failure)?;

    let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    say!(
        "{} photos taken, {} acknowledged ({}), {} tries repeated, {} refused, {} unanswered, {} put off{}",
        number(&tally.photos),
        number(&tally.acknowledged),
        ByteSize(number(&tally.acknowledged_bytes)),
        number(&tally.retries),
        number(&tally.refused),
        number(&tally.unanswered),
        number(&tally.put_off),
        match number(&tally.acknowledged) {
            0 => String::new(),
            _ => format!(
                "; acknowledged in {:.0} ms (median), {:.0} ms (p99)",
                tally.latency_ms(0.5),
                tally.latency_ms(0.99)
            ),
        },
    );
    if number(&tally.photos) == 0 {
        return Err(Failure("it ended before the first photo was taken".to_owned()));
    }
    let all = number(&tally.acknowledged) == number(&tally.photos);
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A line a second on a terminal, one every ten seconds elsewhere; and the first trouble as soon as there is one.
async fn show_progress(tally: Arc<Tally>, plan: Plan, stop: CancellationToken, over: CancellationToken) {
    let terminal = std::io::stderr().is_terminal();
    let clear = if terminal { "\r\x1b[2K" } else { "" };
    let every = if terminal { 1 } else { 10 };
    let (mut shown, mut trouble_told, mut stop_told) = (0, false, false);
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        let ended = tokio::select! {
            _ = ticks.tick() => false,
            () = over.cancelled() => true,
        };
        if !trouble_told && let Some(trouble) = tally.first_trouble() {
            trouble_told = true;
            eprintln!("{clear}the first trouble: {trouble}");
        }
        if ended {
            break;
        }
        if !stop_told && stop.is_cancelled() {
            stop_told = true;
            eprintln!(
                "{clear}stopping: what is under way has its last tries, for {} s at most",
                plan.last_tries.as_secs()
            );
        }
        let Some(began) = tally.began.get() else {
            if terminal {
                eprint!("{clear}making photos …");
            }
            continue;
        };
        let seconds = began.elapsed().as_secs();
        if seconds / every <= shown / every {
            continue;
        }
        shown = seconds;
        let time = match seconds > plan.duration.as_secs() || stop_told {
            true => format!("{seconds:>4} s, last tries"),
            false => format!("{seconds:>4} of {} s", plan.duration.as_secs()),
        };
        let line = format!(
            "{time}  {} photos, {} acknowledged, {} tries repeated, {} refused",
            tally.photos.load(Ordering::Relaxed),
            tally.acknowledged.load(Ordering::Relaxed),
            tally.retries.load(Ordering::Relaxed),
            tally.refused.load(Ordering::Relaxed),
        );
        if terminal { eprint!("{clear}{line}") } else { eprintln!("{line}") }
    }
    if terminal {
        eprintln!();
    }
}
