//! Bounds on what an answer repeats of its request: a caller decides how long a request is, not how long a
//! refusal is.

use std::borrow::Cow;

/// The longest piece of a request that an answer repeats, in characters.
pub const MAX_ECHO_CHARS: usize = 200;
/// The longest message of an error, in characters: two echoes, the words around them, and a list of names.
pub const MAX_MESSAGE_CHARS: usize = 1000;
/// The most names that an error lists.
pub const MAX_LISTED_NAMES: usize = 32;

/// A piece of a request, cut to [`MAX_ECHO_CHARS`].
#[must_use]
pub fn echo(text: &str) -> Cow<'_, str> {
    truncate(text, MAX_ECHO_CHARS)
}

/// The first `chars` characters of a text, with `...` where that is not all of it.
#[must_use]
pub fn truncate(text: &str, chars: usize) -> Cow<'_, str> {
    match text.char_indices().nth(chars) {
        None => Cow::Borrowed(text),
        Some((end, _)) => Cow::Owned(format!("{}...", &text[..end])),
    }
}

/// Names in a row, cut to [`MAX_LISTED_NAMES`] with the number of the others.
#[must_use]
pub fn list(names: &[String]) -> String {
    let listed: Vec<Cow<'_, str>> = names.iter().take(MAX_LISTED_NAMES).map(|name| echo(name)).collect();
    match names.len().saturating_sub(MAX_LISTED_NAMES) {
        0 => listed.join(", "),
        more => format!("{} and {more} more", listed.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(truncate("h\u{e9}llo", 5), "h\u{e9}llo");
        assert_eq!(truncate("h\u{e9}llo", 2), "h\u{e9}...");
        assert_eq!(echo(&"x".repeat(1 << 20)).len(), MAX_ECHO_CHARS + 3);
    }

    #[test]
    fn long_lists_end_with_a_count() {
        let names: Vec<String> = (0..40).map(|index| index.to_string()).collect();
        assert!(list(&names).ends_with("31 and 8 more"));
        assert_eq!(list(&names[..2]), "0, 1");
    }
}
