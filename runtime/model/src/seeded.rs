//! Small models with random weights that depend on nothing but a seed: decoders of every family as GGUF
//! files, with adapters as PEFT writes them, BERTs as checkpoints.
//!
//! Tests of the engine, the pod and the whole cluster need a model that loads in a millisecond and answers
//! the same on every machine. It has the shape, the file format and the tokenizer of a real one (byte-level,
//! so every text can be produced); only its answers are meaningless.
//!
//! The recipe is short enough to repeat in another language: element `i` of a tensor is
//! `(mix(seed XOR fnv1a(name), i) >> 40) / 2^23 - 1`, times `scale / sqrt(columns)`, where `mix` is the
//! SplitMix64 output function on `start + (i + 1) * 0x9E3779B97F4A7C15`; norm weights are 1, and biases are
//! the sequence times 0.3. Quantised tensors are rounded from these values block by block.

mod adapter;
mod decoders;
mod encoder;
mod families;
mod folder;
mod nomic;
mod reader;
mod store;

pub use adapter::SeededAdapter;
pub use encoder::SeededEncoder;
pub use families::{SeededCheckpoint, SeededEncoderFamily};
pub use reader::{SeededReader, SeededReading};

use crate::gguf::{GgufValue, GgufWriter};
use crate::tokenizer::byte_chars;
use decoders::{Content, TensorRecipe};
use store::store;
use trustformers_plan::DType;
use trustformers_plan::seeded::SeededRng;

/// Scale of the embedding, and of the other matrices, before the division by the root of the columns. Larger
/// than in a trained model, so that answers depend visibly on the prompt.
const SCALE: f32 = 3.0;

/// Control tokens, the first ids of the vocabulary.
const CONTROL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Pairs that the tokenizer merges, in order, written as bytes with a space where the byte-level alphabet has
/// `Ġ`.
const MERGES: [(&str, &str); 12] = [
    (" ", "t"),
    ("h", "e"),
    ("i", "n"),
    (" t", "he"),
    ("e", "r"),
    (" ", "a"),
    ("o", "n"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    (" ", "w"),
    ("in", "g"),
];

/// Scale of biases: visible beside products of about one.
const BIAS_SCALE: f32 = 0.3;

/// Which architecture a seeded model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SeededFamily {
    /// `llama`, with the split rule of SmolLM2.
    Llama,
    /// `qwen2`, with its own split rule.
    Qwen2,
    /// `qwen3`: norms of query and key heads, a width that is not the queries'.
    Qwen3,
    /// `smollm3`: every fourth layer does not rotate.
    SmolLm3,
    /// `olmo2`: norms of what a block's parts add, and of rows of queries and keys.
    Olmo2,
    /// `granite`: factors.
    Granite,
    /// `phi3`: joined tensors, LongRoPE of three quarters of each head, a window.
    Phi3,
    /// `gemma2`: soft caps, windows.
    Gemma2,
    /// `gemma3`: norms of heads, two rotations, windows.
    Gemma3,
    /// `gpt2`: learned positions, layer norms.
    Gpt2,
    /// `llama` with four experts.
    Mixtral,
    /// `qwen3moe`: a Qwen3 with four experts.
    Qwen3Moe,
}

impl SeededFamily {
    fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::SmolLm3 => "smollm3",
            Self::Olmo2 => "olmo2",
            Self::Granite => "granite",
            Self::Phi3 => "phi3",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Gpt2 => "gpt2",
            Self::Mixtral => "llama",
            Self::Qwen3Moe => "qwen3moe",
        }
    }

    fn split(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            _ => "smollm",
        }
    }
}

/// How a file stores the projections to queries, keys and values of a layer.
#[derive(Debug, Clone, Copy)]
enum QkvStorage {
    Separate,
    OneTensor,
}

/// The shape of a seeded model. The default takes about 200 KB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeededModel {
    /// Its architecture.
    pub family: SeededFamily,
    /// The seed of all weights.
    pub seed: u64,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head; even. `heads * head_dim` is the width and a multiple of the type's block (32 or
    /// 256) where weights are quantised.
    pub head_dim: usize,
    /// Width of the feed-forward part; a multiple of the type's block where weights are quantised.
    pub feed_forward: usize,
    /// Longest sequence in tokens.
    pub context_tokens: usize,
    /// How the matrices are stored; norms are F32 always.
    pub dtype: DType,
    /// Whether the head is the embedding itself.
    pub tied: bool,
}

impl Default for SeededModel {
    fn default() -> Self {
        Self {
            family: SeededFamily::Llama,
            seed: 1,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            feed_forward: 128,
            context_tokens: 256,
            dtype: DType::F32,
            tied: true,
        }
    }
}

impl SeededModel {
    /// Ids of the vocabulary: control tokens, 256 bytes, merges.
    pub fn vocabulary(&self) -> usize {
        CONTROL_TOKENS.len() + 256 + MERGES.len()
    }

    /// The bytes of the GGUF file.
    ///
    /// # Panics
    /// When rows cannot be stored in the wanted type: see the fields' rules.
    pub fn gguf(&self) -> Vec<u8> {
        self.gguf_with(&[])
    }

    /// The bytes of the GGUF file with these keys added, or with these values for keys that it has.
    ///
    /// # Panics
    /// As [`Self::gguf`].
    pub fn gguf_with(&self, keys: &[(&str, GgufValue)]) -> Vec<u8> {
        let mut pairs = self.pairs();
        for (key, value) in keys {
            pairs.retain(|(name, _)| name != key);
            pairs.push(((*key).to_owned(), value.clone()));
        }
        self.file(&pairs, QkvStorage::Separate)
    }

    /// The bytes of the GGUF file with the queries, keys and values of a layer in one tensor, of the same
    /// values.
    ///
    /// # Panics
    /// As [`Self::gguf`].
    pub fn gguf_with_joined_qkv(&self) -> Vec<u8> {
        self.file(&self.pairs(), QkvStorage::OneTensor)
    }

    /// The bytes of two GGUF files that are the parts of one model, of a family beside Llama and Qwen2.
    ///
    /// # Panics
    /// As [`Self::gguf`].
    pub fn gguf_in_parts(&self) -> [Vec<u8>; 2] {
        let recipes = decoders::tensors(self);
        let halves = recipes.split_at(recipes.len() / 2);
        // Sizes of a test model fit 32 bits by a wide margin.
        let split = |number: u32| {
            let counts = [("no", number), ("count", 2), ("tensors.count", recipes.len() as u32)];
            counts.map(|(key, count)| (format!("split.{key}"), GgufValue::U32(count)))
        };
        let write = |pairs: Vec<(String, GgufValue)>, recipes: &[TensorRecipe]| {
            let mut file = GgufWriter::new();
            for (key, value) in &pairs {
                file.pair(key, value);
            }
            recipes.iter().for_each(|recipe| self.tensor(&mut file, recipe));
            file.finish()
        };
        let first = self.pairs().into_iter().chain(split(0)).collect();
        [write(first, halves.0), write(split(1).to_vec(), halves.1)]
    }

    /// The bytes of the GGUF file without one of its keys.
    ///
    /// # Panics
    /// As [`Self::gguf`].
    pub fn gguf_without(&self, key: &str) -> Vec<u8> {
        let mut pairs = self.pairs();
        pairs.retain(|(name, _)| name != key);
        self.file(&pairs, QkvStorage::Separate)
    }

    fn pairs(&self) -> Vec<(String, GgufValue)> {
        let mut pairs = self.metadata();
        pairs.extend(tokenizer(self.family.split()));
        pairs
    }

    fn file(&self, pairs: &[(String, GgufValue)], qkv: QkvStorage) -> Vec<u8> {
        let mut file = GgufWriter::new();
        for (key, value) in pairs {
            file.pair(key, value);
        }
        if !matches!(self.family, SeededFamily::Llama | SeededFamily::Qwen2) {
            decoders::tensors(self).iter().for_each(|recipe| self.tensor(&mut file, recipe));
            return file.finish();
        }
        let (width, vocabulary) = (self.width(), self.vocabulary());
        self.matrix(&mut file, "token_embd.weight", vocabulary, width);
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            norm(&mut file, &name("attn_norm"), width);
            self.queries_keys_values(&mut file, layer, qkv);
            self.matrix(&mut file, &name("attn_output"), width, width);
            norm(&mut file, &name("ffn_norm"), width);
            self.matrix(&mut file, &name("ffn_gate"), self.feed_forward, width);
            self.matrix(&mut file, &name("ffn_up"), self.feed_forward, width);
            self.matrix(&mut file, &name("ffn_down"), width, self.feed_forward);
        }
        norm(&mut file, "output_norm.weight", width);
        if !self.tied {
            self.matrix(&mut file, "output.weight", vocabulary, width);
        }
        file.finish()
    }

    /// Width of the stream.
    fn width(&self) -> usize {
        decoders::width(self.family, self.heads * self.head_dim)
    }

    /// Elements of a head that are rotated.
    fn rotated_dims(&self) -> usize {
        if self.family == SeededFamily::Phi3 { self.head_dim / 4 * 3 } else { self.head_dim }
    }

    fn tensor(&self, file: &mut GgufWriter, recipe: &TensorRecipe) {
        match recipe.content {
            Content::Matrix { rows } => self.matrix(file, &recipe.name, rows, recipe.cols),
            Content::Norm | Content::Bias | Content::Divisors => {
                let values = store(&recipe.vector_values(self.seed), DType::F32);
                file.tensor(&recipe.name, &[recipe.cols], DType::F32, &values);
            }
        }
    }

    fn queries_keys_values(&self, file: &mut GgufWriter, layer: usize, storage: QkvStorage) {
        let (width, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let parts = [("attn_q", width), ("attn_k", kv), ("attn_v", kv)];
        let name = |part: &str, kind: &str| format!("blk.{layer}.{part}.{kind}");
        let is_biased = self.family == SeededFamily::Qwen2;
        match storage {
            QkvStorage::Separate => {
                for (part, rows) in parts {
                    self.matrix(file, &name(part, "weight"), rows, width);
                }
                for (part, len) in parts.into_iter().filter(|_| is_biased) {
                    let values = self.bias_values(&name(part, "bias"), len);
                    file.tensor(&name(part, "bias"), &[len], DType::F32, &store(&values, DType::F32));
                }
            }
            QkvStorage::OneTensor => {
                let rows = width + 2 * kv;
                let of_part =
                    |(part, rows): (&str, usize)| self.matrix_values(&name(part, "weight"), rows, width);
                let values: Vec<f32> = parts.into_iter().flat_map(of_part).collect();
                let stored = store(&values, self.dtype);
                file.tensor(&name("attn_qkv", "weight"), &[width, rows], self.dtype, &stored);
                if is_biased {
                    let of_part = |(part, len): (&str, usize)| self.bias_values(&name(part, "bias"), len);
                    let values: Vec<f32> = parts.into_iter().flat_map(of_part).collect();
                    let stored = store(&values, DType::F32);
                    file.tensor(&name("attn_qkv", "bias"), &[rows], DType::F32, &stored);
                }
            }
        }
    }

    fn metadata(&self) -> Vec<(String, GgufValue)> {
        let text = |t: &str| GgufValue::String(t.to_owned());
        // Sizes of a test model fit 32 bits by a wide margin.
        let number = |n: usize| GgufValue::U32(n as u32);
        let family = self.family.architecture();
        let is_gpt2 = self.family == SeededFamily::Gpt2;
        let norm = if is_gpt2 { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
        let pairs = [
            ("block_count", number(self.layers)),
            ("context_length", number(self.context_tokens)),
            ("embedding_length", number(self.width())),
            ("feed_forward_length", number(self.feed_forward)),
            ("attention.head_count", number(self.heads)),
            ("attention.head_count_kv", number(if is_gpt2 { self.heads } else { self.kv_heads })),
            (norm, GgufValue::F32(1e-5)),
        ];
        let base = if self.family == SeededFamily::Gemma3 { 1e6 } else { 10_000.0 };
        let rotation =
            [("rope.freq_base", GgufValue::F32(base)), ("rope.dimension_count", number(self.rotated_dims()))];
        let rotation = rotation.into_iter().filter(|_| !is_gpt2);
        let pairs = pairs.into_iter().chain(rotation);
        let pairs = pairs.chain([("vocab_size", number(self.vocabulary()))]).chain(decoders::keys(self));
        let general = [("architecture", text(family)), ("name", text("Seeded test model"))];
        let general = general.map(|(key, value)| (format!("general.{key}"), value));
        general.into_iter().chain(pairs.map(|(key, value)| (format!("{family}.{key}"), value))).collect()
    }

    fn bias_values(&self, name: &str, len: usize) -> Vec<f32> {
        let start = self.seed ^ fnv1a(name);
        (0..len as u64).map(|i| element(start, i) * BIAS_SCALE).collect()
    }

    fn matrix(&self, file: &mut GgufWriter, name: &str, rows: usize, cols: usize) {
        let values = self.matrix_values(name, rows, cols);
        file.tensor(name, &[cols, rows], self.dtype, &store(&values, self.dtype));
    }

    fn matrix_values(&self, name: &str, rows: usize, cols: usize) -> Vec<f32> {
        let start = self.seed ^ fnv1a(name);
        let scale = SCALE / (cols as f32).sqrt();
        (0..(rows * cols) as u64).map(|i| element(start, i) * scale).collect()
    }
}

fn norm(file: &mut GgufWriter, name: &str, width: usize) {
    file.tensor(name, &[width], DType::F32, &store(&vec![1.0; width], DType::F32));
}

fn tokenizer(split: &str) -> Vec<(String, GgufValue)> {
    let chars = byte_chars();
    let spell = |text: &str| text.bytes().map(|byte| chars[usize::from(byte)]).collect::<String>();
    let mut tokens: Vec<String> = CONTROL_TOKENS.iter().map(|token| (*token).to_owned()).collect();
    tokens.extend(chars.iter().map(char::to_string));
    tokens.extend(MERGES.iter().map(|(left, right)| spell(left) + &spell(right)));
    let types = (0..tokens.len()).map(|id| if id < CONTROL_TOKENS.len() { 3 } else { 1 }).collect();
    let merges = MERGES.iter().map(|(left, right)| format!("{} {}", spell(left), spell(right))).collect();
    [
        ("model", GgufValue::String("gpt2".to_owned())),
        ("pre", GgufValue::String(split.to_owned())),
        ("tokens", GgufValue::Strings(tokens)),
        ("token_type", GgufValue::Integers(types)),
        ("merges", GgufValue::Strings(merges)),
        ("bos_token_id", GgufValue::U32(1)),
        ("eos_token_id", GgufValue::U32(2)),
        ("add_bos_token", GgufValue::Bool(false)),
    ]
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .to_vec()
}

/// Element `index` of the sequence that starts at `start`, in [-1, 1).
fn element(start: u64, index: u64) -> f32 {
    trustformers_plan::seeded::signed(SeededRng::nth(start, index))
}

fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;
    use std::path::Path;
    use std::sync::Arc;

    #[test]
    fn every_storage_type_loads_and_stays_near_the_values() {
        let load = |dtype| {
            let file =
                SeededModel { dtype, head_dim: 64, feed_forward: 256, ..SeededModel::default() }.gguf();
            Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap()
        };
        let row = |model: &Model| {
            let weights = model.weights();
            let weight = weights.get(weights.find("blk.1.ffn_down.weight").unwrap());
            let mut row = vec![0.0; weight.cols()];
            weight.dequantise_row(3, &mut row);
            row
        };
        let exact = row(&load(DType::F32));
        let largest = exact.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        assert!(largest > 0.1, "{largest}");
        for (dtype, share) in [
            (DType::F16, 0.001),
            (DType::BF16, 0.005),
            (DType::Q8_0, 0.006),
            (DType::Q4_1, 0.07),
            (DType::Q4_0, 0.13),
            (DType::Q5_0, 0.07),
            (DType::Q4_K, 0.08),
            (DType::Q5_K, 0.05),
            (DType::Q6_K, 0.04),
        ] {
            let stored = row(&load(dtype));
            let off = exact.iter().zip(&stored).fold(0.0_f32, |off, (a, b)| off.max((a - b).abs()));
            assert!(off <= largest * share, "{dtype}: {off} of {largest}");
            assert_eq!(off > 0.0, dtype != DType::F32);
        }
    }

    #[test]
    fn the_seed_decides_everything() {
        let model = |seed| SeededModel { seed, ..SeededModel::default() }.gguf();
        assert_eq!(model(1), model(1));
        assert_ne!(model(1), model(2));
        // The recipe's first numbers, to compare with an implementation in another language.
        let start = 1 ^ fnv1a("token_embd.weight");
        let first = [0, 1].map(|index| element(start, index));
        assert!(first.iter().all(|value| (-1.0..1.0).contains(value)) && first[0] != first[1]);
    }

    #[test]
    fn facts_are_those_of_the_shape() {
        let file = SeededModel::default().gguf();
        let size = file.len() as u64;
        let model = Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap();
        let facts = model.facts();
        assert_eq!((facts.architecture.as_str(), facts.context_tokens), ("llama", 256));
        assert_eq!((facts.vocabulary, facts.layers, facts.kv_heads, facts.head_dim), (271, 2, 2, 16));
        assert_eq!(facts.file_bytes, size);
        assert_eq!(facts.chat_template, None);
        let layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64;
        assert_eq!(facts.parameters, 271 * 64 + 2 * layer + 64);
    }
}
