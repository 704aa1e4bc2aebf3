//! How many uploads a second: Forebay, which checks, hashes, syncs and queues each one, beside nginx, which only stores raw
//! photos, and, through nginx with three replicas, beside the design it replaces.
//!
//! nginx syncs nothing, so at first it only fills memory; when as much is dirty as the kernel allows (a fifth of what is free, by
//! default), it goes on at the pace at which that is written to the disk. So a load that goes on is measured beside what comes at
//! first: a site's does not end either.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::leftovers::Leftovers;
use crate::load::{self, Bodies, Load, PHOTO_BYTES, Seen};
use crate::machine::cpu;
use crate::peers::{Flask, Nginx};
use crate::report::{Contestant, Measured, Report, Target};
use crate::support::nginx;
use crate::support::postgres::Cluster;
use crate::support::program::{Program, s3_settings};
use crate::support::weed;
use crate::{Plan, Turn, cpu_per, settle, turns};

const CONNECTIONS: u32 = 32;

/// Seconds of load that goes on, for each of load at first.
const GOES_ON_TIMES_AS_LONG: u64 = 2;

fn at_full_speed(plan: &Plan) -> Load {
    Load { connections: CONNECTIONS, seconds: plan.seconds, per_second: None }
}

fn that_goes_on(plan: &Plan) -> Load {
    Load { seconds: plan.seconds * GOES_ON_TIMES_AS_LONG, ..at_full_speed(plan) }
}

/// How long a round loads one contestant.
pub fn seconds(plan: &Plan) -> u64 {
    at_full_speed(plan).seconds + that_goes_on(plan).seconds
}

/// Forebay's replicas on a queue and a spool of their own.
pub struct Site {
    pub replicas: Vec<Program>,
    settings: Vec<(String, String)>,
    data: TempDir,
}

impl Site {
    pub async fn start(replicas: usize, cluster: &Cluster, store: &weed::Server) -> Site {
        let (_, bucket) = store.bucket().await;
        let mut settings = s3_settings(&store.endpoint, &bucket);
        settings.push(("FOREBAY_QUEUE_URL".to_owned(), cluster.database()));
        let data = tempfile::tempdir().expect("a folder for the spool");
        crate::migrate(&settings, data.path()).await;
        let mut site = Site { replicas: Vec::new(), settings, data };
        for _ in 0..replicas {
            site.replicas.push(Program::start("ingest", &site.settings, &site.folder()).await);
        }
        site
    }

    fn folder(&self) -> PathBuf {
        self.data.path().join("data")
    }

    /// Stops, and holds queue, spool and bucket against each other: each good answer is an upload, and nothing disagrees. What
    /// it has stored.
    pub async fn agrees(mut self, seen: &[&Seen]) -> TempDir {
        for replica in self.replicas.drain(..) {
            assert!(replica.terminate().await, "a replica stops in order");
        }
        let report = crate::verified(&self.settings, &self.folder()).await;
        let queued = report["waiting"].as_u64().unwrap_or(0);
        let answered: u64 = seen.iter().map(|seen| seen.uploads()).sum();
        assert!(queued >= answered, "{queued} are queued, {answered} were answered");
        self.data
    }
}

/// What both comparisons stand on.
struct Rig<'a> {
    plan: &'a Plan,
    bodies: &'a Bodies,
    cluster: &'a Cluster,
    store: &'a weed::Server,
}

pub async fn run_all(plan: &Plan, bodies: &Bodies, leftovers: &mut Leftovers, report: &mut Report) {
    let cluster = tokio::task::spawn_blocking(|| Cluster::start(200)).await.expect("Postgres starts");
    let store = tokio::task::spawn_blocking(|| weed::Server::start("127.0.0.1", None)).await.expect("weed starts");
    let rig = Rig { plan, bodies, cluster: &cluster, store: &store };
    one(&rig, leftovers, report).await;
    replicas(&rig, leftovers, report).await;
    leftovers.keep_cluster(cluster);
}

/// What one contestant did, a figure for each round.
#[derive(Default)]
struct Rounds {
    first: Vec<f64>,
    on: Vec<f64>,
    cost_ms: Vec<f64>,
    p99_ms: Vec<f64>,
}

impl Rounds {
    /// Loads the process `pid` at once and on; what was seen.
    async fn load(
        &mut self,
        plan: &Plan,
        method: &str,
        url: &str,
        kind: &str,
        files: &[PathBuf],
        pid: u32,
    ) -> [Seen; 2] {
        let before = cpu(pid);
        let first = load::send(method, url, kind, files, at_full_speed(plan)).await;
        self.cost_ms.push(cpu_per(cpu(pid) - before, first.uploads()));
        let on = load::send(method, url, kind, files, that_goes_on(plan)).await;
        assert!(first.refused + first.broken + on.refused + on.broken == 0, "{first:?}, {on:?}");
        self.first.push(first.per_second());
        self.on.push(on.per_second());
        self.p99_ms.push(first.p99 as f64 / 1000.0);
        [first, on]
    }
}

async fn one(rig: &Rig<'_>, leftovers: &mut Leftovers, report: &mut Report) {
    let Rig { plan, bodies, cluster, store } = *rig;
    let (mut ours, mut theirs) = (Rounds::default(), Rounds::default());
    for round in 0..plan.rounds {
        for turn in turns(round) {
            match turn {
                Turn::Theirs => {
                    plan.tell(round, "nginx stores raw photos");
                    let nginx = Nginx::storing().await;
                    let [first, on] =
                        theirs.load(plan, "PUT", &nginx.url, "image/jpeg", &bodies.raw, nginx.pid()).await;
                    let stored = nginx.stored();
                    assert!(stored >= first.uploads() + on.uploads(), "{stored} are stored, {first:?}, {on:?}");
                    leftovers.keep(nginx.end());
                }
                Turn::Ours => {
                    plan.tell(round, "forebay takes base64 in JSON");
                    let site = Site::start(1, cluster, store).await;
                    let (url, pid) = (format!("{}/", site.replicas[0].url), site.replicas[0].pid());
                    let [first, on] = ours.load(plan, "POST", &url, "application/json", &bodies.json, pid).await;
                    leftovers.keep(site.agrees(&[&first, &on]).await);
                }
            }
            settle().await;
        }
    }
    let first = format!("Uploads of {} kB a second, {CONNECTIONS} connections", PHOTO_BYTES / 1000);
    let on = format!(
        "The same, of a load that goes on: what the {} s after those {} s bring",
        that_goes_on(plan).seconds,
        plan.seconds
    );
    for (what, ours, theirs) in [(first, ours.first, theirs.first), (on, ours.on, theirs.on)] {
        report.add(Measured {
            what,
            unit: "uploads/s".to_owned(),
            contestants: vec![
                Contestant { name: "forebay ingest: JSON, SHA-256, fsync, Postgres".to_owned(), rounds: ours },
                Contestant { name: "nginx dav PUT: raw, nothing synced".to_owned(), rounds: theirs },
            ],
            targets: vec![Target::TimesAtLeast(1.0)],
        });
    }
    report.add(Measured {
        what: "Processor time for an upload, at full load".to_owned(),
        unit: "ms".to_owned(),
        contestants: vec![
            Contestant { name: "forebay ingest, Postgres apart".to_owned(), rounds: ours.cost_ms },
            Contestant { name: "nginx dav PUT".to_owned(), rounds: theirs.cost_ms },
        ],
        targets: vec![],
    });
    report.add(Measured {
        what: "Time to an acknowledgement, p99, at full load".to_owned(),
        unit: "ms".to_owned(),
        contestants: vec![Contestant { name: "forebay ingest".to_owned(), rounds: ours.p99_ms }],
        targets: vec![],
    });
}

async fn replicas(rig: &Rig<'_>, leftovers: &mut Leftovers, report: &mut Report) {
    let Rig { plan, bodies, cluster, store } = *rig;
    let (mut ours, mut theirs) = (vec![], vec![]);
    for round in 0..plan.rounds {
        for turn in turns(round) {
            match turn {
                Turn::Theirs => {
                    plan.tell(round, "Flask under gunicorn behind nginx");
                    let flask = Flask::start(cluster).await;
                    let seen =
                        load::send("POST", flask.url(), "application/json", &bodies.json, at_full_speed(plan)).await;
                    assert!(seen.refused + seen.broken == 0 && flask.stored() >= seen.uploads(), "{seen:?}");
                    theirs.push(seen.per_second());
                    flask.end().into_iter().for_each(|folder| leftovers.keep(folder));
                }
                Turn::Ours => {
                    plan.tell(round, "three replicas of forebay behind nginx");
                    let site = Site::start(3, cluster, store).await;
                    let addresses: Vec<String> = site.replicas.iter().map(Program::address).collect();
                    let front = nginx::Nginx::start(&addresses).await;
                    let url = format!("{}/", front.url);
                    let seen = load::send("POST", &url, "application/json", &bodies.json, at_full_speed(plan)).await;
                    assert!(seen.refused + seen.broken == 0, "{seen:?}");
                    ours.push(seen.per_second());
                    drop(front);
                    leftovers.keep(site.agrees(&[&seen]).await);
                }
            }
            settle().await;
        }
    }
    report.add(Measured {
        what: "The same through nginx, the body JSON for both".to_owned(),
        unit: "uploads/s".to_owned(),
        contestants: vec![
            Contestant { name: "nginx and three replicas of forebay ingest".to_owned(), rounds: ours },
            Contestant { name: "nginx, gunicorn, Flask, Postgres".to_owned(), rounds: theirs },
        ],
        targets: vec![Target::TimesAtLeast(5.0)],
    });
}
