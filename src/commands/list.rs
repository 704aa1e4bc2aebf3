//! `forebay list`: uploads, newest first, read from the queue itself, so that it works while nothing runs.

use std::process::ExitCode;

use serde_json::json;

use super::{Outcome, SettingFlags};
use crate::queue::{Cursor, Filter, PAGE_RECORDS_MAX, Queue};
use crate::units::ByteSize;
use crate::upload::{DeviceId, State};

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  forebay list                        the 20 newest uploads
  forebay list --state dead           what needs an operator
  forebay list --device cam-0007 --limit 100 --json")]
pub struct Args {
    /// Only uploads in this state: queued, uploading, uploaded, dead or shed
    #[arg(long)]
    state: Option<State>,
    /// Only uploads of this device
    #[arg(long)]
    device: Option<DeviceId>,
    /// How many
    #[arg(long, default_value_t = 20)]
    limit: u32,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: SettingFlags,
}

pub async fn run(args: Args) -> Outcome {
    let config = args.flags.config()?;
    let queue = Queue::open_existing(&config.queue)?;
    let filter = Filter { device_id: args.device, state: args.state };
    let (mut after, mut left) = (Cursor::START, args.limit);
    if !args.json {
        say!("{:<24}  {:<10}  {:<20}  {:>9}  id", "received", "state", "device", "size");
    }
    while left > 0 {
        let page = queue.list(&filter, after, left.min(PAGE_RECORDS_MAX)).await?;
        let Some(last) = page.last() else { break };
        after = Cursor { received_at: last.upload.received_at, id: last.upload.id };
        left = left.saturating_sub(page.len() as u32);
        for record in &page {
            let upload = &record.upload;
            if args.json {
                let line = json!({
                    "upload": &**upload, "state": record.state, "attempts": record.attempt, "failures": record.failures,
                    "reason": record.reason, "uploaded_at": record.uploaded_at, "removed_at": record.removed_at,
                });
                say!("{line}");
            } else {
                let size = ByteSize(upload.size_bytes).to_string();
                let reason = record.reason.as_ref().map(|reason| format!("  {reason}")).unwrap_or_default();
                say!(
                    "{:<24}  {:<10}  {:<20}  {size:>9}  {}{reason}",
                    upload.received_at.to_string(),
                    record.state,
                    upload.device_id.to_string(),
                    upload.id
                );
            }
        }
    }
    queue.close().await;
    Ok(ExitCode::SUCCESS)
}
