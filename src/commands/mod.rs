//! The commands of the `forebay` program, one file each, and what they share: flags, the runtime, signals, failures.

/// A line on standard output. Whoever reads it may have had enough, as `head` has; that is no failure.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

mod appliance;
mod asking;
mod config;
mod demo;
mod list;
mod migrate;
mod rate;
mod rebuild;
mod simulate;
mod status;
mod verify;

use std::collections::BTreeMap;
use std::fmt;
use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, ConfigErrors, SETTINGS, Source};

/// Takes photos from a site's devices and lets them out to S3 at the share of the uplink that the site allows.
#[derive(Parser)]
#[command(
    name = "forebay",
    version,
    arg_required_else_help = true,
    after_help = "\
Examples:
  forebay demo                                     see it at work on this machine, nothing to set up
  forebay serve --s3-bucket photos                 the single-box appliance; see sample.env for all settings
  forebay simulate --url http://127.0.0.1:8080/ --devices 100 --for 30s
  forebay status                                   what is happening now
  forebay rate set 100% --for 1h                   the whole link for an hour
  forebay verify                                   does everything agree?"
)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// The whole thing on this machine, with simulated devices and an embedded S3; nothing to set up
    Demo(demo::Args),
    /// Every role in one process: the single-box appliance
    Serve(SettingFlags),
    /// Take photos from devices; any number of replicas on one spool and one Postgres
    Ingest(SettingFlags),
    /// Let photos out to S3, and keep house
    Drain(SettingFlags),
    /// A fleet of simulated devices against any URL
    Simulate(simulate::Args),
    /// Hold spool, queue and bucket (and a ledger) against each other; exit 0 only if nothing disagrees
    Verify(verify::Args),
    /// What a running forebay is doing
    Status(status::Args),
    /// What the drain may use of the uplink, shown and changed while it runs
    Rate(rate::Args),
    /// Let nothing out until it is resumed
    Pause(rate::PauseArgs),
    /// Let what waits out again
    Resume(rate::ResumeArgs),
    /// List uploads, newest first
    List(list::Args),
    /// Bring the queue's schema up to date
    Migrate(SettingFlags),
    /// Put every photo of the spool into the queue that is not in it: after the queue was lost
    Rebuild(SettingFlags),
    /// The configuration in force, and where each value comes from
    Config(config::Args),
}

/// Threads of a drain for what blocks. That is the disk, which does not get faster by more; the store's name is looked up elsewhere
/// (`src/bucket/dial.rs`). At least two, as a look for orphans waits in one for what others do, and some more, so that photos are read
/// while house-keeping takes long.
const DRAIN_BLOCKING_THREADS: usize = 4;

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    raise_open_files();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Action::Drain(_) = cli.command {
        // it waits for the pacer nearly all of the time, and two workers would wake each other for every slice
        runtime.worker_threads(1);
        // tokio calls the one that has been idle for longest, so of many each would find nothing of its own in the caches
        runtime.max_blocking_threads(DRAIN_BLOCKING_THREADS);
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(Failure(format!("cannot start: {error}"))),
    };
    let done = runtime.block_on(async {
        match cli.command {
            Action::Demo(args) => demo::run(args).await,
            Action::Serve(flags) => appliance::run(appliance::Roles::All, flags).await,
            Action::Ingest(flags) => appliance::run(appliance::Roles::Ingest, flags).await,
            Action::Drain(flags) => appliance::run(appliance::Roles::Drain, flags).await,
            Action::Simulate(args) => simulate::run(args).await,
            Action::Verify(args) => verify::run(args).await,
            Action::Status(args) => status::run(args).await,
            Action::Rate(args) => rate::run(args).await,
            Action::Pause(args) => rate::pause(args).await,
            Action::Resume(args) => rate::resume(args).await,
            Action::List(args) => list::run(args).await,
            Action::Migrate(flags) => migrate::run(flags).await,
            Action::Rebuild(flags) => rebuild::run(flags).await,
            Action::Config(args) => config::run(args),
        }
    });
    // blocking tasks that hang on a dead disk must not keep the process
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    done.unwrap_or_else(fail)
}

fn fail(Failure(text): Failure) -> ExitCode {
    eprintln!("forebay: {text}");
    ExitCode::FAILURE
}

/// Why a command ended without doing its work, for people.
#[derive(Debug)]
struct Failure(String);

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Self {
        Failure(error.to_string())
    }
}

impl From<ConfigErrors> for Failure {
    fn from(errors: ConfigErrors) -> Self {
        Failure(errors.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

type Outcome = Result<ExitCode, Failure>;

/// A flag for every setting, made from the table of settings, so that the two cannot drift apart.
#[derive(Debug, Clone, Default)]
struct SettingFlags(BTreeMap<String, String>);

impl SettingFlags {
    fn source(self) -> Source {
        Source::process(self.0)
    }

    fn config(self) -> Result<Config, ConfigErrors> {
        Config::load(&self.source())
    }
}

impl clap::Args for SettingFlags {
    fn augment_args(command: Command) -> Command {
        SETTINGS.iter().fold(command, |command, setting| {
            let default =
                if setting.default.is_empty() { String::new() } else { format!(" [default: {}]", setting.default) };
            command.arg(
                Arg::new(setting.flag)
                    .long(setting.flag)
                    .value_name("VALUE")
                    .help_heading("Settings (also by environment)")
                    .help(format!("{} [env: {}]{default}", setting.help, setting.variable)),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = SETTINGS.iter().filter_map(|setting| {
            let text = matches.get_one::<String>(setting.flag)?;
            Some((setting.flag.to_owned(), text.clone()))
        });
        Ok(SettingFlags(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Cancelled by the first SIGTERM or Ctrl-C; a second one ends the process at once.
fn stop_signal() -> CancellationToken {
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        terminated().await;
        told.cancel();
        terminated().await;
        std::process::exit(130);
    });
    stop
}

async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
        }
        Err(_) => drop(tokio::signal::ctrl_c().await),
    }
}

/// A thousand devices are a thousand sockets, and the usual soft limit is 1024 files.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// The whole command line, for the tests that hold it to its documentation.
pub fn command_line() -> Command {
    Cli::command()
}
