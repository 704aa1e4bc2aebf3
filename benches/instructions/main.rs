//! How many instructions the hot path takes, counted by valgrind's callgrind: the same whatever else the machine does, so that
//! CI can hold a bound. `make instructions`. The bounds are for x86-64 with AVX2; another processor takes other ways.
//!
//! Each case runs in a process of its own, once with some rounds and once with none; the difference is the rounds' own. Always:
//! a bound a little above what was counted when it was set. Never: time, or anything that waits.

use std::convert::Infallible;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use forebay::ingest::body::{Incoming, Kinds, Photo, read};
use forebay::ingest::digests::sha256_of;
use forebay::pacer::Pacer;
use forebay::units::Rate;
use forebay::upload::Sha256;

const PHOTO_BYTES: usize = 250_000;
/// Odd on purpose: most pieces do not end with a group of four characters.
const PIECE_BYTES: usize = 16_381;
const SLICE_BYTES: u64 = 20_000;
/// A count below its bound by more than this says that the bound is out of date.
const SLACK: f64 = 0.10;

struct Case {
    name: &'static str,
    what: &'static str,
    /// So many that what a process does besides, such as finding out how fast its clock is, does not count.
    rounds: u32,
    /// Instructions of one round.
    bound: u64,
    run: fn(u32),
}

const CASES: [Case; 5] = [
    Case {
        name: "digest",
        what: "SHA-256 of a photo of 250 kB that comes alone",
        rounds: 20,
        bound: 8_400_000,
        run: digest,
    },
    Case {
        name: "together",
        what: "SHA-256 of eight such photos side by side",
        rounds: 5,
        bound: 15_000_000,
        run: digest_together,
    },
    Case {
        name: "json",
        what: "such a photo read from JSON, digest included",
        rounds: 20,
        bound: 8_900_000,
        run: json,
    },
    Case {
        name: "lines",
        what: "the same with line breaks in its base64",
        rounds: 20,
        bound: 13_700_000,
        run: json_in_lines,
    },
    Case { name: "pay", what: "a slice of 20 kB paid for", rounds: 200_000, bound: 910, run: pay },
];

fn digest(rounds: u32) {
    let photo = photo();
    for _ in 0..rounds {
        std::hint::black_box(Sha256::of(&photo));
    }
}

fn digest_together(rounds: u32) {
    let photo = photo();
    for _ in 0..rounds {
        std::hint::black_box(sha256_of(&[photo.as_slice(); 8]));
    }
}

fn json(rounds: u32) {
    read_json(rounds, &base64_simd::STANDARD.encode_to_string(photo()));
}

fn json_in_lines(rounds: u32) {
    let text = base64_simd::STANDARD.encode_to_string(photo());
    let lines: Vec<&str> = text.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).expect("ASCII")).collect();
    read_json(rounds, &lines.join("\\n"));
}

fn read_json(rounds: u32, image: &str) {
    let body =
        Bytes::from(format!(r#"{{"device_id":"cam-0001","upload_id":"42","image":"{image}","priority":"high"}}"#));
    let request = http::Request::builder().header("content-type", "application/json");
    let (parts, ()) = request.header("content-length", body.len()).body(()).expect("a request").into_parts();
    runtime().block_on(async {
        for _ in 0..rounds {
            let pieces = body.chunks(PIECE_BYTES).map(|piece| Ok::<_, Infallible>(body.slice_ref(piece)));
            let pieces: Vec<_> = pieces.collect();
            let body = Body::from_stream(futures_util::stream::iter(pieces));
            let mut incoming = Incoming::new(body, Duration::from_secs(3600));
            let photo = Photo::new(PHOTO_BYTES, None).digested_as_it_comes(true);
            let (_, photo) = read(&Kinds::Json, &parts, &mut incoming, photo).await.expect("a photo");
            assert_eq!(std::hint::black_box(photo.finish()).bytes.size_bytes(), PHOTO_BYTES as u64);
        }
    });
}

fn pay(rounds: u32) {
    runtime().block_on(async {
        // so much that nobody ever waits
        let pacer = Pacer::new(Rate(12_000_000_000));
        for _ in 0..rounds {
            drop(std::hint::black_box(pacer.pay(SLICE_BYTES).await));
        }
    });
}

fn photo() -> Vec<u8> {
    (0..PHOTO_BYTES as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Instructions of a process that runs so many rounds of a case.
fn counted(case: &Case, rounds: u32) -> Result<u64, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(own);
    valgrind.args(["--run", case.name, &rounds.to_string()]).stdin(Stdio::null()).stdout(Stdio::null());
    let done = valgrind.output().map_err(|error| format!("valgrind cannot be run ({error}); install valgrind"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected : ")).map(|(_, count)| count.trim());
    match (done.status.success(), collected.and_then(|count| count.parse().ok())) {
        (true, Some(count)) => Ok(count),
        _ => Err(format!("valgrind ended with {}: {said}", done.status)),
    }
}

fn hold_all() -> Result<bool, String> {
    let mut held = true;
    println!("{:<56} {:>14} {:>14}", "instructions of one round", "counted", "bound");
    for case in &CASES {
        let own = counted(case, case.rounds)?.saturating_sub(counted(case, 0)?) / u64::from(case.rounds);
        let verdict = match own {
            above if above > case.bound => "TOO MANY",
            below if (below as f64) < case.bound as f64 * (1.0 - SLACK) => "fewer: lower the bound",
            _ => "",
        };
        held &= own <= case.bound;
        println!("{:<56} {own:>14} {:>14}  {verdict}", case.what, case.bound);
    }
    Ok(held)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some([_, name, rounds]) = arguments.iter().position(|a| a == "--run").map(|at| &arguments[at..]) {
        let case = CASES.iter().find(|case| case.name == name).expect("a case");
        (case.run)(rounds.parse().expect("a number"));
        return ExitCode::SUCCESS;
    }
    match hold_all() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}
