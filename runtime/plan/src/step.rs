//! The input and the output of one step: ragged rows of several sequences, and the rows of the answer.
//!
//! Everything that differs between steps is in [`StepInput`], so that a device backend can copy it into one
//! staging buffer at a fixed address. [`StepInput::validate`] checks it once per step; kernels then rely on
//! every id, position and block number.

use crate::{Plan, RowSpace};

/// Tokens in one block of the paged key/value cache.
pub const KV_BLOCK_TOKENS: usize = 16;

/// Which of a sequence's rows give logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsRows {
    /// None, as for a chunk of a prompt that is not its last.
    None,
    /// The last row.
    Last,
    /// All rows, to score a text or to verify draft tokens.
    All,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy)]
pub struct SequenceStep<'a> {
    /// Tokens to compute, at least one.
    pub tokens: &'a [u32],
    /// Tokens that the cache holds already; also the first token's position.
    pub cached_tokens: usize,
    /// Cache blocks, in order of position; they hold `cached_tokens + tokens.len()` tokens or more. None for
    /// a plan without a cache.
    pub blocks: &'a [u32],
    /// Which rows give logits.
    pub logits: LogitsRows,
}

/// One step's rows; reuse it with [`StepInput::clear`] so that steps do not allocate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepInput {
    /// Token id of each row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Rows of sequence `s` are `cu_seqlens[s]..cu_seqlens[s + 1]`; starts with 0 unless the step is empty.
    pub cu_seqlens: Vec<u32>,
    /// Tokens of each sequence in the cache after this step.
    pub context_lens: Vec<u32>,
    /// Block tables, one after the other.
    pub blocks: Vec<u32>,
    /// Blocks of sequence `s` are `blocks[cu_blocks[s]..cu_blocks[s + 1]]`.
    pub cu_blocks: Vec<u32>,
    /// Rows whose logits are requested, ascending.
    pub logits_rows: Vec<u32>,
}

/// Why a step was refused; nothing was computed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StepError {
    /// The step has no row.
    #[error("the step is empty: push at least one sequence")]
    Empty,
    /// The step is larger than the plan's limits.
    #[error("the step has {got} {what}, the plan was made for at most {max}")]
    TooMany {
        /// Rows, sequences or logits rows.
        what: &'static str,
        /// How many were given.
        got: usize,
        /// The plan's limit.
        max: usize,
    },
    /// The lists describe different rows or sequences.
    #[error("the step's lists disagree: {0}")]
    Inconsistent(&'static str),
    /// A token id outside the vocabulary.
    #[error("row {row}: token {token} is outside the vocabulary of {vocab}")]
    Token {
        /// The row.
        row: usize,
        /// Its token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A sequence is longer than the model's context.
    #[error("sequence {sequence}: {tokens} tokens exceed the context of {context}")]
    Context {
        /// Which sequence of the step.
        sequence: usize,
        /// Its tokens after the step.
        tokens: usize,
        /// The plan's context.
        context: usize,
    },
    /// A sequence's positions are not the last ones of its context.
    #[error("row {row}: position {got}, expected {expected}")]
    Position {
        /// The row.
        row: usize,
        /// Its position.
        got: u32,
        /// Where a causal sequence is at that row.
        expected: u32,
    },
    /// A sequence has fewer blocks than tokens.
    #[error("sequence {sequence}: {blocks} blocks of {KV_BLOCK_TOKENS} tokens cannot hold {tokens} tokens")]
    Blocks {
        /// Which sequence of the step.
        sequence: usize,
        /// Blocks given.
        blocks: usize,
        /// Tokens after the step.
        tokens: usize,
    },
    /// A block outside the cache.
    #[error("sequence {sequence}: block {block} is outside the cache of {kv_blocks}")]
    BlockId {
        /// Which sequence of the step.
        sequence: usize,
        /// The block.
        block: u32,
        /// Blocks in the cache.
        kv_blocks: usize,
    },
    /// Cached tokens, though the plan has no cache.
    #[error(
        "sequence {sequence}: {cached} cached tokens were given, but the plan has no cache: compute the whole sequence in one step"
    )]
    Uncached {
        /// Which sequence of the step.
        sequence: usize,
        /// Cached tokens given.
        cached: usize,
    },
    /// Rows of logits were requested from a plan that answers by sequence.
    #[error("{0} rows of logits were requested, but the plan answers one row per sequence: request none")]
    NoLogits(usize),
    /// Two sequences of the step would write to one block.
    #[error("block {0} would be written twice: only full blocks may be shared")]
    SharedWrite(u32),
    /// A row of logits that does not exist or is not in ascending order.
    #[error("logits row {0} is outside the step or out of order")]
    LogitsRow(u32),
}

impl StepInput {
    /// No rows.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes all rows and keeps the memory.
    pub fn clear(&mut self) {
        let Self { tokens, positions, cu_seqlens, context_lens, blocks, cu_blocks, logits_rows } = self;
        for list in [tokens, positions, cu_seqlens, context_lens, blocks, cu_blocks, logits_rows] {
            list.clear();
        }
    }

    /// Adds one sequence's rows. [`Self::validate`] finds wrong content, not this method.
    pub fn push_sequence(&mut self, step: SequenceStep<'_>) {
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
            self.cu_blocks.push(0);
        }
        let first_row = self.tokens.len();
        self.tokens.extend_from_slice(step.tokens);
        self.positions.extend((0..step.tokens.len()).map(|i| saturating(step.cached_tokens + i)));
        self.cu_seqlens.push(saturating(self.tokens.len()));
        self.context_lens.push(saturating(step.cached_tokens + step.tokens.len()));
        self.blocks.extend_from_slice(step.blocks);
        self.cu_blocks.push(saturating(self.blocks.len()));
        let rows = first_row..self.tokens.len();
        match step.logits {
            LogitsRows::None => {}
            LogitsRows::Last => self.logits_rows.extend(rows.last().map(saturating)),
            LogitsRows::All => self.logits_rows.extend(rows.map(saturating)),
        }
    }

    /// Rows of the step.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Sequences of the step.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.context_lens.len()
    }

    /// Rows of one sequence.
    #[must_use]
    pub fn rows_of(&self, sequence: usize) -> std::ops::Range<usize> {
        self.cu_seqlens[sequence] as usize..self.cu_seqlens[sequence + 1] as usize
    }

    /// The step's row of which row `index` of a buffer with these rows is a result; of a sequence the first.
    #[must_use]
    pub fn token_row(&self, rows: RowSpace, index: usize) -> usize {
        match rows {
            RowSpace::Tokens => index,
            RowSpace::Logits => self.logits_rows[index] as usize,
            RowSpace::Sequences => self.cu_seqlens[index] as usize,
        }
    }

    /// The rows of one sequence in a buffer with these rows.
    #[must_use]
    pub fn rows_within(&self, rows: RowSpace, sequence: usize) -> std::ops::Range<usize> {
        let own = self.rows_of(sequence);
        match rows {
            RowSpace::Tokens => own,
            RowSpace::Logits => {
                let before = |row: usize| self.logits_rows.partition_point(|&other| (other as usize) < row);
                before(own.start)..before(own.end)
            }
            RowSpace::Sequences => sequence..sequence + 1,
        }
    }

    /// The sequence of one of the step's rows.
    #[must_use]
    pub fn sequence_of(&self, row: usize) -> usize {
        self.cu_seqlens.partition_point(|&first| first as usize <= row).saturating_sub(1)
    }

    /// Block table of one sequence.
    #[must_use]
    pub fn blocks_of(&self, sequence: usize) -> &[u32] {
        &self.blocks[self.cu_blocks[sequence] as usize..self.cu_blocks[sequence + 1] as usize]
    }

    /// Checks everything that kernels rely on, for this plan and a cache of `kv_blocks` blocks.
    ///
    /// # Errors
    /// The first [`StepError`] found.
    pub fn validate(&self, plan: &Plan, kv_blocks: usize) -> Result<(), StepError> {
        self.validate_lists(plan)?;
        let hyper = plan.hyper();
        for (row, &token) in self.tokens.iter().enumerate() {
            if token as usize >= hyper.vocab {
                return Err(StepError::Token { row, token, vocab: hyper.vocab });
            }
        }
        let cached = plan.uses_cache();
        let mut written = Vec::with_capacity(if cached { self.rows() } else { 0 });
        for sequence in 0..self.sequences() {
            self.validate_sequence(sequence, hyper.context)?;
            let (tokens, rows) = (self.context_lens[sequence] as usize, self.rows_of(sequence).len());
            if cached {
                self.validate_blocks(sequence, kv_blocks)?;
                let range = (tokens - rows) / KV_BLOCK_TOKENS..tokens.div_ceil(KV_BLOCK_TOKENS);
                written.extend_from_slice(&self.blocks_of(sequence)[range]);
            } else if tokens > rows {
                return Err(StepError::Uncached { sequence, cached: tokens - rows });
            }
        }
        written.sort_unstable();
        if let Some(pair) = written.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(StepError::SharedWrite(pair[0]));
        }
        if plan.answer().rows == RowSpace::Sequences && !self.logits_rows.is_empty() {
            return Err(StepError::NoLogits(self.logits_rows.len()));
        }
        let ascending = self.logits_rows.windows(2).find(|pair| pair[0] >= pair[1]).map(|pair| pair[1]);
        let outside = self.logits_rows.last().filter(|&&row| row as usize >= self.rows()).copied();
        ascending.or(outside).map_or(Ok(()), |row| Err(StepError::LogitsRow(row)))
    }

    fn validate_lists(&self, plan: &Plan) -> Result<(), StepError> {
        let limits = plan.limits();
        if self.tokens.is_empty() {
            return Err(StepError::Empty);
        }
        let counts = [
            ("rows", self.rows(), limits.rows),
            ("sequences", self.sequences(), limits.sequences),
            ("rows of logits", self.logits_rows.len(), limits.logits_rows),
        ];
        if let Some((what, got, max)) = counts.into_iter().find(|(_, got, max)| got > max) {
            return Err(StepError::TooMany { what, got, max });
        }
        let sequences = self.sequences();
        let checks = [
            (self.positions.len() == self.rows(), "one position per token"),
            (
                offsets_are_valid(&self.cu_seqlens, sequences, self.rows(), 1),
                "cu_seqlens must rise from 0 to the rows",
            ),
            (
                offsets_are_valid(&self.cu_blocks, sequences, self.blocks.len(), 0),
                "cu_blocks must rise from 0 to the blocks",
            ),
        ];
        checks.into_iter().find(|(ok, _)| !ok).map_or(Ok(()), |(_, what)| Err(StepError::Inconsistent(what)))
    }

    fn validate_sequence(&self, sequence: usize, context: usize) -> Result<(), StepError> {
        let (rows, tokens) = (self.rows_of(sequence), self.context_lens[sequence] as usize);
        if tokens > context {
            return Err(StepError::Context { sequence, tokens, context });
        }
        let Some(first) = tokens.checked_sub(rows.len()) else {
            return Err(StepError::Inconsistent("a context shorter than its sequence's rows"));
        };
        for (i, row) in rows.enumerate() {
            let (got, expected) = (self.positions[row], saturating(first + i));
            if got != expected {
                return Err(StepError::Position { row, got, expected });
            }
        }
        Ok(())
    }

    fn validate_blocks(&self, sequence: usize, kv_blocks: usize) -> Result<(), StepError> {
        let tokens = self.context_lens[sequence] as usize;
        let blocks = self.blocks_of(sequence);
        if blocks.len() * KV_BLOCK_TOKENS < tokens {
            return Err(StepError::Blocks { sequence, blocks: blocks.len(), tokens });
        }
        match blocks.iter().find(|&&block| block as usize >= kv_blocks) {
            Some(&block) => Err(StepError::BlockId { sequence, block, kv_blocks }),
            None => Ok(()),
        }
    }
}

/// Numbers past `u32` become `u32::MAX`, which validation refuses (no plan has that many rows, tokens or
/// blocks).
fn saturating(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn offsets_are_valid(offsets: &[u32], ranges: usize, total: usize, min_step: u32) -> bool {
    offsets.len() == ranges + 1
        && offsets[0] == 0
        && offsets[ranges] as usize == total
        && offsets.windows(2).all(|w| w[1].checked_sub(w[0]).is_some_and(|step| step >= min_step))
}

/// The answer of one step; reuse it so that steps do not allocate.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// Row after row, each `width` long: logits in the order of [`StepInput::logits_rows`], or one row per
    /// sequence.
    pub values: Vec<f32>,
    /// Values per row.
    pub width: usize,
}

impl StepOutput {
    /// No rows.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// No rows, and room for the largest answer of a plan. All its pages are written now, so that steps
    /// neither allocate nor touch new memory.
    #[must_use]
    pub fn with_room_for(plan: &Plan) -> Self {
        // The system would map pages of zeros only when they are written.
        let mut values = vec![f32::NAN; plan.answer_len()];
        values.clear();
        Self { values, width: 0 }
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }

    /// The logits of row `i` of [`StepInput::logits_rows`], or the row of sequence `i`.
    ///
    /// # Panics
    /// When `i` is not below [`Self::rows`].
    #[must_use]
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.width..(i + 1) * self.width]
    }
}
