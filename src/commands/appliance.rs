//! `serve`, `ingest`, `drain`: the roles wired together, started and stopped in order.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Failure, Outcome, SettingFlags, stop_signal};
use crate::bucket::Bucket;
use crate::config::{Config, QueueUrl};
use crate::console::{self, Parts};
use crate::crash_points;
use crate::drain::{Drain, steering};
use crate::http::listener;
use crate::ingest::Ingest;
use crate::keeper::Keeper;
use crate::pacer::Pacer;
use crate::queue::Queue;
use crate::spool::Spool;
use crate::telemetry;

/// How long requests and uploads in flight may take to finish once the process is told to stop. Below the ten seconds after
/// which container runtimes kill.
pub const GRACE: Duration = Duration::from_secs(8);
/// How long the queue's connections may take to be closed in order.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// How long what is left to tell the collector may take to be sent, which gives up by itself before that.
const TELL_TIMEOUT: Duration = Duration::from_secs(6);

/// Which roles a process runs; the console is in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Roles {
    All,
    Ingest,
    Drain,
}

impl Roles {
    fn ingest(self) -> bool {
        self != Roles::Drain
    }

    fn drain(self) -> bool {
        self != Roles::Ingest
    }

    fn names(self) -> Vec<&'static str> {
        match self {
            Roles::All => vec!["ingest", "drain", "console"],
            Roles::Ingest => vec!["ingest", "console"],
            Roles::Drain => vec!["drain", "console"],
        }
    }
}

/// Runs until told to stop.
pub async fn run(roles: Roles, flags: SettingFlags) -> Outcome {
    let config = flags.config()?;
    let bucket = match roles.drain() {
        true => Some(Bucket::connect(config.require_bucket()?).await),
        false => None,
    };
    let telemetry = telemetry::start(&config.log)?;
    crash_points::arm(&config.crash_points);
    let stop = stop_signal();
    let appliance = Appliance::start(&config, roles, bucket, Some(telemetry.registry()), stop.clone()).await?;
    stop.cancelled().await;
    tracing::info!("stopping: what is in flight may finish");
    appliance.stopped().await;
    tracing::info!("stopped");
    // a dead disk may have every thread for what blocks, and must not keep the process
    let _ = timeout(TELL_TIMEOUT, tokio::task::spawn_blocking(move || telemetry.stop())).await;
    Ok(ExitCode::SUCCESS)
}

/// The running roles of one process.
pub struct Appliance {
    pub queue: Queue,
    pub spool: Spool,
    pub pacer: Pacer,
    /// Where devices send, if this process takes photos.
    pub ingest_address: Option<SocketAddr>,
    pub console_address: SocketAddr,
    pub snapshots: watch::Receiver<std::sync::Arc<crate::status::Status>>,
    tasks: JoinSet<()>,
}

impl Appliance {
    /// Starts `roles`; they stop when `stop` is cancelled.
    pub async fn start(
        config: &Config,
        roles: Roles,
        bucket: Option<Bucket>,
        registry: Option<prometheus::Registry>,
        stop: CancellationToken,
    ) -> Result<Appliance, Failure> {
        let spool = Spool::open(&config.data_dir, config.spool)?;
        let queue = Queue::open(&config.queue)?;
        let mut tasks = JoinSet::new();
        migrate(&config.queue, &queue, &mut tasks, &stop).await?;

        let look = steering::look(&queue).await;
        let first = steering::standing(&look, &config.uplink);
        let pacer = Pacer::new(config.uplink.rate);
        // until it is heard what operators said
        pacer.set_allowance(None);
        let (allowance, rule) = (first.in_force.allowance, first.in_force.rule.clone());
        let (steered, standing) = watch::channel(first);
        let (looking, looks) = watch::channel(look);
        let bucket = bucket.filter(|_| roles.drain());
        let of_the_drain = roles.drain().then(|| pacer.clone());
        let (stopping, drained) = (stop.clone(), CancellationToken::new());
        let until_drained = drained.clone().drop_guard();
        let over = async move {
            stopping.cancelled().await;
            // what finishes still pours, and a pause or a lower rate is heeded until it has
            drained.cancelled().await;
        };
        let (asked, uplink) = (queue.clone(), config.uplink.clone());
        tasks.spawn(steering::steer(of_the_drain, asked, uplink, looking, steered, over));

        let mut drain_parts = None;
        if let Some(bucket) = bucket {
            let drain = Drain::new(spool.clone(), queue.clone(), bucket, pacer.clone())
                .ordered(config.order, config.fresh_share);
            drain_parts = Some((pacer.clone(), drain.condition()));
            let keeper = Keeper::new(config, spool.clone(), queue.clone()).beside(drain.condition());
            let (stop_drain, stop_keeper) = (stop.clone(), stop.clone());
            tasks.spawn(async move {
                let _until_drained = until_drained;
                drain.run(stop_drain, GRACE).await;
            });
            tasks.spawn(async move { keeper.run(stop_keeper).await });
        }

        let mut ingest_address = None;
        if roles.ingest() {
            let ingest = Ingest::new(config, spool.clone(), queue.clone(), stop.clone());
            let (accepting, router) = (ingest.accepting(), ingest.router());
            let tcp = bind(config.listen, "FOREBAY_LISTEN")?;
            ingest_address = tcp.local_addr().ok();
            let stop = stop.clone();
            tasks.spawn(async move {
                let over = async {
                    stop.cancelled().await;
                    sleep(GRACE).await;
                };
                let done = async {
                    listener::serve(tcp, router, stop.clone(), GRACE).await;
                    accepting.close();
                    accepting.wait().await;
                };
                tokio::select! {
                    () = done => {}
                    () = over => {
                        let photos = accepting.len();
                        tracing::warn!(photos, "still being made durable when the time to stop was over; no device was told yes");
                    }
                }
            });
        }

        let parts = Parts {
            roles: roles.names(),
            queue: queue.clone(),
            spool: spool.clone(),
            looks,
            uplink: config.uplink.clone(),
            standing,
            retain: config.retain,
            when_full: config.when_full,
            drain: drain_parts,
        };
        let snapshots = console::start_snapshots(parts, stop.clone()).await;
        let tcp = bind(config.console_listen, "FOREBAY_CONSOLE_LISTEN")?;
        let console_address = tcp.local_addr().unwrap_or(config.console_listen);
        let router = console::router(snapshots.clone(), queue.clone(), config.uplink.clone(), registry);
        tasks.spawn(async move { listener::serve(tcp, router, stop, GRACE).await });

        tracing::info!(
            roles = roles.names().join(","),
            devices = ingest_address.map(|a| format!("http://{a}/")).unwrap_or_default(),
            console = format!("http://{console_address}/"),
            queue = queue.kind(),
            data_dir = %config.data_dir.display(),
            allowance = allowance.map_or("nothing".to_owned(), |rate| rate.to_string()),
            %rule,
            timezone = config.uplink.zone.name,
            "forebay is up"
        );
        Ok(Appliance { queue, spool, pacer, ingest_address, console_address, snapshots, tasks })
    }

    /// Waits until every role has stopped, and closes the queue.
    pub async fn stopped(self) {
        let queue = self.queue.clone();
        self.roles_stopped().await;
        // whoever has a connection in hand has had its time
        let _ = timeout(CLOSE_TIMEOUT, queue.close()).await;
    }

    /// Waits until every role has stopped; the queue stays open.
    pub async fn roles_stopped(mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a role ended in a panic");
            }
        }
    }
}

fn bind(address: SocketAddr, variable: &str) -> Result<TcpListener, Failure> {
    listener::bind(address)
        .map_err(|error| Failure(format!("cannot listen on {address}: {error}; set {variable} to another address")))
}

/// Different reasons that are told for which the schema cannot be brought up to date.
const REASONS_MAX: usize = 20;

/// Brings the schema up to date. A Postgres that is away does not keep a process from starting: photos are taken all the
/// same, and the schema follows when it is back.
async fn migrate(
    url: &QueueUrl,
    queue: &Queue,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let error = match queue.migrate().await {
        Ok(_) => return Ok(()),
        Err(error) => error,
    };
    if let QueueUrl::Sqlite(path) = url {
        return Err(Failure(format!("{}: {error}", path.display())));
    }
    tracing::warn!(%error, "the queue is away; its schema is checked when it is back");
    let (queue, stop, mut told) = (queue.clone(), stop.clone(), HashSet::from([error.to_string()]));
    tasks.spawn(async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = stop.cancelled() => return,
            }
            match queue.migrate().await {
                Ok(_) => {
                    tracing::info!("the queue is there and its schema is up to date");
                    return;
                }
                // a role that lacks a right, or a schema newer than this program, does not come back by itself
                Err(error) => {
                    if told.len() < REASONS_MAX && told.insert(error.to_string()) {
                        tracing::warn!(%error, "the queue's schema is not known to be up to date; trying again");
                    }
                }
            }
        }
    });
    Ok(())
}
