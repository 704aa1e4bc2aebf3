//! Forebay takes photos from a site's devices and lets them out to S3 at the share of the uplink that the site allows.
//!
//! The modules stand here in reading order, layer by layer. A file imports from its own layer's ground and from the
//! layers above it in this list, never from a sibling role and never from a layer further down; `tests/tidy.rs` holds
//! that. ARCHITECTURE.md tells the story of one upload through all of them.

// Ground: pure values, no I/O; and the points at which a test can have any step of what follows go wrong.
pub mod allowance;
pub mod config;
pub mod crash_points;
pub mod error;
pub mod forecast;
pub mod order;
pub mod outage;
pub mod shedding;
pub mod status;
pub mod timetable;
pub mod units;
pub mod upload;

// The budget: what leaves, and how fast.
pub mod pacer;

// Resources: each owns one outside thing, none knows another.
pub mod bucket;
pub mod embedded_s3;
pub mod http;
pub mod ledger;
pub mod queue;
pub mod spool;
pub mod telemetry;

// Roles: what a process does. They never import each other.
pub mod audit;
pub mod console;
pub mod drain;
pub mod fleet;
pub mod ingest;
pub mod keeper;

// Wiring: one file a command.
pub mod commands;
