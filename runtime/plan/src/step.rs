//! The input and the output of one step: ragged rows of several sequences, and the rows of the answer.
//!
//! Everything that differs between steps is in [`StepInput`], so that a device backend can copy it into one
//! staging buffer at a fixed address. [`StepInput::validate`] checks it once per step; kernels then rely on
//! every id, position and block number.

use crate::{AdapterSlot, Plan, RowSpace, SampleResult};

/// Tokens in one block of the paged key/value cache.
pub const KV_BLOCK_TOKENS: usize = 16;

/// The token of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// This id.
    Id(u32),
    /// What the latest [`crate::Executable::sample`] chooses for its row with this index. The host does not
    /// know it yet.
    Sampled(u32),
}

impl Token {
    /// The id, where the host knows it.
    #[must_use]
    pub const fn id(self) -> Option<u32> {
        match self {
            Self::Id(id) => Some(id),
            Self::Sampled(_) => None,
        }
    }
}

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
    /// a plan without a cache. Where a plan has several groups of layers ([`mod@crate::kv_layout`]), each
    /// block of tokens has an entry for each; those that no row of the step reaches may be
    /// [`crate::ABSENT_BLOCK`].
    pub blocks: &'a [u32],
    /// Which rows give logits.
    pub logits: LogitsRows,
}

/// One row of a sequence whose token the device chooses, and which gives logits.
#[derive(Debug, Clone, Copy)]
pub struct SampledStep<'a> {
    /// The row of the latest sample that chooses the token.
    pub slot: u32,
    /// Tokens that the cache holds already; also the token's position.
    pub cached_tokens: usize,
    /// Cache blocks, as in [`SequenceStep::blocks`].
    pub blocks: &'a [u32],
}

/// One step's rows; reuse it with [`StepInput::clear`] so that steps do not allocate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepInput {
    /// Token of each row.
    pub tokens: Vec<Token>,
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
    /// The adapter that each sequence chose; its rows are computed with no other.
    pub adapters: Vec<Option<AdapterSlot>>,
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
    /// A token of a row that the latest sample does not have.
    #[error("row {row}: its token is row {slot} of the latest sample, which has {slots}")]
    Slot {
        /// The row.
        row: usize,
        /// The sample's row.
        slot: u32,
        /// Rows of the latest sample.
        slots: usize,
    },
    /// A sample of a row that the step does not have, or of rows that do not rise.
    #[error("a sample has row {row} of logits, which is outside the {rows} of the step or does not rise")]
    SampleRow {
        /// The row of logits.
        row: usize,
        /// Rows of logits of the step.
        rows: usize,
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
    /// An adapter slot that the plan does not have.
    #[error("sequence {sequence}: adapter slot {slot} of a plan with {slots}")]
    Adapter {
        /// Which sequence of the step.
        sequence: usize,
        /// The slot.
        slot: AdapterSlot,
        /// Slots of the plan.
        slots: usize,
    },
    /// An adapter slot that holds no adapter.
    #[error("sequence {sequence}: adapter slot {slot} is empty")]
    EmptySlot {
        /// Which sequence of the step.
        sequence: usize,
        /// The slot.
        slot: AdapterSlot,
    },
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
        let Self { tokens, positions, cu_seqlens, context_lens, blocks, cu_blocks, logits_rows, adapters } =
            self;
        tokens.clear();
        adapters.clear();
        for list in [positions, cu_seqlens, context_lens, blocks, cu_blocks, logits_rows] {
            list.clear();
        }
    }

    /// Adds one sequence's rows. [`Self::validate`] finds wrong content, not this method.
    pub fn push_sequence(&mut self, step: SequenceStep<'_>) {
        let first_row = self.rows();
        self.tokens.extend(step.tokens.iter().copied().map(Token::Id));
        self.end_sequence(step.cached_tokens, first_row, step.blocks);
        let rows = first_row..self.tokens.len();
        match step.logits {
            LogitsRows::None => {}
            LogitsRows::Last => self.logits_rows.extend(rows.last().map(saturating)),
            LogitsRows::All => self.logits_rows.extend(rows.map(saturating)),
        }
    }

    /// Makes the rows of the last sequence from its row `first` on those of a second segment; none where it
    /// has fewer rows. `offset` is what the plan's [`Plan::second_segment`] says.
    pub fn begin_second_segment(&mut self, first: usize, offset: usize) {
        let Some(sequence) = self.sequences().checked_sub(1) else { return };
        let rows = self.rows_of(sequence);
        for position in self.positions[rows].iter_mut().skip(first) {
            *position = position.saturating_add(saturating(offset));
        }
    }

    /// Adds one row of a sequence whose token the latest sample chooses. [`Self::validate`] and
    /// [`Self::resolve`] find wrong content.
    pub fn push_sampled(&mut self, step: SampledStep<'_>) {
        let row = self.rows();
        self.tokens.push(Token::Sampled(step.slot));
        self.end_sequence(step.cached_tokens, row, step.blocks);
        self.logits_rows.push(saturating(row));
    }

    /// Chooses the adapter of the sequence that was added last; without this call it has none.
    pub fn choose_adapter(&mut self, slot: Option<AdapterSlot>) {
        if let Some(last) = self.adapters.last_mut() {
            *last = slot;
        }
    }

    /// Adds the lists of a sequence whose tokens are there, from `first_row` on.
    fn end_sequence(&mut self, cached_tokens: usize, first_row: usize, blocks: &[u32]) {
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
            self.cu_blocks.push(0);
        }
        let rows = self.tokens.len() - first_row;
        self.positions.extend((0..rows).map(|i| saturating(cached_tokens + i)));
        self.cu_seqlens.push(saturating(self.tokens.len()));
        self.context_lens.push(saturating(cached_tokens + rows));
        self.adapters.push(None);
        self.blocks.extend_from_slice(blocks);
        self.cu_blocks.push(saturating(self.blocks.len()));
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

    /// Writes the id of each row: its own, or that of the latest sample, whose choices are `sampled`.
    ///
    /// # Errors
    /// [`StepError::Slot`] for a row that the sample does not have.
    pub fn resolve(&self, sampled: &[u32], ids: &mut Vec<u32>) -> Result<(), StepError> {
        ids.clear();
        for (row, token) in self.tokens.iter().enumerate() {
            ids.push(match *token {
                Token::Id(id) => id,
                Token::Sampled(slot) => {
                    let slots = sampled.len();
                    *sampled.get(slot as usize).ok_or(StepError::Slot { row, slot, slots })?
                }
            });
        }
        Ok(())
    }

    /// Checks everything that kernels rely on, for this plan and a cache of `kv_blocks` blocks, except the
    /// tokens of samples ([`Self::resolve`]).
    ///
    /// # Errors
    /// The first [`StepError`] found.
    pub fn validate(&self, plan: &Plan, kv_blocks: usize) -> Result<(), StepError> {
        self.validate_lists(plan)?;
        let hyper = plan.hyper();
        let ids = self.tokens.iter().enumerate().filter_map(|(row, token)| Some((row, token.id()?)));
        for (row, token) in ids {
            if token as usize >= hyper.vocab {
                return Err(StepError::Token { row, token, vocab: hyper.vocab });
            }
        }
        let cached = plan.uses_cache();
        let mut written = Vec::with_capacity(if cached { self.rows() } else { 0 });
        for sequence in 0..self.sequences() {
            self.validate_sequence(sequence, plan)?;
            self.validate_adapter(sequence, plan)?;
            let (tokens, rows) = (self.context_lens[sequence] as usize, self.rows_of(sequence).len());
            if cached {
                self.validate_blocks(sequence, plan, kv_blocks)?;
                let groups = plan.kv_layout().classes().groups();
                let first = (tokens - rows) / KV_BLOCK_TOKENS * groups;
                let end = tokens.div_ceil(KV_BLOCK_TOKENS) * groups;
                written.extend_from_slice(&self.blocks_of(sequence)[first..end]);
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
            (self.adapters.len() == sequences, "one choice of an adapter per sequence"),
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

    fn validate_sequence(&self, sequence: usize, plan: &Plan) -> Result<(), StepError> {
        let context = plan.hyper().context;
        let (rows, tokens) = (self.rows_of(sequence), self.context_lens[sequence] as usize);
        if tokens > context {
            return Err(StepError::Context { sequence, tokens, context });
        }
        let Some(first) = tokens.checked_sub(rows.len()) else {
            return Err(StepError::Inconsistent("a context shorter than its sequence's rows"));
        };
        // A second segment goes to the sequence's end.
        let mut offset = 0;
        for (i, row) in rows.enumerate() {
            let got = self.positions[row];
            let of_segment = |offset: usize| saturating(first + i + offset);
            offset = plan.second_segment().filter(|second| got == of_segment(*second)).unwrap_or(offset);
            let expected = of_segment(offset);
            if got != expected {
                return Err(StepError::Position { row, got, expected });
            }
        }
        Ok(())
    }

    fn validate_adapter(&self, sequence: usize, plan: &Plan) -> Result<(), StepError> {
        let slots = plan.adapters().slots;
        match self.adapters[sequence] {
            Some(slot) if slot.index() >= slots => Err(StepError::Adapter { sequence, slot, slots }),
            _ => Ok(()),
        }
    }

    /// The sequence was validated, so that its context is not shorter than its rows.
    fn validate_blocks(&self, sequence: usize, plan: &Plan, kv_blocks: usize) -> Result<(), StepError> {
        let tokens = self.context_lens[sequence] as usize;
        let (table, classes) = (self.blocks_of(sequence), plan.kv_layout().classes());
        let entries = table.chunks_exact(classes.groups());
        if !entries.remainder().is_empty() {
            return Err(StepError::Inconsistent("a block table has an entry for each group of layers"));
        }
        if entries.len() * KV_BLOCK_TOKENS < tokens {
            return Err(StepError::Blocks { sequence, blocks: entries.len(), tokens });
        }
        // Entries before the window of the first row are not read.
        let first = classes.first_windowed_block(tokens - self.rows_of(sequence).len());
        let read = entries.enumerate().flat_map(|(index, entry)| {
            let groups = if index < first { classes.full_groups() } else { classes.groups() };
            &entry[..groups]
        });
        match read.copied().find(|block| *block as usize >= kv_blocks) {
            Some(block) => Err(StepError::BlockId { sequence, block, kv_blocks }),
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
    /// The choices of a step that was sampled, in the order of the [`crate::SampleInput`].
    pub choices: Vec<SampleResult>,
    /// Row after row, each `width` long: logits in the order of [`StepInput::logits_rows`], or one row per
    /// sequence. None of a step that was sampled: its logits stay on the device.
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
