//! The table: which rows there are, and the measurements, by turns.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use hdrhistogram::Histogram;
use serde_json::json;

use crate::Failure;
use crate::copy::{self, Copies};
use crate::guest::{self, Client, Work};
use crate::pattern::Operation;
use crate::run::{Figures, load};
use crate::{plot, report, sched};

/// A run in which the threads waited longer for their cores than this share of it is done again.
const DISTURBED: f64 = 0.02;

/// How often a run is done again at most; the least disturbed counts.
const TRIES: u32 = 4;

/// One row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    pub namespace: &'static str,
    pub operation: Operation,
    pub bytes: u32,
    pub depth: u32,
    /// IOPS of SPDK's target on a machine of the kind of issue and docs, where there is a figure.
    pub spdk: Option<f64>,
}

impl Row {
    /// What `--only` is matched with: namespace-operation-size-depth.
    pub fn name(&self) -> String {
        let (op, size) = (self.operation.name(), self.size());
        format!("{}-{op}-{size}-{}", self.namespace, self.depth)
    }

    /// `4k`, `512`.
    pub fn size(&self) -> String {
        if self.bytes.is_multiple_of(1024) {
            format!("{}k", self.bytes / 1024)
        } else {
            self.bytes.to_string()
        }
    }

    /// Whether nearly all of it is the copy of its data, wherever it is done.
    pub fn is_copy(&self) -> bool {
        self.namespace == "memory" && self.bytes == 4096 && self.depth > 1
    }

    /// All but the depth.
    pub fn kind(&self) -> (&'static str, &'static str, u32) {
        (self.namespace, self.operation.name(), self.bytes)
    }
}

/// All rows. The figures of SPDK are medians of three on 2 cores of a 2.3 GHz server processor (docs/PERFORMANCE.md).
pub fn rows() -> Vec<Row> {
    use Operation::{Randread, Randwrite};
    let kinds = [
        (
            "null",
            Randread,
            4096,
            [Some(1.23e6), Some(3.55e6), Some(4.2e6)],
        ),
        (
            "null",
            Randread,
            512,
            [Some(1.23e6), Some(3.55e6), Some(4.2e6)],
        ),
        (
            "memory",
            Randread,
            4096,
            [Some(0.79e6), Some(1.66e6), Some(1.77e6)],
        ),
        (
            "memory",
            Randwrite,
            4096,
            [Some(0.73e6), Some(1.41e6), Some(1.46e6)],
        ),
        ("memory", Randread, 512, [None, None, Some(2.63e6)]),
        (
            "file",
            Randread,
            4096,
            [Some(0.47e6), Some(0.69e6), Some(0.64e6)],
        ),
    ];
    let depths = [1, 32, 128];
    let rows = kinds
        .into_iter()
        .flat_map(|(namespace, operation, bytes, spdk)| {
            depths.into_iter().zip(spdk).map(move |(depth, spdk)| Row {
                namespace,
                operation,
                bytes,
                depth,
                spdk,
            })
        });
    rows.collect()
}

/// A daemon that is measured: its sockets are `null.sock`, `memory.sock` and `file.sock` in a directory.
#[derive(Clone, Debug)]
pub struct Subject {
    /// As it is called in the table.
    pub label: String,
    pid: u32,
    dir: PathBuf,
}

fn subject(text: &str) -> Result<Subject, String> {
    let mut parts = text.splitn(3, ',');
    let (Some(label), Some(pid), Some(dir)) = (parts.next(), parts.next(), parts.next()) else {
        return Err("LABEL,PID,DIR".into());
    };
    Ok(Subject {
        label: label.into(),
        pid: pid.parse().map_err(|_| format!("'{pid}' is no process"))?,
        dir: dir.into(),
    })
}

/// What is to be measured.
#[derive(Debug, Args)]
pub struct Plan {
    /// A daemon: LABEL,PID,DIR; with more than one they are compared
    #[arg(long, required = true, value_name = "LABEL,PID,DIR", value_parser = subject)]
    daemon: Vec<Subject>,
    /// Rows to measure, by name (null-randread-4k-1); all if none is given
    #[arg(long, value_name = "NAME")]
    row: Vec<String>,
    /// Length of a run
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS", value_parser = crate::seconds)]
    seconds: f64,
    /// Runs of each row
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..100))]
    rounds: u32,
    /// Core this thread is bound to
    #[arg(long, value_name = "CORE")]
    core: Option<usize>,
    /// Guest memory that data goes to and comes from, in MiB; 0: one buffer for each command that is out
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(..=65536))]
    buffers: u64,
    /// Text to stand above the tables
    #[arg(long, default_value = "", value_name = "TEXT")]
    head: String,
    /// Where report.md and the plots go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Where the rows go as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What came of a row with one daemon.
pub struct Measured {
    pub row: Row,
    /// Of each round.
    pub runs: Vec<Figures>,
    /// All rounds together, in ticks.
    pub times: Histogram<u64>,
    pub ns_per_tick: f64,
    /// What a plain copy took right before each run, in nanoseconds.
    pub copies: Vec<f64>,
    /// The largest share of a run that threads waited for their cores.
    pub waited: f64,
    pub doorbells: &'static str,
    pub pages: &'static str,
}

impl Measured {
    /// Median over the rounds.
    pub fn median(&self, of: impl Fn(&Figures) -> f64) -> f64 {
        median(self.runs.iter().map(of).collect())
    }

    /// IOPS over those of SPDK, where there is a figure.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.median(|f| f.iops) / self.row.spdk?)
    }

    /// The same with a SPDK whose copies take what ours take on this machine at this time: median of the rounds.
    pub fn ratio_here(&self) -> Option<f64> {
        let spdk = self.row.spdk.filter(|_| self.row.is_copy())?;
        let there = |ns| copy::here(spdk, self.row.operation, ns);
        let rounds = self.runs.iter().zip(&self.copies);
        Some(median(
            rounds.map(|(run, ns)| run.iops / there(*ns)).collect(),
        ))
    }

    /// Largest less smallest IOPS of the rounds, over their median.
    pub fn spread(&self) -> f64 {
        let values = || self.runs.iter().map(|f| f.iops);
        let (low, high) = (
            values().fold(f64::MAX, f64::min),
            values().fold(0.0, f64::max),
        );
        (high - low) / self.median(|f| f.iops)
    }
}

/// The middle one, or the mean of the two in the middle; 0 of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

/// Go through it all.
///
/// # Errors
///
/// A run failed, or a file could not be written.
pub fn run(plan: &Plan) -> Result<serde_json::Value, Failure> {
    let wanted: Vec<Row> = rows()
        .into_iter()
        .filter(|row| plan.row.is_empty() || plan.row.contains(&row.name()))
        .collect();
    if wanted.is_empty() {
        return Err(Failure::text("no row is left"));
    }
    if let Some(core) = plan.core {
        sched::pin(core)?;
    }
    for subject in &plan.daemon {
        for namespace in ["memory", "file"] {
            if wanted.iter().any(|row| row.namespace == namespace) {
                guest::fill(&subject.dir.join(format!("{namespace}.sock")), 1)?;
            }
        }
    }
    let mut copies = Copies::new()?;
    // By subject, then by row.
    let mut results: Vec<Vec<Option<Measured>>> = plan
        .daemon
        .iter()
        .map(|_| wanted.iter().map(|_| None).collect())
        .collect();
    for round in 0..plan.rounds {
        for (at, row) in wanted.iter().enumerate() {
            for (subject, results) in plan.daemon.iter().zip(&mut results) {
                measure(plan, subject, row, round, &mut copies, &mut results[at])?;
            }
            eprintln!("    round {} of {}: {}", round + 1, plan.rounds, row.name());
        }
    }
    let results: Vec<(Subject, Vec<Measured>)> = plan
        .daemon
        .iter()
        .cloned()
        .zip(
            results
                .into_iter()
                .map(|r| r.into_iter().flatten().collect()),
        )
        .collect();
    let write = |path: PathBuf, text: String| {
        std::fs::write(&path, text).map_err(|e| Failure::of(&path.display().to_string(), &e))
    };
    write(
        plan.out.join("report.md"),
        report::markdown(&plan.head, &results),
    )?;
    write(plan.out.join("latency.svg"), plot::latency(&results))?;
    write(plan.out.join("iops.svg"), plot::iops(&results))?;
    let rows = report::rows(&results);
    let lines: Vec<String> = rows.iter().map(ToString::to_string).collect();
    let text = format!("[\n {}\n]\n", lines.join(",\n "));
    write(plan.out.join("report.json"), text.clone())?;
    if let Some(path) = &plan.json {
        write(path.clone(), text)?;
    }
    Ok(json!({ "rows": rows.len(), "out": plan.out }))
}

/// One run, done again if others took the cores.
fn measure(
    plan: &Plan,
    subject: &Subject,
    row: &Row,
    round: u32,
    copies: &mut Copies,
    result: &mut Option<Measured>,
) -> Result<(), Failure> {
    let work = Work {
        nsid: 1,
        operation: row.operation,
        bytes: row.bytes,
        depth: row.depth,
        queues: 1,
        entries: 256,
        buffers: plan.buffers << 20,
        batch: u32::MAX,
        interrupts: false,
    };
    let socket = subject.dir.join(format!("{}.sock", row.namespace));
    let length = Duration::from_secs_f64(plan.seconds);
    let warm_up = length.mul_f64(0.2).min(Duration::from_millis(300));
    let mut best = None;
    for attempt in 0..TRIES {
        let seed = u64::from(round * TRIES + attempt) + 1;
        let copy = copies.ns(row.operation);
        let mut guests = [Client::connect(&socket, &work, seed)?];
        let before = sched::waited_ns(subject.pid);
        let outcome = load(&mut guests, warm_up, length)?.remove(0);
        let waited = sched::waited_ns(subject.pid).saturating_sub(before) as f64
            / (length + warm_up).as_nanos() as f64;
        let face = (
            if outcome.mapped { "mapped" } else { "trapped" },
            guests[0].pages(),
        );
        if best.as_ref().is_none_or(|&(_, _, _, least)| waited < least) {
            best = Some((outcome, face, copy, waited));
        }
        if waited < DISTURBED {
            break;
        }
    }
    let Some((outcome, (doorbells, pages), copy, waited)) = best else {
        return Ok(());
    };
    let result = result.get_or_insert_with(|| Measured {
        row: *row,
        runs: Vec::new(),
        times: Histogram::new_from(&outcome.times),
        ns_per_tick: outcome.ns_per_tick,
        copies: Vec::new(),
        waited: 0.0,
        doorbells,
        pages,
    });
    result.runs.push(outcome.figures);
    result.copies.push(copy);
    result
        .times
        .add(&outcome.times)
        .map_err(|e| Failure::of("adding histograms", &e))?;
    result.waited = result.waited.max(waited);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_rows_apart() {
        let mut names: Vec<_> = rows().iter().map(Row::name).collect();
        assert_eq!(names.len(), 18);
        assert!(names.contains(&"memory-randwrite-4k-32".to_string()));
        assert!(names.contains(&"null-randread-512-1".to_string()));
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 18);
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn subjects() {
        let s = subject("old,12,/tmp/a,b").unwrap();
        assert_eq!(
            (s.label.as_str(), s.pid, s.dir.to_str()),
            ("old", 12, Some("/tmp/a,b"))
        );
        for bad in ["", "a", "a,1", "a,b,c"] {
            assert!(subject(bad).is_err(), "{bad}");
        }
    }
}
