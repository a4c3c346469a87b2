//! Tables for people: columns as wide as their widest cell, numbers to the right.

/// How the cells of a column stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table: a title line, then one line a row. Cells beyond the titles are left out. A line break or another control
/// character in a cell is shown as `?`, so that a row stays a row.
pub fn draw<const N: usize>(titles: [(&str, Align); N], rows: &[[String; N]]) -> String {
    let clean = |cell: &str| -> String {
        cell.chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect()
    };
    let mut lines = vec![titles.map(|(title, _)| title.to_owned())];
    lines.extend(
        rows.iter()
            .map(|row| row.each_ref().map(|cell| clean(cell))),
    );
    let mut widths = [0; N];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut out = String::new();
    for line in &lines {
        let mut text = String::new();
        for ((cell, width), (_, align)) in line.iter().zip(widths).zip(titles) {
            let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
            match align {
                Align::Left => text.extend([cell.as_str(), &padding]),
                Align::Right => text.extend([padding.as_str(), cell]),
            }
            text.push_str("  ");
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            ["web".into(), "10 GiB".into()],
            ["a-longer\nname".into(), "4 KiB".into()],
        ];
        let table = draw([("NAME", Align::Left), ("SIZE", Align::Right)], &rows);
        let expected = "NAME             SIZE\nweb            10 GiB\na-longer?name   4 KiB\n";
        assert_eq!(table, expected);
    }
}
