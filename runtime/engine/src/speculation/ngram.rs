//! Guesses from the text itself: what followed the same words the last time they occurred. Code, quotations and forms
//! repeat themselves, and looking costs nothing beside a step.

/// Tokens that have to be the same, tried from the longest: a longer match is more often right.
const LENGTHS: [usize; 3] = [4, 3, 2];

/// The tokens, at most `most`, that followed the latest earlier occurrence of what `tokens` end with. Empty where the
/// end is new.
///
/// One look goes through the whole text, at most once per length: far less than a step that reads a model's weights.
pub(crate) fn follow(tokens: &[u32], most: usize) -> &[u32] {
    if most == 0 {
        return &[];
    }
    LENGTHS.iter().find_map(|length| follow_of(tokens, *length, most)).unwrap_or_default()
}

fn follow_of(tokens: &[u32], length: usize, most: usize) -> Option<&[u32]> {
    let (before, end) = tokens.split_at_checked(tokens.len().checked_sub(length)?)?;
    // An occurrence may overlap the end itself, as in a run of equal tokens.
    let earlier = &tokens[..tokens.len().checked_sub(1)?];
    let at = earlier.windows(length).rposition(|window| window == end)?;
    debug_assert!(at < before.len());
    let after = &tokens[at + length..];
    Some(&after[..after.len().min(most)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_occurrence_of_the_longest_end_decides() {
        let text = [1, 2, 3, 4, 50, 51, 9, 3, 4, 60, 9, 1, 2, 3, 4];
        assert_eq!(follow(&text, 2), [50, 51], "four tokens are the same there, two elsewhere");
        assert_eq!(follow(&text[1..], 1), [50], "three are");
        assert_eq!(follow(&[7, 8, 1, 7, 8, 2, 7, 8], 3), [2, 7, 8], "the later one");
    }

    #[test]
    fn a_run_follows_itself_and_what_is_new_has_no_guess() {
        assert_eq!(follow(&[5, 5, 5, 5], 4), [5]);
        for (text, most) in [(&[1, 2, 3, 4][..], 4), (&[1, 2, 1, 2], 0), (&[1], 4), (&[], 4)] {
            assert!(follow(text, most).is_empty(), "{text:?}");
        }
    }
}
