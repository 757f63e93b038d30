//! Draft tokens from the text itself: the tokens that followed the latest tokens where they occurred before.
//! Code, quotations and forms repeat themselves, and the search costs little beside a step.

/// Lengths of the ends that are searched for, the longest first: its matches are accepted more often.
const LENGTHS: [usize; 3] = [4, 3, 2];

/// The tokens, at most `limit`, that followed the latest earlier occurrence of the end of `tokens`. Empty
/// where the end did not occur before.
///
/// A search reads the whole text at most once per length, which is far less than a step that reads a model's
/// weights.
pub(crate) fn propose(tokens: &[u32], limit: usize) -> &[u32] {
    if limit == 0 {
        return &[];
    }
    LENGTHS.iter().find_map(|length| propose_by_end(tokens, *length, limit)).unwrap_or_default()
}

fn propose_by_end(tokens: &[u32], length: usize, limit: usize) -> Option<&[u32]> {
    let (before, end) = tokens.split_at_checked(tokens.len().checked_sub(length)?)?;
    // An occurrence may overlap the end itself, as in a run of equal tokens.
    let earlier = &tokens[..tokens.len().checked_sub(1)?];
    let at = earlier.windows(length).rposition(|window| window == end)?;
    debug_assert!(at < before.len());
    let following = &tokens[at + length..];
    Some(&following[..following.len().min(limit)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_match_of_the_longest_end_is_proposed() {
        let text = [1, 2, 3, 4, 50, 51, 9, 3, 4, 60, 9, 1, 2, 3, 4];
        assert_eq!(propose(&text, 2), [50, 51], "four tokens are the same there, two elsewhere");
        assert_eq!(propose(&text[1..], 1), [50], "three are");
        assert_eq!(propose(&[7, 8, 1, 7, 8, 2, 7, 8], 3), [2, 7, 8], "the later one");
    }

    #[test]
    fn a_run_continues_itself_and_a_new_end_has_no_draft() {
        assert_eq!(propose(&[5, 5, 5, 5], 4), [5]);
        for (text, limit) in [(&[1, 2, 3, 4][..], 4), (&[1, 2, 1, 2], 0), (&[1], 4), (&[], 4)] {
            assert!(propose(text, limit).is_empty(), "{text:?}");
        }
    }
}
