//! `forebay rebuild`: the queue, made anew from the spool alone.

use std::process::ExitCode;

use super::{Outcome, SettingFlags};
use crate::keeper::{Adoption, adopt};
use crate::queue::Queue;
use crate::spool::Spool;

pub async fn run(flags: SettingFlags) -> Outcome {
    let config = flags.config()?;
    let spool = Spool::open(&config.data_dir, config.spool)?;
    let queue = Queue::open(&config.queue)?;
    queue.migrate().await?;
    let shown = std::cell::Cell::new(0);
    let progress = |so_far: Adoption| {
        if so_far.photos >= shown.get() + 10_000 {
            shown.set(so_far.photos);
            eprintln!("{} photos, {} of them put into the queue …", so_far.photos, so_far.adopted);
        }
    };
    let Adoption { photos, adopted, damaged } = adopt(&spool, &queue, None, progress).await?;
    queue.close().await;
    say!("{photos} photos on disk, {adopted} of them were not in the queue and are now, {damaged} files are damaged");
    Ok(if damaged == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
