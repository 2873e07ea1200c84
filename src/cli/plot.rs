//! The loss of a run as a picture: each step faint, their running mean strong, validation as points.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::metrics::read;

const SIZE: (u32, u32) = (960, 540);
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(226, 226, 226);
const TRAIN: RGBColor = RGBColor(31, 111, 180);
const VALIDATION: RGBColor = RGBColor(214, 93, 14);
/// Most points of a line; longer runs are averaged down to it.
const POINTS: usize = 1200;

/// Steps and losses.
type Series = Vec<(f64, f64)>;

/// Draws the lines of `metrics` into `picture`; nothing if there is no loss yet.
pub fn draw(metrics: &Path, picture: &Path) -> Result<()> {
    let (mut train, mut validation) = (Series::new(), Series::new());
    for line in read(metrics)? {
        let step = line.step as f64;
        // A skipped step says nothing about the model.
        if line.skipped.is_none() {
            train.extend(line.loss.map(|loss| (step, loss)));
        }
        validation.extend(line.validation_loss.map(|loss| (step, loss)));
    }
    if train.is_empty() {
        return Ok(());
    }
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    chart(&area, &train, &validation)
        .map_err(|e| anyhow!("cannot draw {}: {e}", picture.display()))?;
    drop(area);
    super::files::write_atomically(picture, svg.as_bytes())
}

fn chart<B: DrawingBackend>(
    area: &DrawingArea<B, plotters::coord::Shift>,
    train: &Series,
    validation: &Series,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    area.fill(&WHITE)?;
    let font = |size: u32| {
        ("Helvetica, Arial, sans-serif", size)
            .into_font()
            .color(&INK)
    };
    let smooth = smoothed(train);
    let (low, high) = bounds(train, &smooth, validation);
    let end = train
        .iter()
        .chain(validation)
        .map(|p| p.0)
        .fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(24)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .caption("Loss", font(24))
        .build_cartesian_2d(0.0..end, low..high)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(font(15))
        .axis_desc_style(font(15))
        .x_desc("step")
        .y_desc("nats per token")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    let clip = |s: Series| s.into_iter().map(move |(x, y)| (x, y.clamp(low, high)));
    chart.draw_series(LineSeries::new(clip(thinned(train)), TRAIN.mix(0.25)))?;
    let strong = TRAIN.stroke_width(3);
    chart
        .draw_series(LineSeries::new(clip(thinned(&smooth)), strong))?
        .label(format!("training  {:.3}", smooth[smooth.len() - 1].1))
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], strong));
    if let Some((_, last)) = validation.last() {
        let strong = VALIDATION.stroke_width(2);
        chart
            .draw_series(LineSeries::new(clip(validation.clone()), strong))?
            .label(format!("validation  {last:.3}"))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], strong));
        let point = |at| Circle::new(at, 4, VALIDATION.filled());
        chart.draw_series(clip(validation.clone()).map(point))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(16)
        .label_font(font(16))
        .border_style(GRID)
        .background_style(WHITE.mix(0.9))
        .draw()?;
    area.present()
}

/// The running mean over about a fiftieth of the run.
fn smoothed(series: &Series) -> Series {
    let newest = 1.0 / (series.len() as f64 / 50.0).max(4.0);
    let mut mean = series[0].1;
    let next = |(x, y): &(f64, f64)| {
        mean += newest * (y - mean);
        (*x, mean)
    };
    series.iter().map(next).collect()
}

/// Means of neighbours, so that a long run stays a small file.
fn thinned(series: &Series) -> Series {
    let size = series.len().div_ceil(POINTS);
    let mean = |part: &[(f64, f64)]| {
        let len = part.len() as f64;
        let sum = part.iter().fold((0.0, 0.0), |s, p| (s.0 + p.0, s.1 + p.1));
        (sum.0 / len, sum.1 / len)
    };
    series.chunks(size).map(mean).collect()
}

/// The losses that the picture shows: all but the highest hundredth of the single steps.
fn bounds(train: &Series, smooth: &Series, validation: &Series) -> (f64, f64) {
    let mut sorted: Vec<f64> = train.iter().map(|p| p.1).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let usual = sorted[(sorted.len() - 1) * 99 / 100];
    let lines = smooth.iter().chain(validation).map(|p| p.1);
    let (low, high) = lines.fold((sorted[0], usual), |(l, h), y| (l.min(y), h.max(y)));
    let margin = (0.06 * (high - low)).max(0.01);
    ((low - margin).max(0.0), high + margin)
}
