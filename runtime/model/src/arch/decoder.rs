//! What Llama and similar decoders share: RMS norms, rotary positions, grouped-query attention, a gated
//! feed-forward and a vocabulary head that may be tied to the embedding. [`Family`] holds the differences
//! between families, `blocks` finds the tensors of a block and lowers it.

mod blocks;

use super::keys::ArchKeys;
use super::rope::{PlainRotation, Rotation};
use super::tensors::TensorFinder;
use super::{ArchSizes, Architecture, TextHead};
use crate::gguf::GgufProblem;
use crate::model::PlanRequest;
use blocks::{Block, BlockRows, Blocks};
use trustformers_plan::{
    Experts, Hyper, Plan, PlanBuilder, PlanError, Pooling, RopeLayout, Scores, Value, WeightId, Weights,
};

/// The base of rotary frequencies where a file has no key for it, as in the first Llama.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

/// Added to the mean of squares of every norm.
const EPSILON: &str = "attention.layer_norm_rms_epsilon";

/// The table of token embeddings; also the vocabulary head where the head is tied.
pub(super) const EMBEDDING: &str = "token_embd.weight";

/// The vocabulary head where it is not tied.
pub(super) const HEAD: &str = "output.weight";

/// Multiplies the products of queries and keys, in place of `1/sqrt(head_dim)`.
pub(super) const ATTENTION_SCALE: &str = "attention.scale";
/// Divides the logits.
pub(super) const LOGIT_DIVISOR: &str = "logit_scale";
/// Multiplies the rows of the embedding.
pub(super) const EMBEDDING_SCALE: &str = "embedding_scale";
/// Multiplies what a block's parts add to the stream.
pub(super) const RESIDUAL_SCALE: &str = "residual_scale";
/// Soft cap of the scores of an attention.
pub(super) const SCORE_CAP: &str = "attn_logit_softcapping";
/// Soft cap of the logits.
pub(super) const LOGIT_CAP: &str = "final_logit_softcapping";
/// Positions that a row of a windowed layer attends to, its own included.
pub(super) const WINDOW: &str = "attention.sliding_window";
/// Experts of a feed-forward part, and how many of them each row uses.
pub(super) const EXPERTS: &str = "expert_count";
pub(super) const EXPERTS_USED: &str = "expert_used_count";

/// How the rows of a text become one, in a file that is made for embeddings.
const POOLING: &str = "pooling_type";
/// Its number in a file that is made for ranking.
const RANK: usize = 4;
/// The names of what such a file gives.
const RANK_LABELS: &str = "classifier.output_labels";

/// Where a family of models differs from the others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// How the elements of a head are paired, given how GGUF files store queries and keys. Checkpoints store
    /// them as they were trained: [`RopeLayout::Neox`].
    pub(super) rope: RopeLayout,
    /// The only `tensor_data_layout` that a file may name.
    pub(super) data_layout: Option<&'static str>,
    /// Whether queries, keys and values have biases.
    pub(super) qkv_bias: bool,
    /// Which norm queries and keys have.
    pub(super) qk_norm: QkNorm,
    /// Where a block has norms.
    pub(super) norms: BlockNorms,
    /// What gates the feed-forward part.
    pub(super) gate: Gate,
    /// Whether gate and up projection are the halves of one tensor.
    pub(super) joined_gate: bool,
    /// Whether the rows of the embedding are multiplied by the root of the width.
    pub(super) scales_embedding: bool,
    /// Whether checkpoints store the weights of norms less one.
    pub(super) norms_less_one: bool,
    /// Keys with an effect that the family has.
    pub(super) honoured: &'static [&'static str],
    /// What multiplies the products of queries and keys where no key says it.
    pub(super) score_scale: fn(&Hyper) -> f32,
    /// Which layers have a window, and which rotate.
    pub(super) layers: fn(&ArchKeys<'_>) -> Result<LayerKinds, GgufProblem>,
}

impl Family {
    /// A family without any of the others' differences.
    pub(super) const PLAIN: Self = Self {
        rope: RopeLayout::Neox,
        data_layout: None,
        qkv_bias: false,
        qk_norm: QkNorm::None,
        norms: BlockNorms::Pre,
        gate: Gate::Silu,
        joined_gate: false,
        scales_embedding: false,
        norms_less_one: false,
        honoured: &[],
        score_scale: |hyper| 1.0 / (hyper.head_dim as f32).sqrt(),
        layers: |_| Ok(LayerKinds::ALIKE),
    };
}

/// Norms of queries and keys, before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QkNorm {
    None,
    /// Each head by itself.
    Heads,
    /// The whole row.
    Rows,
}

/// Where the norms of a block's two parts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockNorms {
    /// Of what a part reads.
    Pre,
    /// Of what a part adds.
    Post,
    Both,
}

/// The function of a feed-forward's gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    Silu,
    /// GELU by the hyperbolic tangent.
    Gelu,
}

/// Which layers of a model do something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LayerPattern {
    All,
    None,
    /// All but every `n`-th, counted from 1.
    ExceptEvery(usize),
    Listed(Vec<bool>),
}

impl LayerPattern {
    fn has(&self, layer: usize) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::ExceptEvery(n) => !(layer + 1).is_multiple_of(*n),
            Self::Listed(layers) => layers.get(layer).copied().unwrap_or(false),
        }
    }
}

/// What the attention of a model's layers differs in.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LayerKinds {
    /// Positions that a row of a windowed layer attends to.
    pub(super) window: Option<usize>,
    pub(super) windowed: LayerPattern,
    pub(super) rotated: LayerPattern,
    /// The base of the frequencies of windowed layers, where it is not that of the others. Their rotation is
    /// not scaled.
    pub(super) window_base: Option<f32>,
}

impl LayerKinds {
    /// All layers attend to all positions and rotate alike.
    pub(super) const ALIKE: Self =
        Self { window: None, windowed: LayerPattern::None, rotated: LayerPattern::All, window_base: None };

    /// Layers with a window, where the file names its size.
    pub(super) fn windowed(keys: &ArchKeys<'_>, windowed: LayerPattern) -> Result<Self, GgufProblem> {
        Ok(Self { window: keys.optional_count(WINDOW)?, windowed, ..Self::ALIKE })
    }

    fn window_of(&self, layer: usize) -> Option<usize> {
        self.window.filter(|_| self.windowed.has(layer))
    }
}

/// The factors and bounds of a family that has them; neutral in others.
#[derive(Debug, Clone, Copy)]
struct Factors {
    embedding: f32,
    residual: f32,
    scores: f32,
    logits: f32,
    score_cap: Option<f32>,
    logit_cap: Option<f32>,
}

/// A checked model.
#[derive(Debug)]
struct Decoder {
    hyper: Hyper,
    eps: f32,
    gate: Gate,
    factors: Factors,
    kinds: LayerKinds,
    rotation: Rotation,
    window_rotation: Rotation,
    embedding: WeightId,
    blocks: Vec<Block>,
    output_norm: WeightId,
    /// The embedding itself where the head is tied.
    output: WeightId,
    /// Set where it reads whole texts; it has no logits then.
    reads: Option<TextHead>,
}

/// Reads sizes and tensors from a file of this family.
pub(super) fn resolve(
    family: &Family,
    keys: &ArchKeys<'_>,
    tensors: &mut TensorFinder<'_>,
) -> Result<Box<dyn Architecture>, GgufProblem> {
    let honoured: Vec<&str> = family.honoured.iter().copied().chain([POOLING]).collect();
    keys.refuse_effects(&honoured)?;
    keys.only_text("tensor_data_layout", family.data_layout)?;
    let hyper = hyper(keys, tensors)?;
    let feed_forward = keys.size("feed_forward_length")?;
    let experts = experts(family, keys, feed_forward)?;
    let eps = keys.float(EPSILON)?;
    if eps < 0.0 {
        return Err(keys.invalid(EPSILON, format!("{eps} is negative")));
    }
    let Hyper { width, vocab, .. } = hyper;
    let embedding = tensors.matrix(EMBEDDING, vocab, width)?;
    let less_one = family.norms_less_one && keys.config().is_some();
    let mut finder = Blocks { family, hyper, feed_forward, experts, less_one, tensors: &mut *tensors };
    // Blocks are pushed one by one, so a missing tensor stops a wrong count before it costs memory.
    let mut blocks = Vec::new();
    for index in 0..hyper.layers {
        blocks.push(finder.find(index)?);
    }
    let output_norm = finder.norm("output_norm.weight", width)?;
    let output = tensors.optional_matrix(HEAD, vocab, width)?.unwrap_or(embedding);
    let kinds = kinds(family, keys, hyper.layers)?;
    let factors = factors(family, keys, &hyper)?;
    let plain = plain_rotation(family, keys, &hyper)?;
    let window_base = kinds.window_base;
    let rotation = Rotation::read(plain, keys, tensors)?;
    let window_rotation =
        window_base.map_or(rotation, |base| Rotation::plain(PlainRotation { base, ..plain }));
    let gate = family.gate;
    let mut decoder = Decoder {
        hyper,
        eps,
        gate,
        factors,
        kinds,
        rotation,
        window_rotation,
        embedding,
        blocks,
        output_norm,
        output,
        reads: None,
    };
    if let Some(head) = pooling(keys)? {
        decoder.read_texts(head).map_err(|why| keys.invalid(POOLING, why.to_owned()))?;
    }
    Ok(Box::new(decoder))
}

/// The head of a file that is made for embeddings, by the numbers of llama.cpp, which divides vectors by
/// their length, or for ranking. The projection and the labels of the latter are read where the file is
/// (`reading/file.rs`).
fn pooling(keys: &ArchKeys<'_>) -> Result<Option<TextHead>, GgufProblem> {
    let pooling = match keys.optional_count(POOLING)? {
        None => return Ok(None),
        Some(1) => Pooling::Mean,
        Some(2) => Pooling::Cls,
        Some(3) => Pooling::Last,
        Some(RANK) => {
            keys.read_elsewhere(RANK_LABELS);
            return Ok(Some(TextHead { pooling: Pooling::Last, normalise: false }));
        }
        Some(other) => {
            let why = format!("{other} is not supported; 0 (none), 1 (mean), 2 (first) and 3 (last) are");
            return Err(keys.invalid(POOLING, why));
        }
    };
    Ok(Some(TextHead { pooling, normalise: true }))
}

/// The experts of each block, where the family may have them and the file does.
fn experts(
    family: &Family,
    keys: &ArchKeys<'_>,
    feed_forward: usize,
) -> Result<Option<Experts>, GgufProblem> {
    if !family.honoured.contains(&EXPERTS) {
        return Ok(None);
    }
    let hidden = keys.optional_count("expert_feed_forward_length")?.unwrap_or(feed_forward);
    let (count, used) = (keys.optional_count(EXPERTS)?, keys.optional_count(EXPERTS_USED)?);
    match (count, used) {
        (None, _) => Ok(None),
        (Some(count), Some(used)) if used <= count => Ok(Some(Experts { count, used, hidden })),
        (Some(count), _) => {
            let why = format!("a number from 1 to the {count} of {} is needed", keys.name(EXPERTS));
            Err(keys.invalid(EXPERTS_USED, why))
        }
    }
}

/// The kinds of the layers, by the family, or as the configuration of a checkpoint lists them.
fn kinds(family: &Family, keys: &ArchKeys<'_>, layers: usize) -> Result<LayerKinds, GgufProblem> {
    let mut kinds = (family.layers)(keys)?;
    let Some(config) = keys.config() else { return Ok(kinds) };
    let lists = [(&config.windowed, &mut kinds.windowed), (&config.rotated, &mut kinds.rotated)];
    for (listed, pattern) in lists {
        let Some(listed) = listed else { continue };
        if listed.len() != layers {
            let why = format!("{layers} layers, but a list of layers has {}", listed.len());
            return Err(keys.invalid("block_count", why));
        }
        *pattern = LayerPattern::Listed(listed.clone());
    }
    Ok(kinds)
}

fn factors(family: &Family, keys: &ArchKeys<'_>, hyper: &Hyper) -> Result<Factors, GgufProblem> {
    // A number that is 0 is not set. Keys that the family does not honour were checked to have no effect.
    let number = |key: &'static str| -> Result<Option<f32>, GgufProblem> {
        if !family.honoured.contains(&key) {
            return Ok(None);
        }
        match keys.optional_float(key)?.filter(|value| *value != 0.0) {
            Some(value) if value < 0.0 => Err(keys.invalid(key, format!("{value} is negative"))),
            value => Ok(value),
        }
    };
    let own = if family.scales_embedding { (hyper.width as f32).sqrt() } else { 1.0 };
    Ok(Factors {
        embedding: number(EMBEDDING_SCALE)?.unwrap_or(own),
        residual: number(RESIDUAL_SCALE)?.unwrap_or(1.0),
        scores: number(ATTENTION_SCALE)?.unwrap_or_else(|| (family.score_scale)(hyper)),
        logits: 1.0 / number(LOGIT_DIVISOR)?.unwrap_or(1.0),
        score_cap: number(SCORE_CAP)?,
        logit_cap: number(LOGIT_CAP)?,
    })
}

pub(super) fn hyper(keys: &ArchKeys<'_>, tensors: &TensorFinder<'_>) -> Result<Hyper, GgufProblem> {
    let width = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(heads);
    if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
        let whole = keys.name("attention.head_count");
        let why = format!("{kv_heads} does not divide the {heads} of {whole}");
        return Err(keys.invalid("attention.head_count_kv", why));
    }
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(len) => len,
        None if width.is_multiple_of(heads) => width / heads,
        None => {
            let why = format!("{heads} does not divide the {width} of {}", keys.name("embedding_length"));
            return Err(keys.invalid("attention.head_count", why));
        }
    };
    if let Some(len) = keys.optional_size("attention.value_length")?.filter(|len| *len != head_dim) {
        let why = format!("{len} differs from the key length {head_dim}, which is not supported");
        return Err(keys.invalid("attention.value_length", why));
    }
    let vocab = tensors.rows_of(EMBEDDING).unwrap_or(0);
    let stored = tensors.stored_rows_of(EMBEDDING).unwrap_or(0);
    if let Some(claimed) = keys.optional_size("vocab_size")?.filter(|claimed| *claimed != stored) {
        let why = format!("{claimed} differs from the {stored} rows of tensor {EMBEDDING}");
        return Err(keys.invalid("vocab_size", why));
    }
    Ok(Hyper {
        width,
        layers: keys.size("block_count")?,
        heads,
        kv_heads,
        head_dim,
        vocab,
        context: keys.size("context_length")?,
    })
}

fn plain_rotation(family: &Family, keys: &ArchKeys<'_>, hyper: &Hyper) -> Result<PlainRotation, GgufProblem> {
    let base = keys.optional_float("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE);
    if base <= 0.0 {
        return Err(keys.invalid("rope.freq_base", format!("{base} is not above 0")));
    }
    let dims = keys.optional_size("rope.dimension_count")?.unwrap_or(hyper.head_dim);
    if dims > hyper.head_dim || !dims.is_multiple_of(2) {
        let why = format!("{dims} is odd or more than the {} elements of a head", hyper.head_dim);
        return Err(keys.invalid("rope.dimension_count", why));
    }
    let layout = if keys.config().is_some() { RopeLayout::Neox } else { family.rope };
    Ok(PlainRotation { layout, base, dims, head_dim: hyper.head_dim })
}

impl Architecture for Decoder {
    fn sizes(&self) -> ArchSizes {
        ArchSizes::from(&self.hyper)
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let stream = plan.embed(self.embedding);
        let mut stream = scaled(&mut plan, stream, self.factors.embedding);
        for (index, block) in self.blocks.iter().enumerate() {
            let input = self.norm(&mut plan, stream, block.attention.before);
            // Every row's keys and values are cached. After that all ops work row by row, so of the last
            // layer only the rows that need logits are computed. Without a cache all rows are.
            let is_last = index + 1 == self.blocks.len() && self.reads.is_none();
            let asking = if is_last {
                stream = plan.gather_rows(stream);
                self.norm(&mut plan, stream, block.attention.before)
            } else {
                input
            };
            let attended = self.attention(&mut plan, BlockRows { index, input, asking }, block);
            stream = self.add_part(&mut plan, stream, attended, block.attention.after);
            let fed = self.feed_forward(&mut plan, stream, block);
            stream = self.add_part(&mut plan, stream, fed, block.feed_forward.after);
        }
        let last = plan.rms_norm(stream, self.output_norm, self.eps);
        if let Some(TextHead { pooling, normalise }) = self.reads {
            plan.pool(last, pooling, normalise);
            return plan.finish(&request.fused);
        }
        let last = scaled(&mut plan, last, self.factors.logits);
        plan.capped_logits(last, self.output, self.factors.logit_cap);
        plan.finish(&request.fused)
    }

    fn read_texts(&mut self, head: TextHead) -> Result<(), &'static str> {
        if self.kinds.window.is_some() || self.factors.score_cap.is_some() {
            return Err("models with windows or soft caps only generate text in this version");
        }
        self.reads = Some(head);
        Ok(())
    }

    fn text_head(&self) -> Option<TextHead> {
        self.reads
    }
}

/// `value * factor`, without an op where the factor is 1.
fn scaled(plan: &mut PlanBuilder<'_>, value: Value, factor: f32) -> Value {
    if factor == 1.0 { value } else { plan.scale(value, factor) }
}

impl Decoder {
    /// How the scores of a layer are computed.
    fn scores(&self, layer: usize) -> Scores {
        let Factors { scores: scale, score_cap: soft_cap, .. } = self.factors;
        Scores { scale, soft_cap, window: self.kinds.window_of(layer) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_say_which_layers() {
        let layers = |pattern: LayerPattern| (0..7).map(|layer| pattern.has(layer)).collect::<Vec<_>>();
        assert_eq!(layers(LayerPattern::ExceptEvery(2)), [true, false, true, false, true, false, true]);
        assert_eq!(layers(LayerPattern::ExceptEvery(6)), [true, true, true, true, true, false, true]);
        assert_eq!(layers(LayerPattern::Listed(vec![false, true]))[..3], [false, true, false]);
        let kinds =
            LayerKinds { window: Some(8), windowed: LayerPattern::ExceptEvery(2), ..LayerKinds::ALIKE };
        assert_eq!([0, 1].map(|layer| kinds.window_of(layer)), [Some(8), None]);
        assert_eq!(LayerKinds::ALIKE.window_of(0), None);
    }
}
