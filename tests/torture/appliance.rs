//! The whole appliance as replicas (nginx, three ingests, two drains, Postgres), and one of its processes at a time killed
//! and started again, as an init system would.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::findings::Findings;
use crate::support::agreement::{self, rebuild};
use crate::support::faulty_s3::{Fault, FaultyS3, Mood};
use crate::support::nginx::Nginx;
use crate::support::postgres::Cluster;
use crate::support::program::{Program, s3_settings};
use crate::support::{eventually, free_port, weed};
use crate::{Plan, What};

const INGESTS: usize = 3;
const DRAINS: usize = 2;
/// The share of all requests that S3 fails.
const S3_FAULTS: f64 = 0.3;
/// A line so often.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// The longest that the backlog may take to be gone once all is well.
const HEALED_MAX: Duration = Duration::from_secs(600);

struct Appliance {
    data: std::path::PathBuf,
    settings: Vec<(String, String)>,
    cluster: Arc<Cluster>,
    /// Each with the settings that give it its address.
    ingests: Vec<(Program, Vec<(String, String)>)>,
    drains: Vec<Program>,
    nginx: Nginx,
}

/// What can be killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Ingest(usize),
    Drain(usize),
    Nginx,
    Postgres,
}

impl Victim {
    fn any(what: What) -> Victim {
        if what == What::Postgres {
            return Victim::Postgres;
        }
        match rand::random_range(0..10) {
            0..4 => Victim::Ingest(rand::random_range(0..INGESTS)),
            4..7 => Victim::Drain(rand::random_range(0..DRAINS)),
            7 => Victim::Nginx,
            _ => Victim::Postgres,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Victim::Ingest(_) => "ingest",
            Victim::Drain(_) => "drain",
            Victim::Nginx => "nginx",
            Victim::Postgres => "postgres",
        }
    }
}

impl Appliance {
    async fn start(folder: &Path, s3: Vec<(String, String)>) -> Appliance {
        let cluster = Arc::new(blocking(|| Cluster::start(100)).await);
        let of_database = cluster.clone();
        let url = blocking(move || of_database.database()).await;
        let data = folder.join("data");
        let mut settings = s3;
        settings.push(("FOREBAY_QUEUE_URL".into(), url));
        // the link is not what is looked at here
        settings.push(("FOREBAY_UPLINK_RATE".into(), "1Gbit/s".into()));
        let mut ingests = Vec::new();
        for _ in 0..INGESTS {
            let mut settings = settings.clone();
            settings.push(("FOREBAY_LISTEN".into(), format!("127.0.0.1:{}", free_port())));
            ingests.push((Program::start("ingest", &settings, &data).await, settings));
        }
        let mut drains = Vec::new();
        for _ in 0..DRAINS {
            drains.push(Program::start("drain", &settings, &data).await);
        }
        let replicas: Vec<String> = ingests.iter().map(|(ingest, _)| ingest.address()).collect();
        let nginx = Nginx::start(&replicas).await;
        Appliance { data, settings, cluster, ingests, drains, nginx }
    }

    /// Kills one process and starts it again; how long it took to be ready.
    async fn kill(&mut self, victim: Victim) -> Duration {
        match victim {
            Victim::Ingest(number) => {
                let (ingest, settings) = &mut self.ingests[number];
                ingest.kill();
                let began = Instant::now();
                *ingest = Program::start("ingest", settings, &self.data).await;
                let client = reqwest::Client::builder().no_proxy().build().unwrap();
                let ready = format!("{}/readyz", ingest.url);
                eventually("an ingest to be ready", async || {
                    client.get(&ready).send().await.ok().filter(|answer| answer.status().is_success())
                })
                .await;
                began.elapsed()
            }
            Victim::Drain(number) => {
                self.drains[number].kill();
                let began = Instant::now();
                self.drains[number] = Program::start("drain", &self.settings, &self.data).await;
                agreement::status(&self.drains[number]).await;
                began.elapsed()
            }
            Victim::Nginx => {
                self.nginx.kill();
                let began = Instant::now();
                self.nginx.start_again().await;
                began.elapsed()
            }
            Victim::Postgres => {
                let cluster = self.cluster.clone();
                blocking(move || cluster.kill()).await;
                tokio::time::sleep(Duration::from_millis(rand::random_range(0..4000))).await;
                let cluster = self.cluster.clone();
                let began = Instant::now();
                blocking(move || cluster.start_again()).await;
                // ready is when the queue takes photos again, for an ingest that has lived through it
                let client = reqwest::Client::builder().no_proxy().build().unwrap();
                let ready = format!("{}/readyz", self.ingests[0].0.url);
                eventually("the queue to be back", async || {
                    let answer = client.get(&ready).send().await.ok()?;
                    answer.text().await.ok().filter(|text| text.contains("\"ready\""))
                })
                .await;
                began.elapsed()
            }
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// Runs the plan; true when everything is as it must be.
pub async fn run(plan: &Plan) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let (bucket, endpoint, name) = weed::bucket().await;
    let s3 = FaultyS3::before(&endpoint).await;
    let mut appliance = Appliance::start(folder.path(), s3_settings(&s3.endpoint, &name)).await;
    if plan.what != What::Postgres {
        let mut faults = Fault::OF_THE_ENVIRONMENT.to_vec();
        faults.extend([Fault::BodyCorrupted, Fault::WrongChecksum]);
        s3.set(Mood::Share(S3_FAULTS, faults));
    }
    let fleet = plan.fleet(&format!("{}/", appliance.nginx.url), folder.path());
    let ledger = fleet.ledger.clone();
    println!(
        "torture: {:?} for {:?}, {} devices with {} photos a minute of {} bytes",
        plan.what, plan.duration, plan.devices, plan.per_minute, plan.photo_bytes
    );
    let sending: JoinHandle<String> =
        tokio::spawn(async move { String::from_utf8_lossy(&fleet.run().await.stdout).into_owned() });

    let mut findings = Findings { unnoticed: plan.what == What::Postgres, ..Findings::default() };
    let (began, mut told) = (Instant::now(), Instant::now());
    while began.elapsed() < plan.duration {
        tokio::time::sleep(Duration::from_millis(rand::random_range(1000..5000))).await;
        if plan.what != What::S3 && began.elapsed() < plan.duration {
            let victim = Victim::any(plan.what);
            let ready = appliance.kill(victim).await;
            findings.kills.push((victim.name(), ready));
        }
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            println!(
                "{:>5} s  {} kills, {} of {} S3 requests failed, {}",
                began.elapsed().as_secs(),
                findings.kills.len(),
                s3.faults(),
                s3.requests(),
                backlog(&appliance).await,
            );
        }
    }
    findings.seconds = began.elapsed().as_secs();
    s3.set(Mood::Sound);
    (findings.s3_requests, findings.s3_faults) = (s3.requests(), s3.faults());
    findings.fleet = sending.await.unwrap();
    println!("healing: what is left is drained");
    rebuild(&appliance.settings, &appliance.data).await;
    let healing = Instant::now();
    while uploads_waiting(&appliance).await != Some(0) {
        if healing.elapsed() > HEALED_MAX {
            println!("TROUBLE: {} after {HEALED_MAX:?}", backlog(&appliance).await);
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    println!("reading every photo back");
    findings.hold(&ledger, &bucket, &s3_settings_of(&appliance, &endpoint), &appliance.data).await;
    findings.are_sound()
}

/// The settings, with the bucket reached directly.
fn s3_settings_of(appliance: &Appliance, endpoint: &forebay::config::Endpoint) -> Vec<(String, String)> {
    let mut settings = appliance.settings.clone();
    settings
        .iter_mut()
        .filter(|(name, _)| name == "AWS_ENDPOINT_URL_S3")
        .for_each(|(_, url)| *url = endpoint.url.clone());
    settings
}

/// Uploads that are not in the bucket yet, if the drains can tell.
async fn uploads_waiting(appliance: &Appliance) -> Option<u64> {
    let status = agreement::status(&appliance.drains[0]).await;
    status["queue"]["reachable"].as_bool()?.then(|| status["backlog"]["uploads"].as_u64())?
}

async fn backlog(appliance: &Appliance) -> String {
    match uploads_waiting(appliance).await {
        Some(uploads) => format!("{uploads} uploads wait"),
        None => "the queue is away".to_owned(),
    }
}
