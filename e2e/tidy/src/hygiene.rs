//! Habits that clippy has no lint for: the size of a queue needs its arithmetic in a comment, and a test does
//! not sleep, because it would be slow on a fast machine and fail on a slow one.

use crate::Finding;
use crate::rust::{self, Rust};
use std::collections::BTreeSet;

/// Calls that make a bounded queue; the argument is its bound.
const QUEUES: &[&str] = &["mpsc::channel", "sync_channel", "broadcast::channel", "Semaphore::new"];

/// Bounded queues outside tests with no comment that says where the bound comes from: at the call, or at the
/// constant that is the bound.
///
/// `explained` are the constants of [`explained_constants`].
pub fn unexplained_bounds(rust: &Rust<'_>, explained: &BTreeSet<String>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in rust.numbered().filter(|(number, _)| !rust.is_test(*number)) {
        let call = QUEUES.iter().find_map(|queue| {
            let end = rust::word_ends(&line.code, queue).next()?;
            let rest = line.code[end..].split_once('(')?;
            (rest.0.is_empty() || rest.0.starts_with("::<")).then_some(rest.1)
        });
        let Some(arguments) = call else { continue };
        if rust.comment_on(number).is_empty() && !names_any(arguments, explained) {
            findings.push(Finding::at(&rust.file.path, number, "a bound without its arithmetic"));
        }
    }
    findings
}

/// Calls of any `sleep` in tests, except under tokio's paused clock, where it takes no time.
pub fn sleeping_tests(rust: &Rust<'_>) -> Vec<Finding> {
    let sleeps = rust.numbered().filter(|(number, line)| {
        let call = ["sleep", "sleep_until", "sleep_ms"].iter().any(|name| {
            rust::word_ends(&line.code, name).any(|end| line.code[end..].trim_start().starts_with('('))
        });
        call && rust.is_test(*number)
            && !rust.function_at(*number).is_some_and(|function| function.paused_clock)
    });
    sleeps.map(|(number, _)| Finding::at(&rust.file.path, number, "a test that sleeps")).collect()
}

fn names_any(arguments: &str, constants: &BTreeSet<String>) -> bool {
    let mut words = arguments.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.any(|word| constants.contains(word))
}

/// Names of the constants of a file that have a comment.
pub fn explained_constants(rust: &Rust<'_>) -> Vec<String> {
    let definitions = rust.numbered().filter_map(|(number, line)| {
        let end = rust::word_ends(&line.code, "const").next()?;
        let name = line.code[end..].split(':').next()?.trim();
        let is_constant = !name.is_empty() && !name.contains(|c: char| c.is_lowercase() || c.is_whitespace());
        (is_constant && !rust.comment_on(number).is_empty()).then(|| name.to_owned())
    });
    definitions.collect()
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
    fn bounds_need_arithmetic() {
        for (text, expected) in [
            ("fn a() {\n    let (b, c) = mpsc::channel(8);\n}\n", 1),
            ("fn a() {\n    let (b, c) = mpsc::channel::<u8>(8);\n}\n", 1),
            ("fn a() {\n    // One for each of 8 rows.\n    let (b, c) = mpsc::channel(8);\n}\n", 0),
            ("const ROWS: usize = 8;\nfn a() {\n    let (b, c) = mpsc::channel(ROWS);\n}\n", 1),
            (
                "/// 8 rows, one each.\nconst ROWS: usize = 8;\nfn a() {\n    let (b, c) = sync_channel(ROWS);\n}\n",
                0,
            ),
            ("#[cfg(test)]\nmod tests {\n    fn a() { let b = mpsc::channel(8); }\n}\n", 0),
        ] {
            let rule =
                |rust: &Rust<'_>| unexplained_bounds(rust, &explained_constants(rust).into_iter().collect());
            assert_eq!(count(rule, "a/src/lib.rs", text), expected, "{text}");
        }
    }

    #[test]
    fn tests_do_not_sleep() {
        let body = "fn b() {\n    tokio::time::sleep(c).await;\n}\n";
        let in_module =
            |attribute: &str| format!("#[cfg(test)]\nmod tests {{\n{attribute}\nasync {body}}}\n");
        assert_eq!(count(sleeping_tests, "a/src/lib.rs", &in_module("#[tokio::test]")), 1);
        assert_eq!(
            count(sleeping_tests, "a/src/lib.rs", &in_module("#[tokio::test(start_paused = true)]")),
            0
        );
        assert_eq!(count(sleeping_tests, "a/tests/b.rs", &format!("async {body}")), 1);
        assert_eq!(count(sleeping_tests, "a/src/lib.rs", &format!("async {body}")), 0);
        assert_eq!(count(sleeping_tests, "a/tests/b.rs", "// sleep(1)\nfn a() { no_sleep(); }\n"), 0);
    }
}
