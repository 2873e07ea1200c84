//! Markdown tables and numbers.

/// A table of cells. Columns that are empty in every row are left out.
pub fn markdown(heads: &[&str], rows: Vec<Vec<String>>) -> String {
    let kept: Vec<usize> = (0..heads.len())
        .filter(|i| rows.iter().any(|row| !row[*i].is_empty()))
        .collect();
    let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    let mut text = line(kept.iter().map(|i| heads[*i]).collect());
    text += &format!("|{}\n", "---|".repeat(kept.len()));
    for row in &rows {
        text += &line(kept.iter().map(|i| row[*i].as_str()).collect());
    }
    text
}

/// Three significant digits, thousands apart from 10,000 on.
pub fn number(x: f64) -> String {
    if x == 0.0 {
        return "0".into();
    }
    let digits = 2 - x.abs().log10().floor() as i32;
    if digits > 0 {
        return format!("{x:.*}", digits as usize);
    }
    let unit = 10f64.powi(-digits);
    let rounded = ((x / unit).round() * unit) as i64;
    if rounded.abs() < 10_000 {
        return rounded.to_string();
    }
    format!("{},{:03}", rounded / 1000, rounded % 1000)
}

/// 131072 tokens are "128K".
pub fn tokens(count: u64) -> String {
    match count {
        n if n >= 1 << 20 && n % (1 << 20) == 0 => format!("{}M", n >> 20),
        n if n >= 1024 && n % 1024 == 0 => format!("{}K", n >> 10),
        n => n.to_string(),
    }
}

#[test]
fn numbers_have_three_digits() {
    let shown = [
        0.0123456, 1.2345, 12.345, 999.6, 4932.3, 53_817.0, 803_981.0,
    ]
    .map(number);
    assert_eq!(
        shown,
        [
            "0.0123", "1.23", "12.3", "1000", "4930", "53,800", "804,000"
        ]
    );
    assert_eq!(
        [1000, 1024, 131_072, 1 << 20].map(tokens),
        ["1000", "1K", "128K", "1M"]
    );
}
