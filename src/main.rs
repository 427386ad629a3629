//! The daemon's entry: everything is in the library.

fn main() -> std::process::ExitCode {
    vhost_user_nvme::cli::main()
}
