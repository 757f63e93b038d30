//! Words that belong on one side of a boundary only: `anyhow` where programs end, clocks and files outside
//! the pure part of the control plane, files of this repository instead of one machine.

use crate::Finding;
use crate::rust::{self, Rust};

/// Folder of the pure part of the control plane.
const PURE: &str = "operator/control/src/";
/// I/O and clocks, with `::` where the bare word would be too common.
const IMPURE: &[&str] = &[
    "std::fs",
    "std::net",
    "std::env",
    "std::process",
    "std::thread",
    "Instant::now",
    "SystemTime::now",
    "Timestamp::now",
];

/// `anyhow` in a library. A caller can't match on it: an enum of `thiserror` says what can go wrong.
pub fn anyhow_in_libraries(rust: &Rust<'_>) -> Vec<Finding> {
    let path = rust.file.path.as_str();
    let program = path.ends_with("/main.rs") || path.contains("/src/bin/") || path.starts_with("e2e/");
    if program {
        return Vec::new();
    }
    lines_with(rust, &["anyhow"], "`anyhow` outside of main.rs and e2e")
}

/// I/O or a clock in `control` outside its tests.
pub fn impure_control(rust: &Rust<'_>) -> Vec<Finding> {
    if !rust.file.path.starts_with(PURE) {
        return Vec::new();
    }
    lines_with(rust, IMPURE, "I/O or a clock in control")
}

fn lines_with(rust: &Rust<'_>, words: &[&str], what: &str) -> Vec<Finding> {
    let hits = rust.numbered().filter(|(number, line)| {
        words.iter().any(|word| rust::has_word(&line.code, word))
            && !(what.starts_with("I/O") && rust.is_test(*number))
    });
    hits.map(|(number, _)| Finding::at(&rust.file.path, number, what)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::File;

    fn count(rule: fn(&Rust<'_>) -> Vec<Finding>, path: &str, text: &str) -> usize {
        let file = File::from_text(path, text);
        rule(&Rust::parse(&file).unwrap()).len()
    }

    #[test]
    fn anyhow_is_for_programs() {
        let text = "//! anyhow in prose is fine.\nuse anyhow::Result;\n";
        for (path, expected) in [
            ("a/src/lib.rs", 1),
            ("a/src/run.rs", 1),
            ("a/src/main.rs", 0),
            ("e2e/src/lib.rs", 0),
            ("a/src/bin/b.rs", 0),
        ] {
            assert_eq!(count(anyhow_in_libraries, path, text), expected, "{path}");
        }
    }

    #[test]
    fn control_is_pure() {
        let text = "fn a() { std::fs::read(b); }\nfn c() { Instant::now(); }\n";
        assert_eq!(count(impure_control, "operator/control/src/lib.rs", text), 2);
        assert_eq!(count(impure_control, "operator/src/apply.rs", text), 0);
        let tested = format!("#[cfg(test)]\nmod tests {{\n{text}}}\n");
        assert_eq!(count(impure_control, "operator/control/src/lib.rs", &tested), 0);
    }
}
