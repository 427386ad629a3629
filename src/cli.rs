//! Arguments, and what is done with them before there is a daemon.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueHint};

use crate::check;
use crate::config::raw::{self, Idle};
use crate::config::{self, Config, ConfigError, LogFormat, StateDir};
use crate::daemon;
use crate::driver::pci::PciAddress;
use crate::upgrade::command::{self as upgrade, Daemon};
use crate::upgrade::take::Taking;

/// Bad arguments or a bad configuration.
const EXIT_USAGE: u8 = 2;

const ABOUT: &str = "Gives virtual machines NVMe disks: one emulated NVMe controller for each socket, attached over vhost-user or vfio-user.";

const LONG_ABOUT: &str = "\
Gives virtual machines NVMe disks. Each socket is one emulated NVMe controller with one or more namespaces (disks); a \
virtual machine whose VMM connects to it sees an NVMe SSD and uses its own driver.

The program stays in the foreground and logs to stderr. At start it prints the QEMU arguments that attach each controller. \
SIGTERM or Ctrl-C ends it after the I/O that is out; a second one ends it at once.";

const AFTER_HELP: &str = "\
Namespaces:
  --namespace memory,size=1G                 in memory, gone when the daemon is stopped
  --namespace file,path=/srv/disk.img        a file (make it with: truncate -s 10G /srv/disk.img)
  --namespace file,path=/dev/sdb,read-only   a block device, write-protected
  --namespace nvme-passthrough,path=/dev/ng0n1   an NVMe SSD's namespace, command for command
  --namespace nvme:0000:01:00.0              an SSD this program drives itself (VFIO; see scripts/setup-host nvme)
  --namespace nvme:0000:01:00.0,offset=100G,size=50G   a part of it: several guests can have one each
  --namespace null,size=1T                   stores nothing, for measurements

  Keys for all of them: block-size=4096 (or 512), read-only, nsid=N, uuid=..., nguid=..., eui64=...
  For memory: huge-pages=if-free (or never, required). For file: direct=on (or off),
  iopoll=auto (or on, off). For nvme: ssd-namespace=1, offset=0, size=...; blocks are the SSD's.

Examples:
  A disk of 1 GiB in memory, then the same with a second disk out of a file:
    vhost-user-nvme --socket-path /tmp/nvme.sock --namespace memory,size=1G
    vhost-user-nvme --socket-path /tmp/nvme.sock --namespace memory,size=1G --namespace file,path=/srv/disk.img

  Pollers on cores 2 and 3 that never sleep:
    vhost-user-nvme --cores 2,3 --idle poll --socket-path /tmp/nvme.sock --namespace file,path=/dev/sdb

  For a VMM as it is, without the QEMU device of this project:
    vhost-user-nvme --transport vfio-user --socket-path /tmp/nvme.sock --namespace memory,size=1G

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
    disable_help_subcommand = true,
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    args: Args,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say line by line whether this host can serve a configuration, and what to do where it cannot
    #[command(
        after_help = "Everything the daemon takes can be given, or --config FILE. Nothing is made or changed. The exit status is that of the \
                      first failure (docs/SSD.md has a table of them), 0 if there is none."
    )]
    Check {
        /// PCI addresses of SSDs to look at besides those of the configuration, such as 0000:01:00.0
        #[arg(value_name = "SSD")]
        ssds: Vec<PciAddress>,

        #[command(flatten)]
        args: Box<Args>,
    },
    /// Have a running daemon hand over to the program that is installed now, while guests run
    #[command(
        after_help = "The daemon starts the program at its own path with its own arguments; that one reads the configuration anew and takes \
                      sockets and connections over. If it cannot, the old one goes on, and the exit status is 1. SIGUSR2 does the same \
                      without waiting. docs/UPGRADE.md has the rest."
    )]
    Upgrade {
        /// State directory of the daemon [default: that of a daemon which was given none]
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        state_dir: Option<PathBuf>,

        /// Process id of the daemon
        #[arg(long, value_name = "PID", conflicts_with = "state_dir")]
        pid: Option<u32>,
    },
}

#[derive(Debug, clap::Args)]
struct Args {
    /// Listen for front-ends on this socket
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, help_heading = "One controller")]
    socket_path: Option<PathBuf>,

    /// What front-ends speak [default: vhost-user]
    #[arg(
        long,
        value_name = "PROTOCOL",
        value_enum,
        help_heading = "One controller"
    )]
    transport: Option<raw::Transport>,

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

    /// Do not offer the guest SGLs, only PRPs
    #[arg(long, help_heading = "One controller")]
    no_sgls: bool,

    /// Permissions of the socket, in octal, such as 0660 [default: what the umask leaves]
    #[arg(long, value_name = "MODE", help_heading = "One controller")]
    socket_mode: Option<String>,

    /// Read everything from a TOML file instead
    #[arg(
        long,
        value_name = "FILE",
        value_hint = ValueHint::FilePath,
        conflicts_with_all = ["transport", "socket_path", "fd", "namespace", "name", "serial", "queues", "no_doorbell_buffer", "no_sgls", "socket_mode"],
        help_heading = "Many controllers"
    )]
    config: Option<PathBuf>,

    /// Check arguments and configuration, create nothing, and say what is wrong
    #[arg(long, help_heading = "Many controllers")]
    check_config: bool,

    /// Where what survives this process is kept, on tmpfs; "none": nothing survives [default: $RUNTIME_DIRECTORY,
    /// /run/vhost-user-nvme or $XDG_RUNTIME_DIR/vhost-user-nvme]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Recovery")]
    state_dir: Option<PathBuf>,

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
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help goes to stdout with status 0, mistakes to stderr with status 2.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(EXIT_USAGE));
        }
    };
    let args = match cli.command {
        Some(Command::Check { ssds, args }) => return check_host(*args, &ssds),
        Some(Command::Upgrade { state_dir, pid }) => return upgrade_daemon(state_dir, pid),
        None => cli.args,
    };
    if args.print_capabilities {
        let _ = writeln!(
            std::io::stdout(),
            "{{\n  \"type\": \"nvme\",\n  \"features\": []\n}}"
        );
        return ExitCode::SUCCESS;
    }
    let check = args.check_config;
    let taking = match check {
        true => Ok(None),
        false => Taking::of_this_process(),
    };
    let taking = match taking {
        Ok(taking) => taking,
        Err(e) => return usage(&e),
    };
    let unable = |why: &dyn std::fmt::Display| {
        if let Some(taking) = &taking {
            taking.unable(&why.to_string());
        }
    };
    let config = match resolve(args) {
        Ok(config) => config,
        Err(e) => {
            unable(&e);
            return usage(&e);
        }
    };
    let checked = match check {
        true => daemon::check(&config),
        false => daemon::check_start(&config, taking.as_ref()),
    };
    if let Err(e) = checked {
        unable(&e);
        let status = daemon::exit_status(&*e).unwrap_or(EXIT_USAGE);
        let _ = usage(&e);
        return ExitCode::from(status);
    }
    if check {
        let disks: usize = config.controllers.iter().map(|c| c.namespaces.len()).sum();
        let _ = writeln!(
            std::io::stdout(),
            "ok: controllers: {}, namespaces: {disks}, pollers: {}",
            config.controllers.len(),
            config.pollers.len()
        );
        for controller in &config.controllers {
            // What is wrong with it was told already.
            if let Ok(state) = daemon::keeps::describe(&config, controller) {
                let name = &controller.name;
                let _ = writeln!(std::io::stdout(), "controller '{name}': {state}");
            }
        }
        return ExitCode::SUCCESS;
    }
    daemon::run(config, taking)
}

/// `upgrade`: ask, wait, and say what came of it.
fn upgrade_daemon(state_dir: Option<PathBuf>, pid: Option<u32>) -> ExitCode {
    let daemon = match (
        pid,
        daemon::keeps::path(&state_dir.map_or(StateDir::Default, StateDir::At)),
    ) {
        (Some(pid), _) => Daemon::Process(pid),
        (None, Some(dir)) => Daemon::Of(dir),
        (None, None) => return usage(&"which daemon? give --state-dir or --pid"),
    };
    match upgrade::run(&daemon) {
        Ok(message) => {
            let _ = writeln!(std::io::stdout(), "{message}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            let _ = writeln!(std::io::stderr(), "vhost-user-nvme: no upgrade: {message}");
            ExitCode::FAILURE
        }
    }
}

/// `check`: with a configuration, or with SSDs, or with neither.
fn check_host(args: Args, ssds: &[PciAddress]) -> ExitCode {
    let given = args.config.is_some() || args.socket_path.is_some() || args.fd.is_some();
    if !given && !args.namespace.is_empty() {
        return usage(&"a namespace needs --socket-path or --fd");
    }
    if !given {
        return check::run(None, ssds);
    }
    match resolve(args) {
        Ok(config) => check::run(Some(&config), ssds),
        Err(e) => usage(&e),
    }
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
    daemon.state_dir = args.state_dir.or_else(|| daemon.state_dir.take());
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
        transport: args.transport,
        socket_path: args.socket_path.clone(),
        socket_mode: args.socket_mode.clone(),
        fd: args.fd,
        serial: args.serial.clone(),
        queues: args.queues,
        doorbell_buffer: args.no_doorbell_buffer.then_some(false),
        sgls: args.no_sgls.then_some(false),
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
        ssd: Vec::new(),
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
        Cli::command().debug_assert();
    }
}
