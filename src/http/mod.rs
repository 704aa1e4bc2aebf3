//! The HTTP edge that both listeners share: how connections are served, and how errors look.

mod eager;
mod gathering;
pub mod listener;
pub mod problem;
