//! Whether each row of a step is alone: the only row of its sequence, whose slot in the cache no other
//! sequence reads. Its key and value may then be written by the thread that attends to them.

use trustformers_plan::{KV_BLOCK_TOKENS, StepInput};

/// The blocks that a step writes, as bits.
#[derive(Debug, Default)]
pub(crate) struct WrittenBlocks {
    bits: Vec<u64>,
}

impl WrittenBlocks {
    /// Whether each row of a step is alone, in a cache with so many groups of layers. The step was validated:
    /// no two sequences write one block.
    pub(crate) fn rows_are_alone(&mut self, input: &StepInput, groups: usize) -> bool {
        if input.rows() != input.sequences() {
            return false;
        }
        let mut written = 0;
        for sequence in 0..input.sequences() {
            for block in last_entries(input, sequence, groups) {
                let word = *block as usize / 64;
                if word >= self.bits.len() {
                    self.bits.resize(word + 1, 0);
                }
                self.bits[word] |= 1u64 << (*block % 64);
                written += 1;
            }
        }
        // Each sequence has the blocks that it writes itself; any more are read by others.
        let is_written = |block: &&u32| {
            let word = self.bits.get(**block as usize / 64);
            word.is_some_and(|word| word >> (**block % 64) & 1 == 1)
        };
        let tables = (0..input.sequences()).map(|sequence| entries(input, sequence, groups));
        let known = tables.map(|table| table.iter().filter(is_written).count()).sum::<usize>();
        for sequence in 0..input.sequences() {
            for block in last_entries(input, sequence, groups) {
                self.bits[*block as usize / 64] = 0;
            }
        }
        known == written
    }
}

/// The entries of a sequence's block table, one row long, up to its row's position.
fn entries(input: &StepInput, sequence: usize, groups: usize) -> &[u32] {
    let row = input.rows_of(sequence).start;
    let blocks = input.positions[row] as usize / KV_BLOCK_TOKENS + 1;
    &input.blocks_of(sequence)[..blocks * groups]
}

/// The entries of the block, in each group, that the sequence's row is written to.
fn last_entries(input: &StepInput, sequence: usize, groups: usize) -> &[u32] {
    let table = entries(input, sequence, groups);
    &table[table.len() - groups..]
}

#[cfg(test)]
mod tests {
    use trustformers_plan::{ABSENT_BLOCK, LogitsRows, SequenceStep};

    use super::*;

    /// A step with a sequence of `rows` rows for each block table of so many groups. The first sequence ends
    /// with the last position of its last block, the others with the first one of theirs.
    fn step(tables: &[&[u32]], groups: usize, rows: usize) -> StepInput {
        let (mut input, tokens) = (StepInput::new(), vec![0; rows]);
        for (index, &blocks) in tables.iter().enumerate() {
            let whole = blocks.len() / groups * KV_BLOCK_TOKENS;
            let end = if index == 0 { whole } else { whole + 1 - KV_BLOCK_TOKENS };
            let (cached_tokens, logits) = (end - rows, LogitsRows::Last);
            input.push_sequence(SequenceStep { tokens: &tokens, cached_tokens, blocks, logits });
        }
        input
    }

    #[test]
    fn a_row_is_alone_where_nobody_else_reads_its_block() {
        let mut written = WrittenBlocks::default();
        let mut alone = |tables: &[&[u32]], rows| written.rows_are_alone(&step(tables, 1, rows), 1);
        assert!(alone(&[&[70, 3]], 1));
        assert!(alone(&[&[70, 3], &[70, 4]], 1), "both read block 70, which neither writes");
        assert!(!alone(&[&[70, 3], &[70, 3, 4]], 1), "the second sequence reads block 3");
        assert!(!alone(&[&[70, 3], &[70, 4]], 2), "two rows of a sequence attend to each other");
        assert!(alone(&[&[70, 4], &[3, 5]], 1), "nothing is left of earlier steps");
    }

    #[test]
    fn every_group_of_layers_counts() {
        let mut written = WrittenBlocks::default();
        let mut alone = |second: &[u32]| {
            let tables: [&[u32]; 2] = [&[8, ABSENT_BLOCK, 1, 2], second];
            written.rows_are_alone(&step(&tables, 2, 1), 2)
        };
        assert!(alone(&[8, ABSENT_BLOCK, 5, 6]));
        assert!(!alone(&[2, ABSENT_BLOCK, 5, 6]));
    }
}
