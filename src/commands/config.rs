//! `forebay config`: every setting, its value and where that comes from; secrets redacted.

use std::process::ExitCode;

use serde::Serialize;

use super::{Outcome, SettingFlags};
use crate::config::{Config, ConfigErrors};

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: SettingFlags,
}

#[derive(Serialize)]
struct Shown {
    name: &'static str,
    value: String,
    origin: String,
}

pub fn run(args: Args) -> Outcome {
    let source = args.flags.source();
    let (values, _) = source.values();
    let shown: Vec<Shown> = values
        .iter()
        .map(|value| Shown { name: value.setting.variable, value: value.shown(), origin: value.origin.to_string() })
        .collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&shown).unwrap_or_default());
    } else {
        let width = shown.iter().map(|s| s.value.len()).max().unwrap_or(0).min(60);
        for Shown { name, value, origin } in &shown {
            println!("{name:<26} {value:<width$}  {origin}");
        }
    }
    match Config::load(&source) {
        Ok(config) => {
            if !args.json {
                println!("\nthe drain may use {} of the uplink: {}", config.uplink.share, config.uplink.allowance());
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(ConfigErrors(errors)) => Err(ConfigErrors(errors).into()),
    }
}
