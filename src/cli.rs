//! Arguments, and what is done with them before there is a daemon.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueHint};

use crate::config::raw::{self, Idle};
use crate::config::{self, Config, ConfigError, LogFormat};
use crate::daemon;

/// Bad arguments or a bad configuration.
const EXIT_USAGE: u8 = 2;

const ABOUT: &str = "Gives virtual machines NVMe disks: one emulated NVMe controller for each socket, attached over vhost-user.";

const LONG_ABOUT: &str = "\
Gives virtual machines NVMe disks. Each socket is one emulated NVMe controller with one or more namespaces (disks); a \
virtual machine whose VMM connects to it sees an NVMe SSD and uses its own driver.

The program stays in the foreground and logs to stderr. At start it prints the QEMU arguments that attach each controller. \
SIGTERM or Ctrl-C ends it after the I/O that is out; a second one ends it at once.";

const AFTER_HELP: &str = "\
Namespaces:
  --namespace memory,size=1G                 in memory, gone with the daemon
  --namespace file,path=/srv/disk.img        a file (make it with: truncate -s 10G /srv/disk.img)
  --namespace file,path=/dev/sdb,read-only   a block device, write-protected
  --namespace nvme-passthrough,path=/dev/ng0n1   an NVMe SSD's namespace, command for command
  --namespace null,size=1T                   stores nothing, for measurements

  Keys for all of them: block-size=4096 (or 512), read-only, nsid=N, uuid=..., nguid=..., eui64=...
  For memory: huge-pages=if-free (or never, required). For file: direct=on (or off),
  iopoll=auto (or on, off).

Examples:
  A disk of 1 GiB in memory, then the same with a second disk out of a file:
    vhost-user-nvme --socket-path /tmp/nvme.sock --namespace memory,size=1G
    vhost-user-nvme --socket-path /tmp/nvme.sock --namespace memory,size=1G --namespace file,path=/srv/disk.img

  Pollers on cores 2 and 3 that never sleep:
    vhost-user-nvme --cores 2,3 --idle poll --socket-path /tmp/nvme.sock --namespace file,path=/dev/sdb

  The guest needs shared memory; this is how QEMU (with the device of this project) attaches the disk:
    qemu-system-x86_64 -m 2G -machine q35,memory-backend=mem \\
      -object memory-backend-memfd,id=mem,size=2G,share=on \\
      -device vhost-user-nvme,socket=/tmp/nvme.sock ...

  Several controllers, or any other option, are for a file:
    vhost-user-nvme --config /etc/vhost-user-nvme.toml

      [daemon]
      cores = [2, 3]

      [[controller]]
      name = \"vm1\"
      socket-path = \"/run/vhost-user-nvme/vm1.sock\"

      [[controller.namespace]]
      backend = \"file\"
      path = \"/srv/vm1.img\"";

#[derive(Debug, Parser)]
#[command(name = "vhost-user-nvme", version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = AFTER_HELP)]
#[command(
    after_help = "See --help for namespaces and examples.",
    disable_help_subcommand = true
)]
struct Args {
    /// Listen for front-ends on this socket
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, help_heading = "One controller")]
    socket_path: Option<PathBuf>,

    /// Use this inherited file descriptor, a listening or connected Unix socket, instead of a path
    #[arg(
        long,
        value_name = "FDNUM",
        conflicts_with = "socket_path",
        help_heading = "One controller"
    )]
    fd: Option<i32>,

    /// Add a namespace (a disk): BACKEND[,KEY=VALUE...]; the option can be repeated
    #[arg(long, value_name = "SPEC", value_parser = config::quick::namespace, help_heading = "One controller")]
    namespace: Vec<raw::Namespace>,

    /// Name of the controller in messages; serial number and disk ids are derived from it [default: from the socket]
    #[arg(long, value_name = "NAME", help_heading = "One controller")]
    name: Option<String>,

    /// Serial number of the controller [default: derived from the name or the socket's path]
    #[arg(long, value_name = "TEXT", help_heading = "One controller")]
    serial: Option<String>,

    /// Queue pairs the guest can use, the admin queue included, 2 to 64 [default: 33]
    #[arg(long, value_name = "N", help_heading = "One controller")]
    queues: Option<u16>,

    /// Do not offer the guest Doorbell Buffer Config
    #[arg(long, help_heading = "One controller")]
    no_doorbell_buffer: bool,

    /// Permissions of the socket, in octal, such as 0660 [default: what the umask leaves]
    #[arg(long, value_name = "MODE", help_heading = "One controller")]
    socket_mode: Option<String>,

    /// Read everything from a TOML file instead
    #[arg(
        long,
        value_name = "FILE",
        value_hint = ValueHint::FilePath,
        conflicts_with_all = ["socket_path", "fd", "namespace", "name", "serial", "queues", "no_doorbell_buffer", "socket_mode"],
        help_heading = "Many controllers"
    )]
    config: Option<PathBuf>,

    /// Check arguments and configuration, create nothing, and say what is wrong
    #[arg(long, help_heading = "Many controllers")]
    check_config: bool,

    /// Cores to run a poller on each, such as 2,3 or 4-7 [default: one poller, bound to no core]
    #[arg(long, value_name = "LIST", value_parser = core_list, help_heading = "Pollers")]
    cores: Option<CoreList>,

    /// What a poller does when there is no I/O [default: adaptive]
    #[arg(long, value_name = "POLICY", value_enum, help_heading = "Pollers")]
    idle: Option<Idle>,

    /// How long an adaptive poller looks for work before it sleeps, in microseconds [default: 50]
    #[arg(long, value_name = "N", help_heading = "Pollers")]
    poll_us: Option<u64>,

    /// error, warn, info, debug or trace, or a filter such as info,vhost_user_nvme::transport=debug [default: info]
    #[arg(long, value_name = "LEVEL", help_heading = "Logging")]
    log_level: Option<String>,

    /// How log lines look [default: text]
    #[arg(long, value_name = "FORMAT", value_enum, help_heading = "Logging")]
    log_format: Option<LogFormat>,

    /// Print what this back-end can do as JSON (vhost-user back-end program conventions), and exit
    #[arg(long)]
    print_capabilities: bool,
}

/// Cores, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
struct CoreList(Vec<usize>);

/// Cores named singly and in ranges.
fn core_list(text: &str) -> Result<CoreList, String> {
    const MOST: usize = 4096;
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>())
        else {
            return Err(format!(
                "'{part}' is neither a core nor a range of them; write 2,3 or 4-7"
            ));
        };
        if first > last || last - first >= MOST || cores.len() > MOST {
            return Err(format!("'{part}' is not a range of cores"));
        }
        cores.extend(first..=last);
    }
    Ok(CoreList(cores))
}

/// Run the program; its exit status.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) => {
            // Help goes to stdout with status 0, mistakes to stderr with status 2.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(EXIT_USAGE));
        }
    };
    if args.print_capabilities {
        let _ = writeln!(
            std::io::stdout(),
            "{{\n  \"type\": \"nvme\",\n  \"features\": []\n}}"
        );
        return ExitCode::SUCCESS;
    }
    let check = args.check_config;
    let config = match resolve(args) {
        Ok(config) => config,
        Err(e) => return usage(&e),
    };
    if let Err(e) = daemon::check(&config) {
        return usage(&e);
    }
    if check {
        let disks: usize = config.controllers.iter().map(|c| c.namespaces.len()).sum();
        let _ = writeln!(
            std::io::stdout(),
            "ok: controllers: {}, namespaces: {disks}, pollers: {}",
            config.controllers.len(),
            config.pollers.len()
        );
        return ExitCode::SUCCESS;
    }
    daemon::run(config)
}

/// A mistake of the operator.
fn usage(error: &dyn std::fmt::Display) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "vhost-user-nvme: {error}");
    ExitCode::from(EXIT_USAGE)
}

/// Arguments and file together.
fn resolve(args: Args) -> Result<Config, ConfigError> {
    let (mut file, source) = match &args.config {
        Some(path) => {
            let (file, source) = config::file::read(path)?;
            (file, Some(source))
        }
        None => (quick(&args)?, None),
    };
    // What is said on the command line goes before what is in the file.
    let daemon = &mut file.daemon;
    if let Some(CoreList(cores)) = args.cores {
        daemon.cores = Some(cores);
        daemon.pollers = None;
    }
    daemon.idle = args.idle.or(daemon.idle);
    daemon.poll_us = args.poll_us.or(daemon.poll_us);
    daemon.log_format = args.log_format.or(daemon.log_format);
    daemon.log_level = args.log_level.or_else(|| daemon.log_level.take());
    config::resolve(file, source.as_ref())
}

/// The quick form: one controller out of arguments.
fn quick(args: &Args) -> Result<raw::File, ConfigError> {
    if args.socket_path.is_none() && args.fd.is_none() {
        return Err(ConfigError(
            "nothing to do: give it --socket-path and --namespace, or --config; --help has examples"
                .into(),
        ));
    }
    let controller = raw::Controller {
        name: args.name.clone(),
        socket_path: args.socket_path.clone(),
        socket_mode: args.socket_mode.clone(),
        fd: args.fd,
        serial: args.serial.clone(),
        queues: args.queues,
        doorbell_buffer: args.no_doorbell_buffer.then_some(false),
        namespace: args
            .namespace
            .iter()
            .cloned()
            .map(config::quick::spanned)
            .collect(),
        ..raw::Controller::default()
    };
    Ok(raw::File {
        daemon: raw::Daemon::default(),
        controller: vec![toml::Spanned::new(0..0, controller)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores() {
        let list = |t| core_list(t).map(|CoreList(c)| c);
        assert_eq!(list("2,4-6,1"), Ok(vec![2, 4, 5, 6, 1]));
        for bad in ["", "a", "3-", "5-3", "0-99999999", "1,,2", "-1"] {
            assert!(list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_is_sound() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }
}
