//! The results in words: Markdown for people, JSON for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::pattern::Operation;
use crate::table::{Measured, Subject, median};

const DEPTHS: [u32; 3] = [1, 32, 128];

/// One object for each row and daemon.
pub fn rows(results: &[(Subject, Vec<Measured>)]) -> Vec<Value> {
    let mut rows = Vec::new();
    for (subject, results) in results {
        for r in results {
            let whole = |n: f64| n.round() as u64;
            rows.push(json!({
                "transport": "vhost-user",
                "namespace": r.row.namespace,
                "operation": r.row.operation.name(),
                "block_size": r.row.bytes,
                "depth": r.row.depth,
                "iops": whole(r.median(|f| f.iops)),
                "avg_ns": whole(r.median(|f| f.avg_ns)),
                "p50_ns": whole(r.median(|f| f.p50_ns)),
                "p99_ns": whole(r.median(|f| f.p99_ns)),
                "p999_ns": whole(r.median(|f| f.p999_ns)),
                "daemon": subject.label,
                "rounds": r.runs.len(),
                "copy_ns": whole(median(r.copies.clone())),
                "spread": (r.spread() * 1000.0).round() / 1000.0,
                "waited": (r.waited * 1000.0).round() / 1000.0,
                "doorbells": r.doorbells,
                "guest_memory": r.pages,
            }));
        }
    }
    rows
}

/// Kinds of rows in the order they come.
fn kinds(results: &[Measured]) -> Vec<(&'static str, &'static str, u32)> {
    let mut kinds = Vec::new();
    for r in results {
        if !kinds.contains(&r.row.kind()) {
            kinds.push(r.row.kind());
        }
    }
    kinds
}

fn title((namespace, operation, bytes): (&str, &str, u32)) -> String {
    let size = if bytes < 1024 {
        format!("{bytes} B")
    } else {
        format!("{} KiB", bytes / 1024)
    };
    format!("{namespace}, {size} {operation}")
}

/// A table with a row for each kind and a column for each depth.
fn table(out: &mut String, results: &[Measured], cell: impl Fn(&Measured) -> String) {
    let _ = writeln!(
        out,
        "| namespace, I/O | QD1 | QD32 | QD128 |\n| --- | ---: | ---: | ---: |"
    );
    for kind in kinds(results) {
        let _ = write!(out, "| {} |", title(kind));
        for depth in DEPTHS {
            let found = results
                .iter()
                .find(|r| r.row.kind() == kind && r.row.depth == depth);
            let _ = write!(out, " {} |", found.map_or("-".into(), &cell));
        }
        let _ = writeln!(out);
    }
}

/// How long plain copies took beside the rows that are copies.
fn copies(results: &[Measured]) -> String {
    let of = |operation| {
        let rows = results
            .iter()
            .filter(|r| r.row.is_copy() && r.row.operation == operation);
        let all: Vec<f64> = rows.flat_map(|r| &r.copies).copied().collect();
        (!all.is_empty()).then(|| format!("{:.0} ns", median(all)))
    };
    match (of(Operation::Randread), of(Operation::Randwrite)) {
        (None, None) => String::new(),
        (out, into) => format!(
            " Median of those copies: {} out of 256 MiB (there 390 ns), {} into them (there 520 ns).",
            out.as_deref().unwrap_or("-"),
            into.as_deref().unwrap_or("-")
        ),
    }
}

fn micros(ns: f64) -> String {
    match ns {
        ns if ns < 9_995.0 => format!("{:.2}", ns / 1000.0),
        ns if ns < 99_950.0 => format!("{:.1}", ns / 1000.0),
        ns => format!("{:.0}", ns / 1000.0),
    }
}

/// The whole report.
pub fn markdown(head: &str, results: &[(Subject, Vec<Measured>)]) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{head}\n");
    for (subject, results) in results {
        let _ = writeln!(
            out,
            "### {}\n\nMillions of commands per second, median of the rounds (spread: largest less smallest, over the median); in \
             the second line the ratio to SPDK's figure, which is of another machine of that kind. Where a command is mostly a \
             copy there is a third line: the ratio to what SPDK would reach if its copies took what a plain copy of 4 KiB took \
             here right before each run, and the rest of its time were what it was there.{}\n",
            subject.label,
            copies(results)
        );
        table(&mut out, results, |r| {
            let iops = r.median(|f| f.iops);
            let line = |ratio: Option<f64>, of: &str| {
                ratio.map_or(String::new(), |n| format!("<br>{n:.2} x{of}"))
            };
            let ratio = line(r.ratio(), "") + &line(r.ratio_here(), " (copies)");
            let mark = if r.waited > 0.02 { " (!)" } else { "" };
            format!(
                "{:.2} M ({:.0} %){mark}{ratio}",
                iops / 1e6,
                r.spread() * 100.0
            )
        });
        if results.iter().any(|r| r.waited > 0.02) {
            let _ = writeln!(
                out,
                "\n(!) other work took more than 2 % of the cores in at least one of the runs."
            );
        }
        let _ = writeln!(
            out,
            "\nTime of a command in microseconds: mean; p50 / p99 / p99.9.\n"
        );
        table(&mut out, results, |r| {
            let at = |of: fn(&crate::run::Figures) -> f64| micros(r.median(of));
            let (avg, p50) = (at(|f| f.avg_ns), at(|f| f.p50_ns));
            let (p99, p999) = (at(|f| f.p99_ns), at(|f| f.p999_ns));
            format!("{avg}; {p50} / {p99} / {p999}")
        });
        if let Some(r) = results.first() {
            let _ = writeln!(
                out,
                "\nDoorbells {}, guest memory: {}.\n",
                r.doorbells, r.pages
            );
        }
    }
    if let Some(((first, base), others)) = results.split_first() {
        for (subject, results) in others {
            let _ = writeln!(
                out,
                "### {} against {}\n\nIOPS of the first over those of the second (more than 1: {} is faster); median of the ratios \
                 of each round, then the lowest and the highest.\n",
                subject.label, first.label, subject.label
            );
            table(&mut out, results, |r| {
                let Some(b) = base.iter().find(|b| b.row == r.row) else {
                    return "-".into();
                };
                let ratios: Vec<f64> = r
                    .runs
                    .iter()
                    .zip(&b.runs)
                    .map(|(r, b)| r.iops / b.iops)
                    .collect();
                let low = ratios.iter().copied().fold(f64::MAX, f64::min);
                let high = ratios.iter().copied().fold(0.0, f64::max);
                format!("{:.3} ({low:.2} to {high:.2})", median(ratios))
            });
            let _ = writeln!(out);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(micros(804.0), "0.80");
        assert_eq!(micros(12_345.0), "12.3");
        assert_eq!(micros(123_456.0), "123");
        assert_eq!(title(("null", "randread", 512)), "null, 512 B randread");
        assert_eq!(title(("file", "randwrite", 4096)), "file, 4 KiB randwrite");
    }
}
