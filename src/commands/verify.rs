//! `forebay verify`: spool, queue, bucket and a ledger held against each other.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{Outcome, SettingFlags};
use crate::audit::{Depth, Report, Subjects, audit};
use crate::bucket::Bucket;
use crate::queue::Queue;
use crate::spool::Spool;
use crate::units::ByteSize;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  forebay verify                              names, sizes and records
  forebay verify --bytes                      every byte too, on disk and read back from the bucket
  forebay verify --ledger devices.ledger      and every acknowledgement that `forebay simulate` was given")]
pub struct Args {
    /// Read every byte: the photos on disk, and the objects back from the bucket
    #[arg(long)]
    bytes: bool,
    /// The ledger of the devices that sent
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: SettingFlags,
}

pub async fn run(args: Args) -> Outcome {
    let config = args.flags.config()?;
    let bucket_config = config.require_bucket()?;
    let queue = Queue::open_existing(&config.queue)?;
    let spool = Spool::open(&config.data_dir, config.spool)?;
    let bucket = Bucket::connect(bucket_config).await;
    let subjects = Subjects {
        queue: &queue,
        spool: &spool,
        bucket: Some((&bucket, &bucket_config.prefix)),
        ledger: args.ledger.as_deref(),
    };
    let depth = if args.bytes { Depth::Bytes } else { Depth::Names };
    let report = audit(&subjects, depth, |doing| eprintln!("{doing} …")).await?;
    queue.close().await;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report).unwrap_or_default());
    } else {
        print(&report, args.ledger.is_some());
    }
    Ok(if report.agrees() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &Report, with_ledger: bool) {
    let line =
        |what: &str, uploads: u64, bytes: u64| say!("{what:<28}{uploads:>10}  {:>10}", ByteSize(bytes).to_string());
    say!("{:<28}{:>10}", "records in the queue", report.records);
    if !report.books_compared {
        say!("{:<28}{:>10}", "books", "moved, not compared");
    }
    match report.bucket_looked_at {
        true => line("verified in the bucket", report.verified, report.verified_bytes),
        false => say!("{:<28}{:>10}", "verified in the bucket", "not known"),
    }
    line("waiting, on disk", report.waiting, report.waiting_bytes);
    for (what, uploads) in [("journaled, on disk", report.journaled), ("dead", report.dead), ("shed", report.shed)] {
        say!("{what:<28}{uploads:>10}");
    }
    match report.bucket_looked_at {
        true => say!("{:<28}{:>10}", "other objects", report.other_objects),
        false => say!("{:<28}{:>10}", "other objects", "not known"),
    }
    if with_ledger {
        line("acknowledged in the ledger", report.acknowledged, report.acknowledged_bytes);
        say!("{:<28}{:>10}", "  of those lost", report.lost);
        if report.not_looked_for > 0 {
            say!("{:<28}{:>10}", "  of those not looked for", report.not_looked_for);
        }
    }
    report.shown.iter().for_each(|text| say!("  {text}"));
    match report.disagreements {
        0 => say!("everything agrees"),
        n => say!("{n} disagreement{}", if n == 1 { "" } else { "s" }),
    }
}
