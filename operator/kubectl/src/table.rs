//! Tables whose columns are as wide as their longest cell.

/// Blanks between columns.
const GAP: usize = 3;

/// A table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    #[must_use]
    pub fn new(head: &[&str]) -> Self {
        Self { head: head.iter().map(|cell| (*cell).to_owned()).collect(), rows: Vec::new() }
    }

    /// Adds a row; a cell that is empty is shown as `-`.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let shown = |cell: String| if cell.is_empty() { "-".to_owned() } else { one_line(&cell) };
        self.rows.push(cells.into_iter().map(shown).collect());
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table as lines that end with a line break.
    #[must_use]
    pub fn text(&self) -> String {
        let lines = || std::iter::once(&self.head).chain(&self.rows);
        let columns = lines().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| lines().filter_map(|line| line.get(column)).map(|cell| chars(cell)).max();
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        let mut text = String::new();
        for line in lines() {
            let mut shown = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                shown.push_str(cell);
                shown.push_str(&" ".repeat(width + GAP - chars(cell)));
            }
            text.push_str(shown.trim_end());
            text.push('\n');
        }
        text
    }
}

fn chars(cell: &str) -> usize {
    cell.chars().count()
}

/// A text without line breaks and other control characters: a message of a pod must not move the cursor.
#[must_use]
pub fn one_line(text: &str) -> String {
    text.chars().map(|one| if one.is_control() { ' ' } else { one }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let mut table = Table::new(&["NAME", "PHASE"]);
        assert!(table.is_empty());
        table.row(["chat".to_owned(), "Ready".to_owned()]);
        table.row(["é-long-name".to_owned(), String::new()]);
        assert_eq!(table.text(), "NAME          PHASE\nchat          Ready\né-long-name   -\n");
    }

    #[test]
    fn a_cell_cannot_control_the_terminal() {
        let mut table = Table::new(&["MESSAGE"]);
        table.row(["a\nb\u{1b}[2Jc".to_owned()]);
        assert_eq!(table.text(), "MESSAGE\na b [2Jc\n");
    }
}
