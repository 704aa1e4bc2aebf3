//! Two drains on one queue, each with a link of its own, so that the bytes of each are seen apart: the one that pours is killed,
//! then the one that pours is held for a while and let go again.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::counters::{Sampler, Trace};
use crate::link::Veth;
use crate::namespace::Namespace;
use crate::rig::Far;
use crate::support::backlog::{Backlog, allowing};
use crate::support::postgres::Cluster;
use crate::support::program::Program;
use crate::{Verdicts, percent};

const RATE: u64 = 5_000_000;
/// Enough for all that is done here.
const BACKLOG_SECONDS: u64 = 110;
/// What is looked at before and after.
const AROUND: Duration = Duration::from_secs(12);
const HELD: Duration = Duration::from_secs(15);
/// The longest that nobody may pour.
const TAKEOVER_MAX: Duration = Duration::from_secs(10);
/// What closing sixteen connections takes, none of which carries payload.
const FAREWELL_BYTES: u64 = 16 * 4 * 66;
const PATIENCE: Duration = Duration::from_secs(40);

struct Drain {
    namespace: Namespace,
    _link: Veth,
    program: Program,
}

pub async fn run(far: &Far, verdicts: &mut Verdicts) {
    println!("\ntakeover: two drains at {} MB/s, one Postgres, one spool", RATE as f64 / 1e6);
    let (_cluster, url) = tokio::task::spawn_blocking(|| {
        let cluster = Cluster::start(50);
        let url = cluster.database_by_socket();
        (cluster, url)
    })
    .await
    .unwrap();
    let mut settings = allowing(&far.bucket_by_a_link_of_its_own().await, RATE);
    settings.push(("FOREBAY_QUEUE_URL".into(), url.clone()));
    let mut site = Backlog::new(Some(&url)).await;
    site.add(RATE * BACKLOG_SECONDS).await;

    let (mut drains, mut counters) = (Vec::new(), Vec::new());
    let data = site.data();
    let mut links = Vec::new();
    for _ in 0..2 {
        let namespace = Namespace::new();
        let link = Veth::new(namespace.again(), &far.namespace);
        counters.push(link.counter_at_far_end());
        links.push((namespace, link));
    }
    let sampler = Sampler::start(&far.namespace, counters);
    for (namespace, link) in links {
        let program = Program::start_within(&namespace.path(), "drain", &settings, &data).await;
        drains.push(Drain { namespace, _link: link, program });
    }

    let leader = pouring(&sampler, Instant::now()).await;
    tokio::time::sleep(AROUND).await;
    let killed = Instant::now();
    drains[leader].program.kill();
    let (took, next) = taken_over(&sampler, killed, leader).await;
    tokio::time::sleep(AROUND).await;
    let highest = sampler.trace().since(killed - AROUND).highest(1);
    println!(
        "  the one that pours is killed: the other pours after {took}; highest 1 s {}, {}",
        percent(highest, RATE),
        when(&sampler.trace().since(killed - AROUND), killed, "the kill")
    );
    verdicts.hold("killed: the other pours within 10 s", took.is_in_time());
    verdicts.hold("killed: no second above the allowance", highest <= RATE as f64);

    drains[leader].program = Program::start_within(&drains[leader].namespace.path(), "drain", &settings, &data).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let held = Instant::now();
    drains[next].program.signal(Signal::STOP);
    let (took, _) = taken_over(&sampler, held, next).await;
    tokio::time::sleep((held + HELD).saturating_duration_since(Instant::now())).await;
    let woken = Instant::now();
    drains[next].program.signal(Signal::CONT);
    tokio::time::sleep(AROUND).await;
    let sent = sampler.trace_of(next).since(woken).bytes();
    let while_held = sampler.trace_of(next).between(held + Duration::from_secs(2), woken).bytes();
    let highest = sampler.trace().since(held - Duration::from_secs(4)).highest(1);
    println!(
        "  the one that pours is held for {} s: the other pours after {took}; what was held sends {while_held} bytes from \
         2 s on, and {sent} bytes once it is let go; highest 1 s {}, {}",
        HELD.as_secs(),
        percent(highest, RATE),
        when(&sampler.trace().since(held - Duration::from_secs(4)), woken, "it is let go")
    );
    verdicts.hold("held: the other pours within 10 s", took.is_in_time());
    verdicts.hold("held: nothing but farewells from the one that wakes", sent <= FAREWELL_BYTES);
    verdicts.hold("held: no second above the allowance", highest <= RATE as f64);
    verdicts.hold("takeover: there was a backlog to the end", site.books().await.queued.uploads > 0);
}

/// When the highest second was.
fn when(trace: &Trace, event: Instant, name: &str) -> String {
    match trace.highest_ends(1) {
        Some(at) if at >= event => format!("which ends {:.1} s after {name}", (at - event).as_secs_f64()),
        Some(at) => format!("which ends {:.1} s before {name}", (event - at).as_secs_f64()),
        None => "at no time".to_owned(),
    }
}

/// How long it took until another poured, if one did.
struct Took(Option<Duration>);

impl Took {
    fn is_in_time(&self) -> bool {
        self.0.is_some_and(|took| took <= TAKEOVER_MAX)
    }
}

impl std::fmt::Display for Took {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(took) => write!(f, "{:.1} s", took.as_secs_f64()),
            None => write!(f, "more than {} s", PATIENCE.as_secs()),
        }
    }
}

/// Which of the two pours.
async fn pouring(sampler: &Sampler, since: Instant) -> usize {
    until_poured(sampler, since, &[0, 1]).await.map_or(0, |(drain, _)| drain)
}

/// After the one that poured was ended or held.
async fn taken_over(sampler: &Sampler, at: Instant, before: usize) -> (Took, usize) {
    let other = 1 - before;
    let poured = until_poured(sampler, at, &[other]).await;
    (Took(poured.map(|(_, since)| since - at)), other)
}

async fn until_poured(sampler: &Sampler, since: Instant, drains: &[usize]) -> Option<(usize, Instant)> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        for &drain in drains {
            if let Some((_, at)) = sampler.trace_of(drain).since(since).first_payload() {
                return Some((drain, at));
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    None
}
