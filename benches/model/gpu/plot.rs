//! Lines over the context, both axes logarithmic, as SVG.

use std::path::Path;

use plotters::prelude::*;

use super::Result;

const SIZE: (u32, u32) = (1000, 540);
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(226, 226, 226);
const COLORS: [RGBColor; 6] = [
    RGBColor(31, 111, 180),
    RGBColor(69, 170, 210),
    RGBColor(214, 93, 14),
    RGBColor(104, 157, 106),
    RGBColor(177, 98, 134),
    RGBColor(120, 120, 120),
];

/// A title, and lines with their names.
pub struct Chart {
    title: String,
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl Chart {
    pub fn new(title: &str) -> Self {
        Self {
            title: title.to_owned(),
            lines: Vec::new(),
        }
    }

    fn bounds(&self, of: impl Fn(&(f64, f64)) -> f64) -> (f64, f64) {
        let all = || self.lines.iter().flat_map(|line| &line.1).map(&of);
        (
            all().fold(f64::INFINITY, f64::min),
            all().fold(0.0, f64::max),
        )
    }
}

/// 131072 tokens are "128K".
fn context(tokens: f64) -> String {
    match tokens / 1024.0 {
        k if k >= 1024.0 => format!("{:.0}M", k / 1024.0),
        k => format!("{k:.0}K"),
    }
}

/// 1, 2 and 5 times every power of ten between two numbers.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let exponents = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let all = exponents.flat_map(|e| [1.0, 2.0, 5.0].map(|digit| (digit, e)));
    // As it is written, not as it is computed: 0.2, not 0.2000000001.
    let number = |(digit, e): (f64, i32)| format!("{digit}e{e}").parse().unwrap_or(digit);
    all.map(number)
        .filter(|y| (low..=high).contains(y))
        .collect()
}

/// Draws a chart that has a line. Where a line ends before the others, its implementation was out of memory.
pub fn draw(chart: &Chart, path: &Path) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let font = |size: u32| {
        ("Helvetica, Arial, sans-serif", size)
            .into_font()
            .color(&INK)
    };
    let ((left, right), (low, high)) = (chart.bounds(|p| p.0), chart.bounds(|p| p.1));
    let x = (left / 1.2..right * 1.2).log_scale().base(2.0);
    let y = (low / 1.5..high * 1.3)
        .log_scale()
        .with_key_points(ticks(low / 1.5, high * 1.3));
    let mut context_2d = ChartBuilder::on(&area)
        .margin(24)
        .margin_right(300)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .caption(&chart.title, font(24))
        .build_cartesian_2d(x, y)?;
    context_2d
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(font(15))
        .axis_desc_style(font(15))
        .x_desc("context, tokens")
        .x_label_formatter(&|x| context(*x))
        .y_label_formatter(&|y| format!("{y}"))
        .draw()?;
    let x_end = SIZE.0 as i32 - 290;
    for (i, ((name, line), color)) in chart.lines.iter().zip(COLORS).enumerate() {
        let strong = color.stroke_width(3);
        context_2d.draw_series(LineSeries::new(line.iter().copied(), strong))?;
        let points = line.iter().map(|at| Circle::new(*at, 4, color.filled()));
        context_2d.draw_series(points)?;
        // Beside the plot, where no line is.
        let y = 90 + 26 * i as i32;
        area.draw(&PathElement::new([(x_end, y), (x_end + 22, y)], strong))?;
        area.draw(&Text::new(name.clone(), (x_end + 30, y - 8), font(16)))?;
    }
    area.present()?;
    Ok(())
}
