//! `forebay status`: what a running process says of itself, asked over its console.

use std::process::ExitCode;

use super::asking::Console;
use super::{Outcome, SettingFlags};
use crate::status::Status;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  forebay status                      the process on this machine
  forebay status --json | jq .forecast
  forebay status --check              for health checks: exit 0 if it lives, and say nothing")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Say nothing; exit 0 if the console answers
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    flags: SettingFlags,
}

pub async fn run(args: Args) -> Outcome {
    let config = args.flags.config()?;
    let status: Status = Console::of(&config).get("/status").await?;
    match (args.check, args.json) {
        (true, _) => {}
        (false, true) => say!("{}", serde_json::to_string_pretty(&status).unwrap_or_default()),
        (false, false) => say!("{status}"),
    }
    Ok(ExitCode::SUCCESS)
}
