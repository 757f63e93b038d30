//! "Did you mean": the known name that is closest to a misspelt one.
//!
//! Case, `_` and `-` are ignored, since writing `maxTokens` for `max_tokens` is the most common slip.

/// A longer name is compared with nothing: it is no misspelling of a known name, all of which are shorter
/// than half of this. The cost of a comparison is the product of both lengths, so the bound comes first.
const MAX_COMPARED_BYTES: usize = 128;

/// The known name that is nearest to `found`. None where all names are too different.
pub fn nearest<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    if found.len() > MAX_COMPARED_BYTES {
        return None;
    }
    let wanted = plain(found);
    // A third of the letters may differ: "temprature" finds "temperature", "foo" finds nothing.
    let limit = (wanted.chars().count() / 3).max(1);
    known
        .iter()
        .map(|name| (strsim::levenshtein(&wanted, &plain(name)), *name))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// One sentence about an unknown name: the nearest known name, or else all known names.
pub fn hint(found: &str, known: &[&str]) -> String {
    match nearest(found, known) {
        Some(name) => format!("did you mean {name:?}?"),
        None => format!("known are: {}", known.join(", ")),
    }
}

fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '_' | '-')).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] = &["prompt", "max_tokens", "temperature", "top_p", "model", "stream", "seed"];

    #[test]
    fn misspelt_names_find_the_intended_name() {
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
    fn a_name_far_from_all_others_lists_all_of_them() {
        assert_eq!(nearest("frequency_penalty", KNOWN), None);
        assert!(hint("frequency_penalty", KNOWN).contains("prompt, max_tokens"));
    }

    #[test]
    fn a_name_of_megabytes_is_compared_with_nothing() {
        let name = "temperature_".repeat(1 << 18);
        let started = std::time::Instant::now();
        assert_eq!(nearest(&name, KNOWN), None);
        // A distance over 3 MiB takes seconds.
        assert!(started.elapsed().as_millis() < 200);
    }
}
