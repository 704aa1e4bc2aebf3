//! `forebay status`: what a running process says of itself, asked over its console.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use super::{Failure, Outcome, SettingFlags};
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
    let address = reachable(config.console_listen);
    let status = ask(address).await.map_err(|error| {
        Failure(format!(
            "no forebay answers at http://{address}/ ({error}); start one, or set FOREBAY_CONSOLE_LISTEN to where it is"
        ))
    })?;
    match (args.check, args.json) {
        (true, _) => {}
        (false, true) => println!("{}", serde_json::to_string_pretty(&status).unwrap_or_default()),
        (false, false) => println!("{status}"),
    }
    Ok(ExitCode::SUCCESS)
}

async fn ask(address: SocketAddr) -> Result<Status, String> {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(5)).no_proxy().build();
    let ask = async { client?.get(format!("http://{address}/status")).send().await?.error_for_status()?.json().await };
    ask.await.map_err(|error: reqwest::Error| crate::error::chain(&error))
}

/// Where a listener on all addresses is reached from this machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
