//! Comments: their width, and the paths that they and the pages name.

use crate::Finding;
use crate::lexer;
use crate::tree::File;
use std::collections::BTreeSet;

/// Columns of a line with a comment; rustfmt holds code to the same.
pub const COMMENT_COLUMNS: usize = 110;

/// Ends of file names that are looked for when backticks hold them: what this repository is written in. Data
/// formats are left out, because prose names files of models and users with the same ends.
const SOURCE_ENDS: &[&str] = &[".rs", ".sh", ".py", ".md", ".proto", ".toml"];

/// Lines with a comment that are wider than [`COMMENT_COLUMNS`]: Rust, shell and Python, docstrings included.
/// A line whose only word is too long (an address) can't be broken and is fine.
pub fn wide_comments(file: &File) -> Vec<Finding> {
    let wide = commented_lines(file).into_iter().filter_map(|(number, line)| {
        let columns = line.chars().count();
        let breakable = line.trim_start_matches(['/', '!', '#', ' ', '-']).contains(' ');
        (columns > COMMENT_COLUMNS && breakable).then(|| {
            Finding::at(
                &file.path,
                number,
                format!("a comment of {columns} columns, {COMMENT_COLUMNS} allowed"),
            )
        })
    });
    wide.collect()
}

/// The lines of a file that hold a comment.
fn commented_lines(file: &File) -> Vec<(usize, &str)> {
    if file.is_rust() {
        let taken_apart = lexer::lines(file.text.as_deref().unwrap_or_default());
        let with_comment =
            file.lines().zip(taken_apart).filter(|(_, parts)| !parts.comment.trim().is_empty());
        return with_comment.map(|(line, _)| line).collect();
    }
    let is_python = file.path.ends_with(".py");
    if !is_python && !file.path.ends_with(".sh") {
        return Vec::new();
    }
    let mut in_docstring = false;
    let mut found = Vec::new();
    for (number, line) in file.lines() {
        let text = line.trim_start();
        let marks = if is_python { line.matches("\"\"\"").count() } else { 0 };
        // A docstring begins a line; a text that is assigned is code.
        let opens = text.starts_with("\"\"\"");
        if text.starts_with('#') || in_docstring || opens {
            found.push((number, line));
        }
        if marks % 2 == 1 && (in_docstring || opens) {
            in_docstring = !in_docstring;
        }
    }
    found
}

/// All files of the repository and the folders that they lie in.
#[derive(Debug, Default)]
pub struct Paths<'a> {
    all: BTreeSet<&'a str>,
}

impl<'a> Paths<'a> {
    /// The paths of `files`.
    pub fn new(files: &'a [File]) -> Self {
        let mut all = BTreeSet::new();
        for file in files {
            all.insert(file.path.as_str());
            all.extend(file.path.match_indices('/').map(|(end, _)| &file.path[..end]));
        }
        Self { all }
    }

    /// True when the path exists, from the root or as the end of a longer path.
    fn has(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        self.all.contains(path)
            || self
                .all
                .iter()
                .any(|existing| existing.strip_suffix(path).is_some_and(|rest| rest.ends_with('/')))
    }

    /// True when `name` is a folder at the root.
    fn is_top_folder(&self, name: &str) -> bool {
        self.all.contains(name)
            && self.all.iter().any(|path| path.strip_prefix(name).is_some_and(|rest| rest.starts_with('/')))
    }
}

/// Backticked paths, in pages and in comments of Rust, that are not in the repository.
pub fn stale_paths(file: &File, paths: &Paths<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, prose) in prose_lines(file) {
        for quoted in prose.split('`').skip(1).step_by(2) {
            if let Some(path) = repository_path(quoted, paths)
                && !paths.has(path)
            {
                findings.push(Finding::at(&file.path, number, format!("`{path}` does not exist")));
            }
        }
    }
    findings
}

/// Lines of prose: those of a page outside its code blocks, and the comments of a Rust file.
fn prose_lines(file: &File) -> Vec<(usize, String)> {
    let mut in_block = false;
    let lines: Vec<(usize, String)> = if file.is_rust() {
        let taken_apart = lexer::lines(file.text.as_deref().unwrap_or_default());
        taken_apart.into_iter().enumerate().map(|(index, line)| (index + 1, line.comment)).collect()
    } else if file.path.ends_with(".md") {
        file.lines().map(|(number, line)| (number, line.to_owned())).collect()
    } else {
        return Vec::new();
    };
    let outside = lines.into_iter().filter(|(_, line)| {
        let is_fence = line.trim_start_matches(['/', '!', ' ']).starts_with("```");
        in_block ^= is_fence;
        !in_block && !is_fence
    });
    outside.collect()
}

/// The path in `quoted`, if it looks like one of this repository: it begins with one of its folders, or it
/// ends like one of its sources. Patterns, placeholders (`runtime/NAME`) and commands are something else.
fn repository_path<'a>(quoted: &'a str, paths: &Paths<'_>) -> Option<&'a str> {
    let path = quoted.split_once(':').map_or(quoted, |(path, line)| {
        if line.starts_with(|c: char| c.is_ascii_digit()) { path } else { quoted }
    });
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    // `README.md` is a name and `NAME.rs` a placeholder: the file of a name exists somewhere.
    let placeholder = |component: &str| {
        let stem = component.split('.').next().unwrap_or(component);
        stem.len() > 1 && stem.chars().all(|c| c.is_ascii_uppercase() || c == '_') && !paths.has(component)
    };
    if path.is_empty()
        || !path.chars().all(plain)
        || path.starts_with('/')
        || path.split('/').any(placeholder)
    {
        return None;
    }
    let in_folder = path.split_once('/').is_some_and(|(first, _)| paths.is_top_folder(first));
    let is_source = SOURCE_ENDS.iter().any(|end| path.len() > end.len() && path.ends_with(end));
    (in_folder || is_source).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(path: &str, text: &str) -> usize {
        wide_comments(&File::from_text(path, text)).len()
    }

    #[test]
    fn wide_comments_are_found() {
        let words = "word ".repeat(22);
        for (path, text, expected) in [
            ("a.rs", format!("/// {words}\n// short\nlet a = \"{words}\";\n"), 1),
            ("a.rs", format!("let a = 1; // {words}\n"), 1),
            ("a.rs", format!("// {}\n", "word/".repeat(30)), 0),
            ("a.sh", format!("# {words}\necho {words}\n"), 1),
            ("a.py", format!("\"\"\"Short.\n{words}.\n\"\"\"\nA = \"{words}\"\n"), 1),
            ("a.md", format!("# {words}\n"), 0),
        ] {
            assert_eq!(wide(path, &text), expected, "{path}: {text}");
        }
    }

    #[test]
    fn a_comment_may_fill_its_columns() {
        let fits = format!("// {}b\n", "a ".repeat((COMMENT_COLUMNS - 4) / 2));
        assert_eq!(fits.trim_end().len(), COMMENT_COLUMNS);
        assert_eq!(wide("a.rs", &fits), 0);
        assert_eq!(wide("a.rs", &fits.replace('b', "bb")), 1);
    }

    #[test]
    fn stale_paths_are_found() {
        let tree = [
            File::from_text("runtime/cpu/src/exact/mod.rs", ""),
            File::from_text("runtime/cpu/Cargo.toml", ""),
            File::from_text("CONTRIBUTING.md", ""),
        ];
        let paths = Paths::new(&tree);
        for (path, text, expected) in [
            ("a.md", "see `runtime/cpu/src/exact.rs`", 1),
            ("a.md", "see `exact.rs`", 1),
            (
                "a.md",
                "see `exact/mod.rs`, `runtime/cpu/`, `runtime/cpu/src/exact/mod.rs:12`, `CONTRIBUTING.md`",
                0,
            ),
            (
                "a.md",
                "`runtime/NAME`, `runtime/*/src`, `application/json`, `model/config.json`, `cargo test a.rs`",
                0,
            ),
            ("a.md", "```\n`runtime/gone.rs`\n```\n", 0),
            ("a.md", "a file `src/arch/NAME.rs`, and `CONTRIBUTING.md`", 0),
            ("a.rs", "//! As `runtime/gone.rs` says.\n", 1),
            ("a.rs", "const A: &str = \"`runtime/gone.rs`\";\n", 0),
        ] {
            assert_eq!(stale_paths(&File::from_text(path, text), &paths).len(), expected, "{text}");
        }
    }
}
