//! Reports: rows of an experiment as tables in Markdown, and as figures for somebody to draw.

mod table;

use std::collections::BTreeMap;
use std::fmt::Write;

use super::definition::Definition;
use super::rows::{NATS, Row, SCORE};
use super::stats::{Estimate, difference, estimate, hybrid, mean_of_tasks};
use table::Table;

/// Tasks of a metric beyond which only their mean is drawn.
const MOST_DRAWN: usize = 4;
/// Fewest tokens before a token that count in a figure of the loss by position.
const FIRST_CONTEXT: u64 = 16;

/// What the intervals are, for readers of a page.
const INTERVALS: &str = "Means over seeds, with 95% intervals in brackets. Losses (nats a token): a bootstrap over \
documents\nand Student's t over seeds, put together; with one seed documents alone, and \"one seed\" where rows \
have no single\nwindows. Shares (percent): Wilson's interval over all prompts. Differences are paired.\n\n";

/// An experiment's report.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Its page, which shows the figures by their files' names.
    pub markdown: String,
    /// Its figures.
    pub figures: Vec<Figure>,
}

/// Lines over tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Name of its file.
    pub file: String,
    /// What it shows.
    pub title: String,
    /// What x is.
    pub x: String,
    /// What y is.
    pub y: String,
    /// Whether x doubles from step to step.
    pub doubling: bool,
    /// Whether y is a share from 0 to 1.
    pub share: bool,
    /// A line for each arm.
    pub lines: Vec<Line>,
}

/// An arm in a figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The arm.
    pub name: String,
    /// Its points, x ascending.
    pub points: Vec<Point>,
}

/// A point with its 95% interval, where it has one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Tokens.
    pub x: f64,
    /// The mean.
    pub y: f64,
    /// Its interval.
    pub interval: Option<(f64, f64)>,
}

/// The report of rows, which came from the file `source`. Without a definition arms are in the order of their rows.
/// Files of figures begin with `stem`.
pub fn report(
    name: &str,
    stem: &str,
    source: &str,
    rows: &[Row],
    definition: Option<&Definition>,
) -> Report {
    let view = View::new(stem, rows, definition);
    let mut text = format!("<!-- Made from {source} by `segattn report`. -->\n\n# {name}\n\n");
    if let Some(definition) = definition {
        text += &format!("{}\n\n", definition.description.trim());
    }
    text += INTERVALS;
    text += &view.arms();
    let mut figures = Vec::new();
    for metric in view.distinct(|row| row.metric.clone()) {
        let tasks = view.tasks(&metric);
        for task in &tasks {
            let drawn = tasks.len() <= MOST_DRAWN;
            view.task(&metric, task, drawn, &mut text, &mut figures);
        }
        if tasks.len() > 1 && metric == SCORE {
            view.mean(&metric, &mut text, &mut figures);
        }
    }
    Report {
        markdown: text,
        figures,
    }
}

/// Rows in the order of a report.
struct View<'a> {
    stem: &'a str,
    rows: Vec<&'a Row>,
    arms: Vec<String>,
    definition: Option<&'a Definition>,
}

impl<'a> View<'a> {
    fn new(stem: &'a str, rows: &'a [Row], definition: Option<&'a Definition>) -> Self {
        let mut view = Self {
            stem,
            rows: rows.iter().collect(),
            arms: Vec::new(),
            definition,
        };
        view.arms = view.distinct(Row::label);
        let place = |label: &String| {
            let arms = definition.map(|d| &d.arms[..]).unwrap_or_default();
            arms.iter().position(|arm| arm.name == *label)
        };
        // Those that are not in the definition stay behind those that are.
        view.arms.sort_by_key(|l| place(l).unwrap_or(usize::MAX));
        view
    }

    /// Different values in the order in which they come.
    fn distinct<T: PartialEq>(&self, of: impl Fn(&Row) -> T) -> Vec<T> {
        let mut found = Vec::new();
        for row in &self.rows {
            let value = of(row);
            if !found.contains(&value) {
                found.push(value);
            }
        }
        found
    }

    fn tasks(&self, metric: &str) -> Vec<String> {
        let of = |row: &Row| (row.metric == metric).then(|| row.task.clone());
        self.distinct(of).into_iter().flatten().collect()
    }

    fn lengths(&self, keep: impl Fn(&Row) -> bool) -> Vec<u64> {
        let of = |row: &Row| keep(row).then_some(row.length);
        let mut lengths: Vec<u64> = self.distinct(of).into_iter().flatten().collect();
        lengths.sort_unstable();
        lengths
    }

    fn find(&self, arm: &str, metric: &str, task: Option<&str>, length: u64) -> Vec<&'a Row> {
        let is = |row: &&&Row| {
            row.label() == arm
                && row.metric == metric
                && row.length == length
                && task.is_none_or(|task| row.task == task)
        };
        self.rows.iter().filter(is).copied().collect()
    }

    /// What the arms are and cost.
    fn arms(&self) -> String {
        let mut table = Table::new(&["arm", "what it is", "seeds", "M tokens", "training, s"]);
        for arm in &self.arms {
            let rows: Vec<_> = self.rows.iter().filter(|r| r.label() == *arm).collect();
            let mut seeds: Vec<u64> = rows.iter().map(|row| row.seed).collect();
            seeds.sort_unstable();
            seeds.dedup();
            let of_seed = |seed: &u64| rows.iter().find(|row| row.seed == *seed);
            let firsts: Vec<_> = seeds.iter().filter_map(of_seed).collect();
            let mean = |value: &dyn Fn(&Row) -> f64| {
                firsts.iter().map(|row| value(row)).sum::<f64>() / firsts.len() as f64
            };
            let what = self.definition.and_then(|d| d.arm(arm));
            table.row(vec![
                arm.clone(),
                what.map_or(String::new(), |arm| arm.description.clone()),
                seeds.len().to_string(),
                format!("{:.3}", mean(&|row| row.tokens as f64 / 1e6)),
                format!("{:.1}", mean(&|row| row.gpu_seconds)),
            ]);
        }
        table.text()
    }

    /// Section, differences and figures of a task.
    fn task(
        &self,
        metric: &str,
        task: &str,
        drawn: bool,
        text: &mut String,
        figures: &mut Vec<Figure>,
    ) {
        let lengths = self.lengths(|row| row.metric == metric && row.task == task);
        let one = |arm: &str, length| estimate(&self.find(arm, metric, Some(task), length));
        *text += &format!("\n## {task}: {}\n\n", unit(metric));
        *text += &self.table(metric, &lengths, &one);
        self.reasons(metric, task, text);
        self.recall(metric, task, &lengths, text);
        let minus = |arm: &str, length| {
            let find = |arm: &str| self.find(arm, metric, Some(task), length);
            difference(&find(arm), &find(self.definition?.baseline.as_deref()?))
        };
        self.against(metric, &lengths, &minus, text);
        let file = format!("{}-{}-{}", self.stem, plain(task), plain(metric));
        let mut add = |figure: Figure| {
            *text += &format!("\n![{}]({})\n", figure.title, figure.file);
            figures.push(figure);
        };
        if drawn && lengths.len() > 1 {
            add(self.by_length(metric, task, &lengths, &file, &one));
        }
        for length in lengths {
            if let Some(figure) = self.by_position(metric, task, length, &file) {
                add(figure);
            }
        }
    }

    /// Section and figure of the mean over all tasks.
    fn mean(&self, metric: &str, text: &mut String, figures: &mut Vec<Figure>) {
        let lengths = self.lengths(|row| row.metric == metric);
        let tasks = self.tasks(metric).len();
        let one = |arm: &str, length| {
            let rows = self.find(arm, metric, None, length);
            let all = rows.iter().all(|row| row.value.is_some());
            let mut found: Vec<&str> = rows.iter().map(|row| row.task.as_str()).collect();
            found.sort_unstable();
            found.dedup();
            (all && found.len() == tasks)
                .then(|| mean_of_tasks(&rows))
                .flatten()
        };
        let any = self
            .arms
            .iter()
            .any(|arm| lengths.iter().any(|l| one(arm, *l).is_some()));
        if !any {
            return;
        }
        *text += &format!("\n## mean of {tasks} tasks: {}\n\n", unit(metric));
        *text += &self.table(metric, &lengths, &one);
        let minus = |arm: &str, length| {
            let baseline = self.definition?.baseline.as_deref()?;
            hybrid(&one(arm, length)?, &one(baseline, length)?, 0.0)
        };
        self.against(metric, &lengths, &minus, text);
        if lengths.len() > 1 {
            let file = format!("{}-mean-{}", self.stem, plain(metric));
            let title = format!("mean of {tasks} tasks");
            let figure = self.by_length(metric, &title, &lengths, &file, &one);
            *text += &format!("\n![{}]({})\n", figure.title, figure.file);
            figures.push(figure);
        }
    }

    fn table(
        &self,
        metric: &str,
        lengths: &[u64],
        one: &dyn Fn(&str, u64) -> Option<Estimate>,
    ) -> String {
        let heads: Vec<String> = lengths.iter().map(|l| tokens(*l)).collect();
        let mut table = Table::new(&["arm"]);
        table.heads.extend(heads);
        for arm in &self.arms {
            let cells = lengths.iter().map(|length| one(arm, *length));
            let cells: Vec<_> = cells.map(|e| e.map(|e| shown(metric, &e))).collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let cells = cells.into_iter().map(|cell| cell.unwrap_or("-".into()));
            table.row(std::iter::once(arm.clone()).chain(cells).collect());
        }
        table.text()
    }

    /// Why there is no value where there is none.
    fn reasons(&self, metric: &str, task: &str, text: &mut String) {
        let of = |row: &Row| match row.metric == metric && row.task == task {
            true => row.skipped.clone(),
            false => None,
        };
        for reason in self.distinct(of).into_iter().flatten() {
            let _ = write!(text, "\n- {reason}\n");
        }
    }

    /// How much of what was asked for the best head had selected, where rows have it.
    fn recall(&self, metric: &str, task: &str, lengths: &[u64], text: &mut String) {
        let mean = |arm: &str, length| {
            let rows = self.find(arm, metric, Some(task), length);
            let found: Vec<f64> = rows.iter().filter_map(|row| row.recall).collect();
            let sum: f64 = found.iter().sum();
            (!found.is_empty()).then(|| sum / found.len() as f64)
        };
        let mut table = Table::new(&["arm"]);
        table.heads.extend(lengths.iter().map(|l| tokens(*l)));
        for arm in &self.arms {
            let cells: Vec<_> = lengths.iter().map(|length| mean(arm, *length)).collect();
            if cells.iter().any(Option::is_some) {
                let cell =
                    |share: Option<f64>| share.map_or("-".into(), |s| format!("{:.0}", 100.0 * s));
                let cells = cells.into_iter().map(cell);
                table.row(std::iter::once(arm.clone()).chain(cells).collect());
            }
        }
        if !table.rows.is_empty() {
            *text += &format!(
                "\nOf it selected by the head that selected the most, percent:\n\n{}",
                table.text()
            );
        }
    }

    /// Differences from the baseline, and whether they are within the margin that was fixed before.
    fn against(
        &self,
        metric: &str,
        lengths: &[u64],
        minus: &dyn Fn(&str, u64) -> Option<Estimate>,
        text: &mut String,
    ) {
        let Some((definition, baseline)) = self
            .definition
            .and_then(|d| Some((d, d.baseline.as_ref()?)))
        else {
            return;
        };
        let margin = definition.margins.get(metric).copied();
        let mut table = Table::new(&["arm"]);
        table.heads.extend(lengths.iter().map(|l| tokens(*l)));
        for arm in self.arms.iter().filter(|arm| *arm != baseline) {
            let cells: Vec<_> = lengths.iter().map(|length| minus(arm, *length)).collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let cell = |e: Option<Estimate>| {
                let e = e?;
                let verdict = margin.and_then(|margin| verdict(metric, &e, margin));
                let verdict = verdict.map_or(String::new(), |v| format!(", {v}"));
                Some(format!("{}{verdict}", signed(metric, &e)))
            };
            let cells = cells.into_iter().map(|e| cell(e).unwrap_or("-".into()));
            table.row(std::iter::once(arm.clone()).chain(cells).collect());
        }
        if table.rows.is_empty() {
            return;
        }
        let limits = margin.map_or(String::new(), |margin| {
            let shown = match metric == NATS {
                true => format!("{margin} nats"),
                false => format!("{} points", 100.0 * margin),
            };
            format!(
                " Margin, fixed before the run: {shown}. \"within\": the interval is; \"beyond\": none of it is; \
                 \"open\": the data do not say."
            )
        });
        *text += &format!(
            "\nDifference from `{baseline}`.{limits}\n\n{}",
            table.text()
        );
    }

    fn by_length(
        &self,
        metric: &str,
        task: &str,
        lengths: &[u64],
        file: &str,
        one: &dyn Fn(&str, u64) -> Option<Estimate>,
    ) -> Figure {
        let point = |arm: &str, length: u64| {
            let e = one(arm, length)?;
            Some(Point {
                x: length as f64,
                y: e.mean,
                interval: e.interval,
            })
        };
        let lines = self.arms.iter().map(|arm| Line {
            name: arm.clone(),
            points: lengths.iter().filter_map(|l| point(arm, *l)).collect(),
        });
        Figure {
            file: format!("{file}-length.svg"),
            title: format!("{task} by length"),
            x: "tokens".into(),
            y: unit(metric).into(),
            doubling: true,
            share: metric != NATS,
            lines: lines.filter(|line| !line.points.is_empty()).collect(),
        }
    }

    /// The loss by position at a length, where rows have it.
    fn by_position(&self, metric: &str, task: &str, length: u64, file: &str) -> Option<Figure> {
        let rows = |arm: &String| self.find(arm, metric, Some(task), length);
        let doubling = self
            .arms
            .iter()
            .flat_map(rows)
            .any(|row| row.by_context.is_some());
        let lines = self.arms.iter().map(|arm| Line {
            name: arm.clone(),
            points: match doubling {
                true => contexts(&rows(arm)),
                false => positions(&rows(arm), length),
            },
        });
        let lines: Vec<_> = lines.filter(|line| line.points.len() > 1).collect();
        (!lines.is_empty()).then(|| Figure {
            file: format!("{file}-position-{}.svg", tokens(length)),
            title: format!("{task} by position at {}", tokens(length)),
            x: "tokens before".into(),
            y: unit(metric).into(),
            doubling,
            share: false,
            lines,
        })
    }
}

/// Means over seeds of the loss in equal parts.
fn positions(rows: &[&Row], length: u64) -> Vec<Point> {
    let lists: Vec<&Vec<f64>> = rows.iter().filter_map(|r| r.by_position.as_ref()).collect();
    let parts = lists.iter().map(|list| list.len()).min().unwrap_or(0);
    let point = |i: usize| Point {
        x: (i as f64 + 0.5) * length as f64 / parts as f64,
        y: lists.iter().map(|list| list[i]).sum::<f64>() / lists.len() as f64,
        interval: None,
    };
    (0..parts).map(point).collect()
}

/// Means over seeds of the loss by length of context, at the middle of each range.
fn contexts(rows: &[&Row]) -> Vec<Point> {
    let mut sums: BTreeMap<u64, (f64, f64, f64)> = BTreeMap::new();
    for context in rows.iter().filter_map(|r| r.by_context.as_ref()).flatten() {
        if context.from >= FIRST_CONTEXT {
            let middle = (context.from as f64 * context.to as f64).sqrt();
            let sum = sums.entry(context.from).or_insert((middle, 0.0, 0.0));
            sum.1 += context.loss * context.tokens as f64;
            sum.2 += context.tokens as f64;
        }
    }
    let point = |(x, sum, tokens): (f64, f64, f64)| Point {
        x,
        y: sum / tokens,
        interval: None,
    };
    sums.into_values().map(point).collect()
}

/// What a metric is measured in.
fn unit(metric: &str) -> &str {
    match metric {
        NATS => "nats a token",
        metric => metric,
    }
}

fn shown(metric: &str, e: &Estimate) -> String {
    match (metric == NATS, e.interval) {
        (true, Some((low, high))) => format!("{:.3} [{low:.3}, {high:.3}]", e.mean),
        (true, None) => format!("{:.3} [one seed]", e.mean),
        (false, interval) => {
            let (low, high) = interval.unwrap_or((0.0, 1.0));
            let [mean, low, high] = [e.mean, low, high].map(|share| 100.0 * share);
            format!("{mean:.0} [{low:.0}, {high:.0}]")
        }
    }
}

fn signed(metric: &str, e: &Estimate) -> String {
    let (scale, digits) = if metric == NATS { (1.0, 4) } else { (100.0, 1) };
    let show = |x: f64| format!("{:+.digits$}", scale * x);
    let (low, high) = e.interval.unwrap_or((f64::NEG_INFINITY, f64::INFINITY));
    format!("{} [{}, {}]", show(e.mean), show(low), show(high))
}

/// How a difference from the baseline stands to the margin that counts as none.
fn verdict(metric: &str, e: &Estimate, margin: f64) -> Option<&'static str> {
    let (low, high) = e.interval?;
    // What is worse counts: a higher loss, a lower share.
    let (least, most) = if metric == NATS {
        (low, high)
    } else {
        (-high, -low)
    };
    Some(match (most <= margin, least > margin) {
        (true, _) => "within",
        (_, true) => "beyond",
        _ => "open",
    })
}

/// 131072 tokens are "128K".
fn tokens(count: u64) -> String {
    match count {
        n if n >= 1 << 20 && n % (1 << 20) == 0 => format!("{}M", n >> 20),
        n if n >= 1024 && n % 1024 == 0 => format!("{}K", n >> 10),
        n => n.to_string(),
    }
}

/// A name as part of a file's name.
fn plain(name: &str) -> String {
    let parts = name.split(|c: char| !c.is_ascii_alphanumeric());
    let parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
    parts.join("-")
}
