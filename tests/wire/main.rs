//! What leaves the site, measured on the wire: over links that the test makes, by the counters of their interfaces, with a
//! real store behind them and the real program before them.
//!
//! `make wire-test`; `WHAT` picks what is measured, see [`What`]; `FOR` says for how long, `RATES` at which allowances (in MB/s),
//! `ROUNDS` how often. As one of the tests it measures for a few seconds. Needs root. Exits 0 only if everything held that
//! it prints as PASS or FAIL. docs/link.md says what the figures mean.

// the parts that only the suite needs
#[allow(dead_code)]
#[path = "../suite/support/mod.rs"]
mod support;

mod counters;
mod link;
mod namespace;
mod rates;
mod rig;
mod slow;
mod takeover;
mod talkative;

use std::process::ExitCode;
use std::time::Duration;

use forebay::units::parse_span;
use tokio::signal::unix::{SignalKind, signal};

use crate::rig::Far;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// A few seconds, as one of the tests.
    Short,
    All,
    /// Whether the allowance is kept and filled, and rclone beside it.
    Rates,
    /// Two drains, of which the one that pours is killed or held.
    Takeover,
    /// Links that are slow, long, or stand still.
    Slow,
    /// A thousand devices of which one sends a hundred times as much.
    Talkative,
}

impl What {
    fn read(text: &str) -> Result<What, String> {
        match text {
            "short" => Ok(What::Short),
            "all" => Ok(What::All),
            "rates" => Ok(What::Rates),
            "takeover" => Ok(What::Takeover),
            "slow" => Ok(What::Slow),
            "talkative" => Ok(What::Talkative),
            other => Err(format!("WHAT is all, rates, takeover, slow, talkative or short, not {other:?}")),
        }
    }

    fn has(self, part: What) -> bool {
        self == part || self == What::All
    }
}

/// What was asked for.
struct Plan {
    what: What,
    duration: Option<Duration>,
    /// Bytes per second.
    rates: Vec<u64>,
    rounds: u32,
}

impl Plan {
    fn read() -> Result<Plan, String> {
        let asked = |name: &str, default: &str| {
            std::env::var(name).ok().filter(|text| !text.is_empty()).unwrap_or_else(|| default.to_owned())
        };
        let rate = |text: &str| match text.trim().parse::<f64>() {
            Ok(rate) if rate > 0.0 => Ok((rate * 1e6) as u64),
            _ => Err(format!("RATES are megabytes per second such as 1,5,25, not {text:?}")),
        };
        let rounds = asked("ROUNDS", "1");
        let span = asked("FOR", "");
        // a bare number is seconds
        let span = if span.parse::<u32>().is_ok() { format!("{span}s") } else { span };
        let duration = match span.as_str() {
            "" => None,
            span => Some(parse_span(span).map_err(|error| format!("FOR: {error}"))?),
        };
        Ok(Plan {
            what: What::read(&asked("WHAT", "short"))?,
            duration,
            rates: asked("RATES", "1,5,25").split(',').map(rate).collect::<Result<_, _>>()?,
            rounds: rounds.parse().map_err(|_| format!("ROUNDS is a number, not {rounds:?}"))?,
        })
    }

    /// For how long a measurement goes on that would by itself for `seconds`.
    fn seconds(&self, seconds: u64) -> u64 {
        self.duration.map_or(seconds, |duration| duration.as_secs().max(5))
    }
}

/// What must hold, and whether it did.
#[derive(Default)]
struct Verdicts(Vec<(String, bool)>);

impl Verdicts {
    fn hold(&mut self, what: &str, held: bool) {
        self.0.push((what.to_owned(), held));
    }

    /// Prints them; true when all held.
    fn tell(&self) -> bool {
        println!();
        for (what, held) in &self.0 {
            println!("{} {what}", if *held { "PASS" } else { "FAIL" });
        }
        self.0.iter().all(|(_, held)| *held)
    }
}

/// A rate as a share of the allowance.
fn percent(rate: f64, allowance: u64) -> String {
    format!("{:.2}%", rate * 100.0 / allowance as f64)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

async fn measure(plan: &Plan) -> bool {
    println!(
        "wire: {:?}. Counted is every Ethernet frame that leaves the site, with its 14-byte head, at an MTU of 1500; \
         the counters are read every 100 ms",
        plan.what
    );
    let (stolen, all) = namespace::stolen();
    let far = Far::start();
    let mut verdicts = Verdicts::default();
    if plan.what == What::Short {
        rates::short(&far, &mut verdicts).await;
    }
    if plan.what.has(What::Rates) {
        rates::run(plan, &far, &mut verdicts).await;
    }
    if plan.what.has(What::Takeover) {
        takeover::run(&far, &mut verdicts).await;
    }
    if plan.what.has(What::Slow) {
        slow::run(plan, &far, &mut verdicts).await;
    }
    if plan.what.has(What::Talkative) {
        talkative::run(plan, &far, &mut verdicts).await;
    }
    let (stolen_now, all_now) = namespace::stolen();
    let share = (stolen_now - stolen) / (all_now - all).max(1.0);
    println!("\nOf the processors' time {:.1}% was taken by the machine's host, for others.", share * 100.0);
    verdicts.tell()
}

fn main() -> ExitCode {
    // as one test among others: `cargo test <name>` and `--list` ask for it by name
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("wire: test");
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    if !filters.is_empty() && !filters.iter().any(|filter| "wire".contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    let plan = match Plan::read() {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("wire: {error}");
            return ExitCode::FAILURE;
        }
    };
    if !support::process::is_root() {
        eprintln!("wire: makes network namespaces and links, which needs root; run it as root");
        return ExitCode::FAILURE;
    }
    // before there is any other thread: everything that is started from here on is at the site
    namespace::unshare();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let sound = runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate()).expect("signals");
        // whoever is interrupted drops what it has made, and that ends or removes it
        tokio::select! {
            sound = measure(&plan) => sound,
            _ = tokio::signal::ctrl_c() => false,
            _ = terminated.recv() => false,
        }
    });
    // what still waits must not keep the process
    runtime.shutdown_timeout(Duration::from_secs(1));
    if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
