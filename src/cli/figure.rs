//! Figures of a report as SVG: a line for each arm, intervals as bars, the arms' names at the right.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use segattn::experiment::report::{Figure, Line, Point};

const SIZE: (u32, u32) = (960, 480);
/// Width of the chart; the names have the rest.
const CHART: u32 = 690;
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(226, 226, 226);
/// Colours that differ to most eyes, and in grey.
const COLOURS: [RGBColor; 7] = [
    RGBColor(31, 111, 180),
    RGBColor(214, 93, 14),
    RGBColor(46, 139, 87),
    RGBColor(148, 70, 160),
    RGBColor(201, 162, 39),
    RGBColor(90, 90, 90),
    RGBColor(205, 65, 95),
];
/// Tokens.
const K: f64 = 1024.0;
/// Values this many times further from the median than the lowest are cut off.
const FAR: f64 = 4.0;

/// The figure as SVG.
pub fn draw(figure: &Figure) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    let drawn = whole(&area, figure);
    drawn.map_err(|e| anyhow!("cannot draw {}: {e}", figure.file))?;
    drop(area);
    Ok(svg)
}

type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

fn font(size: u32) -> TextStyle<'static> {
    let font = ("Helvetica, Arial, sans-serif", size).into_font();
    font.color(&INK)
}

fn whole<B: DrawingBackend>(area: &DrawingArea<B, Shift>, figure: &Figure) -> Drawn<B> {
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(CHART);
    chart(&left, figure)?;
    names(&right, figure)?;
    area.present()
}

/// x as drawn: doublings are equally far apart, other tokens are counted in K.
fn place(figure: &Figure, x: f64) -> f64 {
    if figure.doubling { x.log2() } else { x / K }
}

fn chart<B: DrawingBackend>(area: &DrawingArea<B, Shift>, figure: &Figure) -> Drawn<B> {
    let (low, high, cut) = bounds(figure);
    let points = || figure.lines.iter().flat_map(|line| &line.points);
    let xs = || points().map(|p| place(figure, p.x));
    let (first, last) = (xs().fold(f64::MAX, f64::min), xs().fold(f64::MIN, f64::max));
    let margin = 0.04 * (last - first).max(0.1);
    let title = match cut {
        true => format!("{} (higher values are cut off)", figure.title),
        false => figure.title.clone(),
    };
    let mut chart = ChartBuilder::on(area)
        .margin(20)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .caption(title, font(20))
        .build_cartesian_2d(first - margin..last + margin, low..high)?;
    let x_label = |x: &f64| match figure.doubling {
        true => tokens(x.exp2()),
        false => format!("{x}K"),
    };
    let y_label = |y: &f64| match figure.share {
        true => format!("{:.0}%", 100.0 * y),
        false if high - low < 0.1 => format!("{y:.4}"),
        false => format!("{y:.2}"),
    };
    let steps = if figure.doubling {
        (last - first).round() as usize + 1
    } else {
        9
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(font(14))
        .axis_desc_style(font(14))
        .x_desc(&figure.x)
        .y_desc(&figure.y)
        .x_labels(steps.clamp(2, 14))
        .x_label_formatter(&x_label)
        .y_label_formatter(&y_label)
        .draw()?;
    for (i, line) in figure.lines.iter().enumerate() {
        let style = style(i);
        // Intervals at equal x stand beside each other.
        let shift = (i as f64 / figure.lines.len().max(1) as f64 - 0.5) * 0.5 * margin;
        let at = |p: &Point| place(figure, p.x) + if p.interval.is_some() { shift } else { 0.0 };
        let spots: Vec<(f64, f64)> = line
            .points
            .iter()
            .map(|p| (at(p), p.y.clamp(low, high)))
            .collect();
        match dashed(i) {
            true => chart.draw_series(DashedLineSeries::new(spots.iter().copied(), 7, 4, style))?,
            false => chart.draw_series(LineSeries::new(spots.iter().copied(), style))?,
        };
        let inside = |p: &&Point| p.y <= high;
        let bars = line.points.iter().filter(inside).filter_map(|p| {
            let (l, h) = p.interval?;
            let ends = [(at(p), l.clamp(low, high)), (at(p), h.clamp(low, high))];
            Some(PathElement::new(ends, style.stroke_width(1)))
        });
        chart.draw_series(bars)?;
        if line.points.len() < 12 {
            chart.draw_series(spots.iter().map(|at| Circle::new(*at, 3, style.filled())))?;
        }
    }
    Ok(())
}

/// The names of the arms, in the order in which their lines end, the highest first.
fn names<B: DrawingBackend>(area: &DrawingArea<B, Shift>, figure: &Figure) -> Drawn<B> {
    let end = |line: &Line| line.points.last().map_or(f64::MIN, |p| p.y);
    let mut order: Vec<usize> = (0..figure.lines.len()).collect();
    order.sort_by(|a, b| end(&figure.lines[*b]).total_cmp(&end(&figure.lines[*a])));
    let step = (380 / order.len().max(1) as i32).min(24);
    for (row, i) in order.into_iter().enumerate() {
        let y = 56 + step * row as i32;
        let ends = [(0, y), (if dashed(i) { 10 } else { 24 }, y)];
        area.draw(&PathElement::new(ends, style(i)))?;
        if dashed(i) {
            area.draw(&PathElement::new([(14, y), (24, y)], style(i)))?;
        }
        let name = figure.lines[i].name.clone();
        area.draw(&Text::new(name, (32, y - 7), font(14)))?;
    }
    Ok(())
}

/// After all colours the next lines have them again, dashed.
fn dashed(i: usize) -> bool {
    (i / COLOURS.len()) % 2 == 1
}

fn style(i: usize) -> ShapeStyle {
    COLOURS[i % COLOURS.len()].stroke_width(2)
}

/// What y shows, and whether some values lie above it.
fn bounds(figure: &Figure) -> (f64, f64, bool) {
    if figure.share {
        return (-0.02, 1.02, false);
    }
    let points = || figure.lines.iter().flat_map(|line| &line.points);
    let mut ys: Vec<f64> = points().map(|p| p.y).collect();
    ys.sort_unstable_by(f64::total_cmp);
    let (low, median, high) = (ys[0], ys[ys.len() / 2], ys[ys.len() - 1]);
    let usual = median + FAR * (median - low);
    // A line that is there is no reason to cut all others.
    let inside = |line: &&Line| line.points.iter().all(|p| p.y <= usual);
    let most = 2 * figure.lines.iter().filter(inside).count() >= figure.lines.len();
    let cut = high > usual && most;
    let high = if cut {
        let inside = ys.iter().rev().find(|y| **y <= usual);
        inside.copied().unwrap_or(usual)
    } else {
        high
    };
    let margin = (0.06 * (high - low)).max(0.005);
    (low - margin, high + margin, cut)
}

/// Whole numbers of 1024 as K.
fn tokens(x: f64) -> String {
    match x.round() {
        n if n >= K && n % K == 0.0 => format!("{}K", n / K),
        n => format!("{n:.0}"),
    }
}
