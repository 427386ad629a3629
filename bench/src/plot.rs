//! Plots as SVG: times over percentiles, and IOPS over depth.

use std::fmt::Write as _;

use serde_json::Value;

use crate::table::{Measured, Subject};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 300.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 60.0;
const COLOURS: [&str; 13] = [
    "#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#b8860b", "#2a9d8f", "#8d5524", "#555555",
    "#e377c2", "#17becf", "#9acd32", "#000080", "#ff7f0e",
];

struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// A line chart with a logarithmic vertical axis.
struct Chart<'a> {
    title: &'a str,
    x_label: &'a str,
    y_label: &'a str,
    x_ticks: Vec<(f64, String)>,
    y_text: fn(f64) -> String,
    series: Vec<Series>,
}

impl Chart<'_> {
    fn svg(&self) -> String {
        let ys = || self.series.iter().flat_map(|s| &s.points).map(|p| p.1);
        let low = ys().filter(|y| *y > 0.0).fold(f64::MAX, f64::min);
        let high = ys().fold(0.0, f64::max);
        // Whole steps of 1, 2, 5 around what there is.
        let steps: Vec<f64> = (-3..15)
            .flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e)))
            .collect();
        let bottom = steps
            .iter()
            .copied()
            .filter(|s| *s <= low)
            .fold(steps[0], f64::max);
        let top = steps
            .iter()
            .copied()
            .find(|s| *s >= high && *s > bottom)
            .unwrap_or(high);
        let first = self.x_ticks.first().map_or(0.0, |t| t.0);
        let last = self.x_ticks.last().map_or(1.0, |t| t.0);
        let x = |v: f64| {
            let share = if last > first {
                (v - first) / (last - first)
            } else {
                0.5
            };
            LEFT + share * (WIDTH - LEFT - RIGHT)
        };
        let y = |v: f64| {
            let share = (v.max(bottom) / bottom).ln() / (top / bottom).ln();
            HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
        };

        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
        );
        let mut text = |x: f64, y: f64, anchor: &str, what: &str| {
            let what = escape(what);
            let _ = writeln!(
                out,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>"
            );
        };
        let (floor, end) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        text(LEFT, TOP - 16.0, "start", self.title);
        text(
            f64::midpoint(LEFT, end),
            HEIGHT - 12.0,
            "middle",
            self.x_label,
        );
        text(8.0, TOP - 4.0, "start", self.y_label);
        for (at, label) in &self.x_ticks {
            text(x(*at), floor + 18.0, "middle", label);
        }
        let lines: Vec<f64> = steps
            .iter()
            .copied()
            .filter(|s| (bottom..=top).contains(s))
            .collect();
        for at in &lines {
            text(LEFT - 8.0, y(*at) + 4.0, "end", &(self.y_text)(*at));
        }
        for (i, series) in self.series.iter().enumerate() {
            text(
                end + 40.0,
                TOP + 12.0 + i as f64 * 18.0,
                "start",
                &series.name,
            );
        }
        let mut line = |x1: f64, y1: f64, x2: f64, y2: f64, colour: &str, width: f64| {
            let _ = writeln!(
                out,
                "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\"/>"
            );
        };
        for at in &lines {
            line(LEFT, y(*at), end, y(*at), "#dddddd", 1.0);
        }
        for (at, _) in &self.x_ticks {
            line(x(*at), floor, x(*at), floor + 4.0, "#333333", 1.0);
        }
        line(LEFT, floor, end, floor, "#333333", 1.0);
        line(LEFT, TOP, LEFT, floor, "#333333", 1.0);
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let key = TOP + 8.0 + i as f64 * 18.0;
            line(end + 14.0, key, end + 34.0, key, colour, 3.0);
            for pair in series.points.windows(2) {
                line(
                    x(pair[0].0),
                    y(pair[0].1),
                    x(pair[1].0),
                    y(pair[1].1),
                    colour,
                    2.0,
                );
            }
        }
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            for point in &series.points {
                let (cx, cy) = (x(point.0), y(point.1));
                let _ = writeln!(
                    out,
                    "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3\" fill=\"{colour}\"/>"
                );
            }
        }
        out.push_str("</svg>\n");
        out
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Names with the daemon's, if there is more than one.
fn name(subject: &Subject, all: usize, rest: &str) -> String {
    if all > 1 {
        format!("{rest}, {}", subject.label)
    } else {
        rest.to_string()
    }
}

/// Times over percentiles, of every row of the least depth there is.
pub fn latency(results: &[(Subject, Vec<Measured>)]) -> String {
    const QUANTILES: [f64; 8] = [0.5, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 0.99999];
    let depth = results
        .iter()
        .flat_map(|(_, r)| r)
        .map(|r| r.row.depth)
        .min()
        .unwrap_or(1);
    let mut series = Vec::new();
    for (subject, rows) in results {
        for r in rows.iter().filter(|r| r.row.depth == depth) {
            series.push(Series {
                name: name(subject, results.len(), &r.row.name()),
                points: QUANTILES
                    .map(|q| {
                        (
                            place(q),
                            r.times.value_at_quantile(q) as f64 * r.ns_per_tick / 1000.0,
                        )
                    })
                    .to_vec(),
            });
        }
    }
    times(&format!("Time of a command at depth {depth}"), 6, series)
}

/// The same of the rows of a report, which have three percentiles: of reads at the least depth there is.
pub fn latency_of_rows(rows: &[Value]) -> String {
    let depth_of = |row: &Value| row["depth"].as_u64();
    let depth = rows.iter().filter_map(depth_of).min().unwrap_or(1);
    let series = rows
        .iter()
        .filter(|r| depth_of(r) == Some(depth) && r["operation"] == "randread")
        .map(|row| {
            let text = |key: &str| row[key].as_str().unwrap_or_default();
            let at = [(0.5, "p50_ns"), (0.99, "p99_ns"), (0.999, "p999_ns")];
            Series {
                name: format!("{}, {}", text("transport"), text("namespace")),
                points: at
                    .map(|(q, key)| (place(q), row[key].as_f64().unwrap_or(0.0) / 1000.0))
                    .to_vec(),
            }
        });
    times(
        &format!("Time of a read at depth {depth}"),
        4,
        series.collect(),
    )
}

/// Where a quantile is: each nine takes as much room as the one before.
fn place(q: f64) -> f64 {
    -(1.0 - q).log10()
}

/// Microseconds over percentiles, of which the axis has so many.
fn times(title: &str, percentiles: usize, series: Vec<Series>) -> String {
    let ticks = [
        (0.5, "50"),
        (0.9, "90"),
        (0.99, "99"),
        (0.999, "99.9"),
        (0.9999, "99.99"),
        (0.99999, "99.999"),
    ];
    let ticks = ticks.map(|(q, t)| (place(q), t.to_string()));
    let chart = Chart {
        title,
        x_label: "percentile",
        y_label: "microseconds",
        x_ticks: ticks.into_iter().take(percentiles).collect(),
        y_text: |y| format!("{y}"),
        series,
    };
    chart.svg()
}

/// IOPS over depth.
pub fn iops(results: &[(Subject, Vec<Measured>)]) -> String {
    let mut series: Vec<Series> = Vec::new();
    for (subject, rows) in results {
        for r in rows {
            let kind = format!(
                "{}-{}-{}",
                r.row.namespace,
                r.row.operation.name(),
                r.row.size()
            );
            let name = name(subject, results.len(), &kind);
            let point = (f64::from(r.row.depth).log2(), r.median(|f| f.iops));
            match series.iter_mut().find(|s| s.name == name) {
                Some(s) => s.points.push(point),
                None => series.push(Series {
                    name,
                    points: vec![point],
                }),
            }
        }
    }
    let chart = Chart {
        title: "Commands per second over depth (one queue pair)",
        x_label: "commands out",
        y_label: "IOPS",
        x_ticks: [1u32, 2, 4, 8, 16, 32, 64, 128]
            .map(|d| (f64::from(d).log2(), d.to_string()))
            .to_vec(),
        y_text: |y| {
            if y >= 1e6 {
                format!("{} M", y / 1e6)
            } else {
                format!("{} k", y / 1e3)
            }
        },
        series,
    };
    chart.svg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_is_whole_and_inside() {
        let chart = Chart {
            title: "a < b & c",
            x_label: "x",
            y_label: "y",
            x_ticks: vec![(0.0, "0".into()), (7.0, "7".into())],
            y_text: |y| y.to_string(),
            series: vec![Series {
                name: "s".into(),
                points: vec![(0.0, 3.0), (7.0, 4e6)],
            }],
        };
        let svg = chart.svg();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("NaN") && !svg.contains("inf"));
        for number in svg.split("cx=\"").skip(1) {
            let x: f64 = number.split('"').next().unwrap().parse().unwrap();
            assert!((LEFT..=WIDTH - RIGHT).contains(&x));
        }
        let empty = Chart {
            series: vec![],
            ..chart
        };
        assert!(!empty.svg().contains("NaN"));
    }

    #[test]
    fn rows_of_a_report_are_drawn_at_their_least_depth() {
        let row = |namespace: &str, operation: &str, depth: u32| {
            serde_json::json!({
                "transport": "virtio-blk", "namespace": namespace, "operation": operation, "depth": depth,
                "p50_ns": 1000, "p99_ns": 2000, "p999_ns": 50_000,
            })
        };
        let rows = [
            row("null", "randread", 1),
            row("deep", "randread", 32),
            row("written", "randwrite", 1),
        ];
        let svg = latency_of_rows(&rows);
        assert!(svg.contains("virtio-blk, null") && svg.contains("at depth 1<"));
        assert!(!svg.contains("deep") && !svg.contains("written") && !svg.contains("NaN"));
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(!latency_of_rows(&[]).contains("NaN"));
    }
}
