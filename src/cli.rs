//! Arguments.

/// Run the program; its exit status.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}
