//! `pgconvoy` as scenarios run it.

fn main() -> std::process::ExitCode {
    cli::run(std::env::args_os()).into()
}
