//! Made-up prompts: common words in an order that repeats, each prompt different from its first token on, so
//! that no server answers from what it remembers.

/// Words that byte-pair and word-piece vocabularies have as one token, so that a prompt of N words has about
/// N tokens.
const WORDS: [&str; 48] = [
    "the", "old", "house", "near", "river", "was", "built", "by", "people", "who", "came", "from", "north",
    "and", "they", "made", "their", "first", "garden", "with", "stone", "walls", "while", "children",
    "played", "under", "trees", "every", "summer", "evening", "until", "light", "left", "quiet", "water",
    "then", "some", "told", "stories", "about", "time", "when", "ships", "could", "still", "reach", "small",
    "town",
];

/// A prompt of about `words` words; another `index` gives another prompt.
pub(super) fn text(index: usize, words: usize) -> String {
    let mut text = index.to_string();
    // Digits and words of the number count as one word here; how many tokens they are is the tokenizer's
    // business.
    for word in 1..words.max(1) {
        text.push(' ');
        text.push_str(WORDS[(index * 31 + word * 7 + word * word / 5) % WORDS.len()]);
    }
    text
}

/// `count` token ids below `vocabulary`; another `index` gives another first token.
pub(super) fn ids(index: usize, count: usize, vocabulary: usize) -> Vec<u32> {
    let id = |place: usize| (index + place * 7919 + place * place * 13) % vocabulary.max(1);
    (0..count).map(|place| u32::try_from(id(place)).unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_their_length_and_differ_from_the_first_word_on() {
        for words in [1, 2, 128] {
            assert_eq!(text(5, words).split(' ').count(), words);
        }
        assert_ne!(text(1, 9).split(' ').next(), text(2, 9).split(' ').next());
        assert_ne!(text(1, 9).split_once(' '), text(2, 9).split_once(' '));
    }

    #[test]
    fn ids_are_inside_the_vocabulary_and_differ_from_the_first_on() {
        let (one, two) = (ids(1, 300, 97), ids(2, 300, 97));
        assert_eq!(one.len(), 300);
        assert!(one.iter().all(|id| *id < 97));
        assert_ne!(one[0], two[0]);
    }
}
