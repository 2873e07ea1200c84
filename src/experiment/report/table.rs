//! Tables of a report.

/// A table in Markdown. Columns that are empty in every row are left out.
pub(super) struct Table {
    pub(super) heads: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(heads: &[&str]) -> Self {
        Self {
            heads: heads.iter().map(|head| (*head).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(super) fn text(&self) -> String {
        let kept = |i: &usize| self.rows.iter().any(|row| !row[*i].is_empty());
        let kept: Vec<usize> = (0..self.heads.len()).filter(kept).collect();
        let line = |cells: &[String]| {
            let cells: Vec<String> = kept.iter().map(|i| cells[*i].replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let mut text = line(&self.heads);
        text += &format!("|{}\n", "---|".repeat(kept.len()));
        self.rows.iter().for_each(|row| text += &line(row));
        text
    }
}
