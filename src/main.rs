//! The `forebay` program: its commands are in `forebay::commands`.

fn main() -> std::process::ExitCode {
    forebay::commands::main()
}
