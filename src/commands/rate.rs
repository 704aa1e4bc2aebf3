//! `forebay rate`, `pause` and `resume`: what the drain may use, shown and changed while it runs, over the console.

use std::process::ExitCode;

use reqwest::Method;
use serde_json::{Value, json};

use super::asking::Console;
use super::{Outcome, SettingFlags};
use crate::config::{Config, Source};
use crate::status::RateStatus;

#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  forebay rate                        what is allowed now, by which rule, and the week
  forebay rate set 100% --for 1h      the whole link for an hour
  forebay rate set 40Mbit/s --until 2027-01-31T06:00:00Z
  forebay rate clear                  back to the timetable, or the share"
)]
pub struct Args {
    #[command(subcommand)]
    change: Option<Change>,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Subcommand)]
enum Change {
    /// Allow another rate, at once and in whichever process pours; it outlives restarts
    Set(SetArgs),
    /// Back to the timetable, or the share
    Clear(Common),
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  forebay rate set 100% --for 1h
  forebay rate set 5MB/s --who anna")]
struct SetArgs {
    /// A share of the uplink such as 50%, or a rate such as 5MB/s or 40Mbit/s
    #[arg(value_name = "RATE")]
    rate: String,
    #[command(flatten)]
    time: TimeArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct TimeArgs {
    /// Ends by itself after this time, such as 1h30m; 30d at most
    #[arg(long = "for", value_name = "SPAN", conflicts_with = "until")]
    span: Option<String>,
    /// Ends by itself at this RFC 3339 time
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Who says so, for those who wonder later [default: the name of the user]
    #[arg(long)]
    who: Option<String>,
}

#[derive(clap::Args)]
struct Common {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: SettingFlags,
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  forebay pause                       nothing leaves until `forebay resume`
  forebay pause --for 1h              or until an hour from now

Photos are taken all the while. What is in the middle of being sent is sent again afterwards.")]
pub struct PauseArgs {
    #[command(flatten)]
    time: TimeArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  forebay resume                      what waits may leave again")]
pub struct ResumeArgs {
    #[command(flatten)]
    common: Common,
}

pub async fn run(args: Args) -> Outcome {
    match args.change {
        None => ask(args.common, Method::GET, "/rate", None).await,
        Some(Change::Clear(common)) => ask(common, Method::DELETE, "/rate", None).await,
        Some(Change::Set(SetArgs { rate, time, common })) => {
            let body = said(time, json!({ "rate": rate }));
            ask(common, Method::PUT, "/rate", Some(body)).await
        }
    }
}

pub async fn pause(args: PauseArgs) -> Outcome {
    ask(args.common, Method::POST, "/pause", Some(said(args.time, json!({})))).await
}

pub async fn resume(args: ResumeArgs) -> Outcome {
    ask(args.common, Method::POST, "/resume", Some(json!({}))).await
}

fn said(time: TimeArgs, mut body: Value) -> Value {
    let who = time.who.unwrap_or_else(|| Source::process(Default::default()).user());
    for (name, text) in [("for", time.span), ("until", time.until), ("who", Some(who))] {
        if let Some(text) = text {
            body[name] = text.into();
        }
    }
    body
}

async fn ask(common: Common, method: Method, path: &str, body: Option<Value>) -> Outcome {
    let config: Config = common.flags.config()?;
    let status: RateStatus = Console::of(&config).send(method, path, body.as_ref()).await?;
    match common.json {
        true => say!("{}", serde_json::to_string_pretty(&status).unwrap_or_default()),
        false => say!("{status}"),
    }
    Ok(ExitCode::SUCCESS)
}
