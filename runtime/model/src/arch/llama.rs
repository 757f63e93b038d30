//! Llama and everything built like it: RMS norms, rotary positions, grouped-query attention, a SwiGLU feed-forward
//! and a vocabulary head that may be tied to the embedding.

use super::tensors::TensorFinder;
use super::{ArchSizes, Architecture};
use crate::gguf::{GgufProblem, Metadata};
use crate::model::PlanRequest;
use trustformers_plan::{
    Hyper, Plan, PlanBuilder, PlanError, RopeLayout, RopeSpec, Value, WeightId, Weights,
};

/// The base of rotary frequencies where a file does not say, as in the first Llama.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

/// A checked Llama.
#[derive(Debug)]
struct Llama {
    hyper: Hyper,
    eps: f32,
    rope: RopeSpec,
    embedding: WeightId,
    layers: Vec<Layer>,
    output_norm: WeightId,
    /// The embedding itself where the head is tied.
    output: WeightId,
}

#[derive(Debug)]
struct Layer {
    attention_norm: WeightId,
    query: WeightId,
    key: WeightId,
    value: WeightId,
    attention_output: WeightId,
    feed_forward_norm: WeightId,
    gate: WeightId,
    up: WeightId,
    down: WeightId,
}

/// Reads sizes and tensors from a file that says it is a Llama.
pub(super) fn resolve(
    meta: &Metadata,
    tensors: &mut TensorFinder<'_>,
) -> Result<Box<dyn Architecture>, GgufProblem> {
    refuse_unknown_behaviour(meta)?;
    let hyper = hyper(meta, tensors)?;
    let feed_forward = meta.size("llama.feed_forward_length")?;
    let eps = meta.float("llama.attention.layer_norm_rms_epsilon")?;
    if eps < 0.0 {
        return Err(bad("llama.attention.layer_norm_rms_epsilon", format!("{eps} is negative")));
    }
    let Hyper { width, vocab, .. } = hyper;
    let embedding = tensors.matrix("token_embd.weight", vocab, width)?;
    // Layers are pushed one by one, so a claimed count is met by a missing tensor before it costs memory.
    let mut layers = Vec::new();
    for index in 0..hyper.layers {
        layers.push(layer(index, &hyper, feed_forward, tensors)?);
    }
    let output_norm = tensors.vector("output_norm.weight", width)?;
    let output = tensors.optional_matrix("output.weight", vocab, width)?.unwrap_or(embedding);
    Ok(Box::new(Llama { hyper, eps, rope: rope(meta, &hyper)?, embedding, layers, output_norm, output }))
}

fn bad(key: &str, why: String) -> GgufProblem {
    GgufProblem::BadValue { key: key.to_owned(), why }
}

/// Keys that change what the model computes in ways that are not built here.
fn refuse_unknown_behaviour(meta: &Metadata) -> Result<(), GgufProblem> {
    if let Some(kind) = meta.opt_string("llama.rope.scaling.type")?.filter(|kind| *kind != "none") {
        return Err(bad("llama.rope.scaling.type", format!("{kind:?} is not supported; only \"none\" is")));
    }
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        if let Some(factor) = meta.opt_float(key)?.filter(|factor| *factor != 1.0 && *factor != 0.0) {
            return Err(bad(key, format!("{factor} is not supported; only 1 is")));
        }
    }
    for key in ["llama.expert_count", "llama.attention.sliding_window"] {
        if let Some(count) = meta.opt_unsigned(key)?.filter(|count| *count != 0) {
            return Err(bad(key, format!("{count} is not supported; only 0 is")));
        }
    }
    Ok(())
}

fn hyper(meta: &Metadata, tensors: &TensorFinder<'_>) -> Result<Hyper, GgufProblem> {
    let width = meta.size("llama.embedding_length")?;
    let heads = meta.size("llama.attention.head_count")?;
    let kv_heads = optional_size(meta, "llama.attention.head_count_kv")?.unwrap_or(heads);
    if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
        let why = format!("{kv_heads} does not divide the {heads} of llama.attention.head_count");
        return Err(bad("llama.attention.head_count_kv", why));
    }
    let head_dim = match optional_size(meta, "llama.attention.key_length")? {
        Some(len) => len,
        None if width.is_multiple_of(heads) => width / heads,
        None => {
            let why = format!("{heads} does not divide the {width} of llama.embedding_length");
            return Err(bad("llama.attention.head_count", why));
        }
    };
    if let Some(len) = optional_size(meta, "llama.attention.value_length")?.filter(|len| *len != head_dim) {
        let why = format!("{len} differs from the key length {head_dim}, which is not supported");
        return Err(bad("llama.attention.value_length", why));
    }
    let vocab = tensors.rows_of("token_embd.weight").unwrap_or(0);
    if let Some(said) = optional_size(meta, "llama.vocab_size")?.filter(|said| *said != vocab) {
        let why = format!("{said} differs from the {vocab} rows of tensor token_embd.weight");
        return Err(bad("llama.vocab_size", why));
    }
    Ok(Hyper {
        width,
        layers: meta.size("llama.block_count")?,
        heads,
        kv_heads,
        head_dim,
        vocab,
        context: meta.size("llama.context_length")?,
    })
}

fn optional_size(meta: &Metadata, key: &str) -> Result<Option<usize>, GgufProblem> {
    if meta.has(key) { meta.size(key).map(Some) } else { Ok(None) }
}

fn rope(meta: &Metadata, hyper: &Hyper) -> Result<RopeSpec, GgufProblem> {
    let base = meta.opt_float("llama.rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE);
    if base <= 0.0 {
        return Err(bad("llama.rope.freq_base", format!("{base} is not above 0")));
    }
    let dims = optional_size(meta, "llama.rope.dimension_count")?.unwrap_or(hyper.head_dim);
    if dims > hyper.head_dim || !dims.is_multiple_of(2) {
        let why = format!("{dims} is odd or more than the {} elements of a head", hyper.head_dim);
        return Err(bad("llama.rope.dimension_count", why));
    }
    Ok(RopeSpec { layout: RopeLayout::Interleaved, base, dims, head_dim: hyper.head_dim })
}

fn layer(
    index: usize,
    hyper: &Hyper,
    feed_forward: usize,
    tensors: &mut TensorFinder<'_>,
) -> Result<Layer, GgufProblem> {
    let Hyper { width, heads, kv_heads, head_dim, .. } = *hyper;
    let name = |part: &str| format!("blk.{index}.{part}.weight");
    // Sizes are below 2³¹ each, so their products fit 64 bits.
    let (query, kv) = (heads * head_dim, kv_heads * head_dim);
    Ok(Layer {
        attention_norm: tensors.vector(&name("attn_norm"), width)?,
        query: tensors.matrix(&name("attn_q"), query, width)?,
        key: tensors.matrix(&name("attn_k"), kv, width)?,
        value: tensors.matrix(&name("attn_v"), kv, width)?,
        attention_output: tensors.matrix(&name("attn_output"), width, query)?,
        feed_forward_norm: tensors.vector(&name("ffn_norm"), width)?,
        gate: tensors.matrix(&name("ffn_gate"), feed_forward, width)?,
        up: tensors.matrix(&name("ffn_up"), feed_forward, width)?,
        down: tensors.matrix(&name("ffn_down"), width, feed_forward)?,
    })
}

impl Architecture for Llama {
    fn sizes(&self) -> ArchSizes {
        let Hyper { context, vocab, layers, kv_heads, head_dim, .. } = self.hyper;
        ArchSizes { context_tokens: context, vocabulary: vocab, layers, kv_heads, head_dim }
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let mut stream = plan.embed(self.embedding);
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = self.attention(&mut plan, stream, index, layer);
            stream = plan.add(stream, attended);
            let fed = self.feed_forward(&mut plan, stream, layer);
            stream = plan.add(stream, fed);
        }
        // Norms work row by row, so only the rows whose logits are wanted need the last one.
        let last = plan.gather_rows(stream);
        let last = plan.rms_norm(last, self.output_norm, self.eps);
        plan.logits(last, self.output);
        plan.finish(&request.fused)
    }
}

impl Llama {
    fn attention(&self, plan: &mut PlanBuilder<'_>, stream: Value, index: usize, layer: &Layer) -> Value {
        let input = plan.rms_norm(stream, layer.attention_norm, self.eps);
        let query = plan.matmul(input, layer.query);
        let key = plan.matmul(input, layer.key);
        let value = plan.matmul(input, layer.value);
        let query = plan.rope(query, self.rope);
        let key = plan.rope(key, self.rope);
        plan.kv_write(index, key, value);
        let mixed = plan.attention(index, query, 1.0 / (self.hyper.head_dim as f32).sqrt());
        plan.matmul(mixed, layer.attention_output)
    }

    fn feed_forward(&self, plan: &mut PlanBuilder<'_>, stream: Value, layer: &Layer) -> Value {
        let input = plan.rms_norm(stream, layer.feed_forward_norm, self.eps);
        let gate = plan.matmul(input, layer.gate);
        let up = plan.matmul(input, layer.up);
        let gated = plan.silu_mul(gate, up);
        plan.matmul(gated, layer.down)
    }
}

#[cfg(test)]
mod tests {
    use crate::gguf::{GgufValue, GgufWriter};
    use crate::seeded::SeededModel;
    use crate::{Model, PlanRequest};
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_plan::{DType, FusedOps, Limits};

    const TINY: SeededModel = SeededModel {
        seed: 7,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        feed_forward: 16,
        context_tokens: 64,
        dtype: DType::F32,
        tied: false,
    };

    fn load(file: Vec<u8>) -> Result<Model, String> {
        Model::from_bytes(Path::new("tiny.gguf"), Arc::new(file)).map_err(|error| error.to_string())
    }

    fn dump(fused: FusedOps) -> String {
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 2 };
        load(TINY.gguf()).unwrap().plan(&PlanRequest { context_tokens: 32, limits, fused }).unwrap().dump()
    }

    #[test]
    fn the_plan_of_a_tiny_model() {
        insta::assert_snapshot!("tiny_llama", dump(FusedOps::default()));
        insta::assert_snapshot!(
            "tiny_llama_fused",
            dump(FusedOps { concat_matmul: true, add_epilogue: true, ..FusedOps::NONE })
        );
    }

    #[test]
    fn a_tied_head_is_the_embedding() {
        let tied = load(SeededModel { tied: true, ..TINY }.gguf()).unwrap();
        assert!(tied.weights().find("output.weight").is_none());
        let untied = load(TINY.gguf()).unwrap();
        assert_eq!(untied.facts().parameters - tied.facts().parameters, (271 * 8) as u64);
    }

    /// The tiny model's file with something replaced in its bytes; both texts have one length.
    fn replaced(from: &str, to: &str) -> Vec<u8> {
        assert_eq!(from.len(), to.len());
        let mut file = TINY.gguf();
        let at = file.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        file[at..at + to.len()].copy_from_slice(to.as_bytes());
        file
    }

    #[test]
    fn missing_and_foreign_tensors_are_named() {
        let error = load(replaced("blk.0.ffn_gate.weight", "blk.0.ffn_gone.weight")).unwrap_err();
        assert!(
            error.starts_with("tiny.gguf: tensor blk.0.ffn_gate.weight: it is missing (16 x 8"),
            "{error}"
        );
        let mut file = GgufWriter::new();
        file.pair("general.architecture", &GgufValue::String("llama".to_owned()));
        let error = load(file.finish()).unwrap_err();
        assert!(error.contains("key llama.embedding_length is missing"), "{error}");
        // The optional head under another name is a tensor that nothing asks for.
        let mut file = TINY.gguf();
        let at = file.windows(13).rposition(|window| window == b"output.weight").unwrap();
        file[at..at + 13].copy_from_slice(b"outdoo.weight");
        let error = load(file).unwrap_err();
        assert!(error.starts_with("tiny.gguf: tensor outdoo.weight: it is not part of the llama"), "{error}");
    }

    /// A key of the tiny model, set to another count.
    fn with_count(key: &str, count: u32) -> Vec<u8> {
        let mut file = TINY.gguf();
        let at = file.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
        let value = at + key.len() + 4;
        file[value..value + 4].copy_from_slice(&count.to_le_bytes());
        file
    }

    #[test]
    fn sizes_that_do_not_fit_are_named() {
        let cases = [
            ("llama.embedding_length", 0, "llama.embedding_length: 0 is not between 1"),
            ("llama.embedding_length", 16, "tensor token_embd.weight: it is 271 x 8"),
            ("llama.feed_forward_length", 32, "tensor blk.0.ffn_gate.weight: it is 16 x 8"),
            ("llama.block_count", 2, "tensor blk.1.attn_norm.weight: it is missing"),
            ("llama.block_count", u32::MAX, "llama.block_count: 4294967295 is not between"),
            ("llama.attention.head_count_kv", 3, "3 does not divide the 2 of llama.attention.head_count"),
            ("llama.rope.dimension_count", 3, "llama.rope.dimension_count: 3 is odd"),
            ("llama.rope.dimension_count", 6, "llama.rope.dimension_count: 6 is odd or more"),
            ("llama.vocab_size", 5, "llama.vocab_size: 5 differs from the 271 rows"),
            ("llama.context_length", 0, "llama.context_length: 0 is not between 1"),
        ];
        for (key, count, expected) in cases {
            let error = load(with_count(key, count)).unwrap_err();
            assert!(error.starts_with("tiny.gguf: ") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn behaviour_that_is_not_built_is_refused_by_its_key() {
        let text = |t: &str| GgufValue::String(t.to_owned());
        let cases = [
            ("llama.rope.scaling.type", text("yarn"), "\"yarn\" is not supported"),
            ("llama.rope.scaling.factor", GgufValue::F32(4.0), "4 is not supported"),
            ("llama.expert_count", GgufValue::U32(8), "8 is not supported"),
        ];
        for (key, value, expected) in cases {
            let mut file = GgufWriter::new();
            file.pair("general.architecture", &text("llama")).pair(key, &value);
            let error = load(file.finish()).unwrap_err();
            assert!(error.contains(key) && error.contains(expected), "{error}");
        }
        let mut other = GgufWriter::new();
        other.pair("general.architecture", &text("mamba"));
        let error = load(other.finish()).unwrap_err();
        assert_eq!(error, "tiny.gguf: architecture \"mamba\" is not supported; supported: llama");
    }
}
