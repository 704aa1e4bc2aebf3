# What a newcomer needs: `make test`. Everything else is listed by `make help`.
.DEFAULT_GOAL := help
.PHONY: help demo test lint parts load torture wire-test planted-bugs week release bench instructions

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: ## the whole thing on this machine for a minute
	cargo run --release -- demo

parts: ## install what the tests need beside Rust, or say what to install
	tests/install-parts

test: parts ## everything: unit, conformance and end-to-end tests, on both queues
	cargo test --locked

lint: ## format and lints, as CI has them
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked -- -D warnings # what is shipped: without the crash points

torture: parts ## kill, starve and mislead the whole appliance FOR=10m, then count; WHAT=everything|postgres|s3|power
	cargo test --locked --release --test torture

wire-test: parts ## measure what leaves, frame by frame (needs root); WHAT=all|rates|takeover|slow|talkative FOR=40s RATES=1,5,25
	WHAT="$${WHAT:-all}" cargo test --locked --release --test wire

planted-bugs: parts ## plant eleven bugs, one at a time, and print which test catches each (needs root)
	tests/planted-bugs/run

load: ## a thousand devices for a minute against URL (http://127.0.0.1:8080/): the stack, or a single serve
	loadtest/run

release: ## the program for a site's box, laid out by what it does under load: target/released/forebay
	release/build

bench: ## Forebay beside nginx, Flask and rclone; WHAT=all|throughput|drain|footprint|latency|backlog ROUNDS=5 FOR=8s UPLOADS=10000000; writes target/bench/page.html; PROGRAM=… measures another than `make release` builds
	tests/install-parts bench
	[ -n "$$PROGRAM" ] || release/build
	PROGRAM="$${PROGRAM:-target/released/forebay}" cargo bench --locked --bench bench

instructions: ## count the instructions of the body's decoder and the pacer, and hold them to their bounds
	tests/install-parts instructions
	cargo run --locked --release -p instructions

week: ## a week of a site in seconds: what the forecast says at each hour, held against what then happens
	cargo test --locked --test week -- --nocapture --test-threads 1
