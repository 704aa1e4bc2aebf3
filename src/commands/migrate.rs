//! `forebay migrate`: the queue's schema, brought up to date.

use std::process::ExitCode;

use super::{Outcome, SettingFlags};
use crate::queue::Queue;

pub async fn run(flags: SettingFlags) -> Outcome {
    let queue = Queue::open(&flags.config()?.queue)?;
    let version = queue.migrate().await?;
    say!("the {} queue's schema is at version {version}", queue.kind());
    queue.close().await;
    Ok(ExitCode::SUCCESS)
}
