//! Changes to an input.

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::sample::Index;
use proptest::strategy::BoxedStrategy;

/// Integers at which parsers tend to fail.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    7,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 40,
    1 << 53,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Longest piece that is inserted, removed or copied.
const MAX_PIECE: usize = 64;

/// Most copies of a piece, one after the other.
const MAX_COPIES: usize = 3000;

/// One change.
#[derive(Debug, Clone)]
pub(crate) enum Mutation {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    /// A little-endian integer of 1, 2, 4 or 8 bytes.
    Number(Index, u64, usize),
    /// An integer in decimal digits.
    Digits(Index, u64),
    /// A word of the input's language.
    Word(Index, Index),
    /// A piece repeated in place.
    Repeat(Index, usize, usize),
    /// A piece moved to another place.
    Copy(Index, Index, usize),
    /// The beginning of this input, then the end of another.
    Splice(Index, Index, Index),
    Cut(Index),
}

impl Mutation {
    pub(crate) fn any() -> BoxedStrategy<Self> {
        let at = any::<Index>;
        let number = || proptest::sample::select(&NUMBERS[..]);
        prop_oneof![
            4 => (at(), any::<u8>()).prop_map(|(at, byte)| Self::Set(at, byte)),
            4 => (at(), 0..8_u8).prop_map(|(at, bit)| Self::Flip(at, bit)),
            2 => (at(), vec(any::<u8>(), 1..16)).prop_map(|(at, piece)| Self::Insert(at, piece)),
            3 => (at(), 1..MAX_PIECE).prop_map(|(at, len)| Self::Remove(at, len)),
            3 => (at(), number(), prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)])
                .prop_map(|(at, number, bytes)| Self::Number(at, number, bytes)),
            2 => (at(), number()).prop_map(|(at, number)| Self::Digits(at, number)),
            5 => (at(), at()).prop_map(|(at, word)| Self::Word(at, word)),
            1 => (at(), 1..MAX_PIECE, 1..MAX_COPIES).prop_map(|(at, len, times)| Self::Repeat(at, len, times)),
            3 => (at(), at(), 1..MAX_PIECE).prop_map(|(from, to, len)| Self::Copy(from, to, len)),
            2 => (at(), at(), at()).prop_map(|(at, other, from)| Self::Splice(at, other, from)),
            1 => at().prop_map(Self::Cut),
        ]
        .boxed()
    }
}

/// The input with all changes, one after the other.
pub(crate) fn mutated(input: &[u8], mutations: &[Mutation], others: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    let mut input = input.to_vec();
    for mutation in mutations {
        apply(&mut input, mutation, others, words);
    }
    input
}

fn apply(input: &mut Vec<u8>, mutation: &Mutation, others: &[Vec<u8>], words: &[&str]) {
    // One place more than there are bytes: the end.
    let places = input.len() + 1;
    match mutation {
        Mutation::Set(at, byte) => write(input, at.index(places), &[*byte]),
        Mutation::Flip(at, bit) => {
            if let Some(byte) = input.get_mut(at.index(places)) {
                *byte ^= 1 << bit;
            }
        }
        Mutation::Insert(at, piece) => insert(input, at.index(places), piece),
        Mutation::Remove(at, len) => {
            let piece = range(at.index(places), *len, input);
            input.drain(piece);
        }
        Mutation::Number(at, number, bytes) => {
            write(input, at.index(places), &number.to_le_bytes()[..*bytes]);
        }
        Mutation::Digits(at, number) => insert(input, at.index(places), number.to_string().as_bytes()),
        Mutation::Word(at, word) => {
            if !words.is_empty() {
                insert(input, at.index(places), words[word.index(words.len())].as_bytes());
            }
        }
        Mutation::Repeat(at, len, times) => {
            let at = at.index(places);
            let piece = input[range(at, *len, input)].repeat(*times);
            insert(input, at, &piece);
        }
        Mutation::Copy(from, to, len) => {
            let piece = input[range(from.index(places), *len, input)].to_vec();
            insert(input, to.index(places), &piece);
        }
        Mutation::Splice(at, other, from) => {
            let other = &others[other.index(others.len())];
            let rest = &other[from.index(other.len() + 1)..];
            input.truncate(at.index(places));
            input.extend_from_slice(rest);
        }
        Mutation::Cut(at) => input.truncate(at.index(places)),
    }
}

fn range(at: usize, len: usize, input: &[u8]) -> std::ops::Range<usize> {
    at..(at + len).min(input.len())
}

fn write(input: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in input.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

fn insert(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    input.splice(at..at, piece.iter().copied());
}
