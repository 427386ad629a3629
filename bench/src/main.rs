//! `polled-guest`: loads controllers of a running daemon as a guest of its own, polled and pinned, and says what it reached.
//!
//! A vhost-user front-end with raw queues in huge pages (see [`guest`]); [`queue`] is its hot loop, [`run`] one measurement.

mod copy;
mod fence;
mod guest;
mod pattern;
mod plot;
mod queue;
mod report;
mod run;
mod sched;
mod table;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde_json::json;

use guest::{Client, Work};
use pattern::Operation;
use vhost_user_nvme::transport::Transport;

/// Why there is no result, in words.
#[derive(Debug)]
pub struct Failure(pub String);

impl Failure {
    fn text(text: &str) -> Self {
        Self(text.into())
    }

    fn of(what: &str, cause: &dyn std::error::Error) -> Self {
        Self(format!("{what}: {cause}"))
    }
}

/// Loads NVMe controllers of a running daemon, and says what they reach.
#[derive(Debug, Parser)]
#[command(name = "polled-guest", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keep one or more controllers busy and print the figures as JSON
    Load(Load),
    /// Send single commands to a controller that has been left alone
    Wake(Wake),
    /// Connect, make the queues, and leave them alone
    Hold(Hold),
    /// Go through the rows of the table, by turns over rounds and daemons, and write it (for scripts/bench host)
    Table(table::Plan),
    /// Print the names of the table's rows
    Rows,
    /// Print a plot (SVG) of the times in a report's rows (for scripts/bench guest)
    Plot {
        /// The rows: a JSON array
        file: PathBuf,
    },
}

/// Whom to load, and from where.
#[derive(Debug, Args)]
struct Target {
    /// Socket of a controller; more than one are loaded by turns, by one thread
    #[arg(long, required = true, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// Namespace
    #[arg(long, default_value_t = 1, value_name = "NSID")]
    nsid: u32,
    /// Core this thread is bound to
    #[arg(long, value_name = "CORE")]
    core: Option<usize>,
    /// Queue pairs of each guest
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..64))]
    queues: u16,
    /// Entries of each queue
    #[arg(long, default_value_t = 256, value_name = "N")]
    queue_size: u32,
    /// Guest memory that data goes to and comes from, in MiB; 0: one buffer for each command that is out
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(..=65536))]
    buffers: u64,
    /// Completions taken from a queue before the next one has its turn, at most
    #[arg(long, default_value_t = u32::MAX, hide_default_value = true, value_name = "N")]
    batch: u32,
}

#[derive(Debug, Args)]
struct Load {
    #[command(flatten)]
    target: Target,
    /// What is done
    #[arg(long, value_enum, default_value = "randread")]
    op: Operation,
    /// Bytes of a command
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    block_size: u32,
    /// Commands out on each queue pair; a list gives each guest its own
    #[arg(long, default_value = "1", value_name = "N", value_delimiter = ',')]
    depth: Vec<u32>,
    /// Length of the run
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS", value_parser = seconds)]
    seconds: f64,
    /// Time before that which is not counted
    #[arg(long, default_value_t = 0.3, value_name = "SECONDS", value_parser = seconds)]
    warm_up: f64,
    /// Sleep on interrupts instead of polling
    #[arg(long)]
    interrupts: bool,
    /// Write all of the namespace first, so that all of its memory is there
    #[arg(long)]
    fill: bool,
}

#[derive(Debug, Args)]
struct Wake {
    #[command(flatten)]
    target: Target,
    /// Bytes of a command
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    block_size: u32,
    /// How many commands
    #[arg(long, default_value_t = 1000, value_name = "N")]
    count: u32,
    /// Time from one to the next, in microseconds
    #[arg(long, default_value_t = 2000, value_name = "US")]
    pause: u64,
}

#[derive(Debug, Args)]
struct Hold {
    #[command(flatten)]
    target: Target,
    /// For how long
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS", value_parser = seconds)]
    seconds: f64,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if (0.0..=86_400.0).contains(&n) => Ok(n),
        _ => Err("a number of seconds, up to a day".into()),
    }
}

impl Target {
    fn pin(&self) -> Result<(), Failure> {
        match self.core {
            Some(core) => sched::pin(core),
            None => Ok(()),
        }
    }

    fn work(&self, operation: Operation, bytes: u32, depth: u32, interrupts: bool) -> Work {
        Work {
            nsid: self.nsid,
            operation,
            bytes,
            depth,
            queues: self.queues,
            entries: self.queue_size,
            buffers: self.buffers << 20,
            batch: self.batch,
            interrupts,
        }
    }

    fn connect(&self, work: impl Fn(usize) -> Work) -> Result<Vec<Client>, Failure> {
        let sockets = self.socket.iter().enumerate();
        sockets
            .map(|(i, socket)| Client::connect(socket, &work(i), i as u64 + 1))
            .collect()
    }
}

fn load(load: &Load) -> Result<serde_json::Value, Failure> {
    load.target.pin()?;
    let target = &load.target;
    if load.depth.is_empty() {
        return Err(Failure::text("there is no depth"));
    }
    let depth = |i: usize| load.depth[i % load.depth.len()];
    if load.fill {
        for socket in &target.socket {
            guest::fill(socket, target.nsid)?;
        }
    }
    let mut guests =
        target.connect(|i| target.work(load.op, load.block_size, depth(i), load.interrupts))?;
    let warm_up = Duration::from_secs_f64(load.warm_up);
    let length = Duration::from_secs_f64(load.seconds);
    let outcomes = run::load(&mut guests, warm_up, length)?;
    let rows = guests.iter().zip(&outcomes).enumerate().map(|(i, (g, o))| {
        let mut row = serde_json::to_value(o.figures).unwrap_or_default();
        row["transport"] = json!(match guest_tests::transport() {
            Transport::VhostUser => "vhost-user",
            Transport::VfioUser => "vfio-user",
        });
        row["socket"] = json!(target.socket[i]);
        row["operation"] = json!(load.op.name());
        row["block_size"] = json!(load.block_size);
        row["depth"] = json!(depth(i));
        row["queues"] = json!(target.queues);
        row["doorbells"] = json!(if o.mapped { "mapped" } else { "trapped" });
        row["doorbell_switches"] = json!(g.doorbell_switches());
        row["guest_memory"] = json!(g.pages());
        row
    });
    Ok(serde_json::Value::Array(rows.collect()))
}

fn wake(wake: &Wake) -> Result<serde_json::Value, Failure> {
    wake.target.pin()?;
    let target = &wake.target;
    let work = target.work(Operation::Randread, wake.block_size, 1, false);
    let mut guests = target.connect(|_| work)?;
    let pause = Duration::from_micros(wake.pause);
    let figures = run::wake_ups(&mut guests[0], wake.count, pause)?;
    Ok(serde_json::to_value(figures).unwrap_or_default())
}

fn hold(hold: &Hold) -> Result<serde_json::Value, Failure> {
    hold.target.pin()?;
    let target = &hold.target;
    let work = target.work(Operation::Randread, 4096, 1, false);
    let guests = target.connect(|_| work)?;
    // Whoever waits for it begins to measure now.
    let _ = writeln!(std::io::stderr(), "holding {}", guests.len());
    std::thread::sleep(Duration::from_secs_f64(hold.seconds));
    Ok(json!({ "guests": guests.len(), "seconds": hold.seconds }))
}

fn plot(file: &std::path::Path) -> Result<String, Failure> {
    let of = |e: &dyn std::error::Error| Failure::of(&file.display().to_string(), e);
    let text = std::fs::read_to_string(file).map_err(|e| of(&e))?;
    let rows: Vec<serde_json::Value> = serde_json::from_str(&text).map_err(|e| of(&e))?;
    Ok(plot::latency_of_rows(&rows))
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Load(l) => load(&l).map(|v| v.to_string()),
        Command::Wake(w) => wake(&w).map(|v| v.to_string()),
        Command::Hold(h) => hold(&h).map(|v| v.to_string()),
        Command::Table(plan) => table::run(&plan).map(|v| v.to_string()),
        Command::Rows => {
            for row in table::rows() {
                println!("{}", row.name());
            }
            return ExitCode::SUCCESS;
        }
        Command::Plot { file } => plot(&file),
    };
    match result {
        Ok(text) => match writeln!(std::io::stdout(), "{}", text.trim_end()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(Failure(text)) => {
            let _ = writeln!(std::io::stderr(), "polled-guest: {text}");
            ExitCode::FAILURE
        }
    }
}
