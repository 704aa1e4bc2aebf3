//! The end-to-end tests and the conformance suite: real Postgres, real S3 servers, real nginx, the real program.
//!
//! A part that is missing fails the tests that need it, and says what to install (`tests/install-parts`).

#[allow(dead_code)] // tests/torture needs more of it
mod support;

mod bucket;
mod console;
mod crash_points;
mod disk;
mod drain;
mod fairness;
mod ingest;
mod journey;
mod killed;
mod program;
mod queue;
mod queue_away;
mod rate;
mod replicas;
mod s3_faults;
mod shedding;
mod spool;
mod stopping;
mod through_nginx;
