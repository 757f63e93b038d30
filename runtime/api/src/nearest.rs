//! "Did you mean": the known name that is closest to a misspelt one.
//!
//! Case, `_` and `-` are ignored, since writing `maxTokens` for `max_tokens` is the commonest slip of all.

/// The known name that is nearest to `found`, or none where all are too far away to be what was meant.
pub fn nearest<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    let wanted = plain(found);
    // A third of the letters may differ: "temprature" finds "temperature", "foo" finds nothing.
    let limit = (wanted.chars().count() / 3).max(1);
    known
        .iter()
        .map(|name| (distance(&wanted, &plain(name)), *name))
        .filter(|(far, _)| *far <= limit)
        .min_by_key(|(far, _)| *far)
        .map(|(_, name)| name)
}

/// One sentence about a name that is not known: the nearest known one where there is one, else all of them.
pub fn hint(found: &str, known: &[&str]) -> String {
    match nearest(found, known) {
        Some(name) => format!("did you mean {name:?}?"),
        None => format!("known are: {}", known.join(", ")),
    }
}

fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '_' | '-')).flat_map(char::to_lowercase).collect()
}

/// Levenshtein distance in characters, one row of the table at a time.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] = &["prompt", "max_tokens", "temperature", "top_p", "model", "stream", "seed"];

    #[test]
    fn slips_find_what_was_meant() {
        for (found, meant) in [
            ("maxTokens", "max_tokens"),
            ("max-token", "max_tokens"),
            ("temprature", "temperature"),
            ("topp", "top_p"),
            ("Prompt", "prompt"),
            ("seeds", "seed"),
        ] {
            assert_eq!(nearest(found, KNOWN), Some(meant), "{found}");
        }
    }

    #[test]
    fn what_is_far_from_all_finds_nothing_and_lists_all() {
        assert_eq!(nearest("frequency_penalty", KNOWN), None);
        assert!(hint("frequency_penalty", KNOWN).contains("prompt, max_tokens"));
    }

    #[test]
    fn distance_counts_single_edits() {
        for (a, b, far) in [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)] {
            assert_eq!(distance(a, b), far, "{a} {b}");
            assert_eq!(distance(b, a), far, "{b} {a}");
        }
    }
}
