//! BERT, or a RoBERTa that llama.cpp's converter stores as one, and Nomic BERT in GGUF files: their keys, and
//! the names of their tensors, as those of a checkpoint. Of a RoBERTa the file has no rows of positions
//! before the first one.

use super::bert::{self, EncoderShape, EncoderTensors, HEAD_DENSE, HEAD_OUT, NamedWeight};
use super::encoder_family::{BERT, EncoderBlocks, EncoderFamily};
use super::keys::ArchKeys;
use super::nomic::NOMIC;
use super::tensors::TensorProblem;
use crate::checkpoint::BertConfig;
use crate::gguf::{Gguf, GgufProblem};
use serde_json::json;
use trustformers_plan::{Pooling, Weight, WeightView, Weights};

/// An encoder's architecture in GGUF files.
#[derive(Debug)]
pub(crate) struct FileArchitecture {
    /// Its name in `general.architecture`, which is also the prefix of its keys.
    pub(crate) name: &'static str,
    pub(crate) family: &'static EncoderFamily,
    /// Parts of a block that not all of them have, as those of [`PARTS`].
    parts: &'static [(&'static str, &'static str)],
    /// Whether a file may give scores instead of vectors.
    scores: bool,
}

/// Every encoder's architecture.
const ARCHITECTURES: &[FileArchitecture] = &[
    FileArchitecture { name: "bert", family: &BERT, parts: &[], scores: true },
    FileArchitecture {
        name: "nomic-bert",
        family: &NOMIC,
        parts: &[("attn_qkv", "attention.self.joined"), ("ffn_gate", "intermediate.gate")],
        scores: false,
    },
];

/// The base of the rotation where a file does not say it.
const DEFAULT_BASE: f32 = 10_000.0;

/// The table of token types. Only the row of the first type is used where texts come one at a time.
const TYPES: &str = "token_types.weight";

/// Names of tensors outside of blocks.
const WHOLE: [(&str, &str); 5] = [
    ("token_embd.weight", "embeddings.word_embeddings.weight"),
    ("position_embd.weight", "embeddings.position_embeddings.weight"),
    (TYPES, "embeddings.token_type_embeddings.weight"),
    ("token_embd_norm.weight", "embeddings.LayerNorm.weight"),
    ("token_embd_norm.bias", "embeddings.LayerNorm.bias"),
];

/// Names of the parts of a block.
const PARTS: [(&str, &str); 8] = [
    ("attn_q", "attention.self.query"),
    ("attn_k", "attention.self.key"),
    ("attn_v", "attention.self.value"),
    ("attn_output", "attention.output.dense"),
    ("attn_output_norm", "attention.output.LayerNorm"),
    ("ffn_up", "intermediate.dense"),
    ("ffn_down", "output.dense"),
    ("layer_output_norm", "output.LayerNorm"),
];

/// The last projection of a file with scores, and its bias.
const OUT: [&str; 2] = ["cls.output.weight", "cls.output.bias"];

/// Names of the parts of its head, each with weight and bias.
const HEAD_PARTS: [(&str, &str); 2] = [("cls", HEAD_DENSE), ("cls.output", HEAD_OUT)];

/// The number of llama.cpp for files with scores, which converters leave out.
const RANK: usize = 4;

/// The names of the scores.
const LABELS: &str = "classifier.output_labels";

/// What a file's keys say.
#[derive(Debug)]
pub(crate) struct BertKeys {
    pub(crate) config: BertConfig,
    /// `None` where the file does not say it.
    pub(crate) pooling: Option<Pooling>,
    /// Whether it gives scores instead of vectors.
    pub(crate) scores: bool,
    /// The names of the scores, where the file has them.
    pub(crate) labels: Option<Vec<String>>,
}

/// The architecture of that name.
pub(crate) fn of_name(name: &str) -> Option<&'static FileArchitecture> {
    ARCHITECTURES.iter().find(|architecture| architecture.name == name)
}

/// The names of all of them.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|architecture| architecture.name)
}

/// Reads and checks the keys of a file with this content; the numbers of tokens and of token types are those
/// of the tensors.
pub(crate) fn keys(
    architecture: &FileArchitecture,
    gguf: &Gguf,
    bytes: &[u8],
    weights: &Weights,
) -> Result<BertKeys, GgufProblem> {
    let FileArchitecture { name, family, .. } = *architecture;
    let keys = ArchKeys::new(&gguf.metadata, name);
    let meta = &gguf.metadata;
    keys.refuse_effects(&["attention.causal", "pooling_type"])?;
    if meta.opt_bool(&keys.name("attention.causal"))?.unwrap_or(true) {
        let why = "only false is supported, and it may not be left out; convert the model again";
        return Err(keys.invalid("attention.causal", why.to_owned()));
    }
    let FileAnswer { pooling, scores } = answer(architecture, &keys, weights)?;
    let labels = if scores { labels(&keys, gguf, bytes)? } else { None };
    let rows = |name: &str| weights.find(name).map_or(0, |id| weights.get(id).rows());
    let eps = keys.float("attention.layer_norm_epsilon")?;
    if eps < 0.0 {
        return Err(keys.invalid("attention.layer_norm_epsilon", format!("{eps} is negative")));
    }
    let width = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    if let Some(kv_heads) = keys.optional_size("attention.head_count_kv")?.filter(|own| *own != heads) {
        let why = format!("{kv_heads} is not supported; only the {heads} of attention.head_count are");
        return Err(keys.invalid("attention.head_count_kv", why));
    }
    let vocabulary = rows("token_embd.weight");
    // Rows without a token were dropped, so that the key may only be larger.
    if let Some(claimed) = keys.optional_size("vocab_size")?.filter(|claimed| *claimed < vocabulary) {
        let why = format!("{claimed} is less than the {vocabulary} rows of tensor token_embd.weight");
        return Err(keys.invalid("vocab_size", why));
    }
    let mut config = json!({
        "hidden_size": width,
        "num_hidden_layers": keys.size("block_count")?,
        "num_attention_heads": heads,
        "intermediate_size": keys.size("feed_forward_length")?,
        "max_position_embeddings": keys.size("context_length")?,
        "vocab_size": vocabulary,
        "type_vocab_size": rows(TYPES).max(1),
        "layer_norm_eps": eps,
    });
    if family.blocks == EncoderBlocks::Rotary {
        config["hidden_act"] = "silu".into();
        config["rotary_emb_base"] = rotation_base(&keys, width / heads)?.into();
    }
    keys.all_read()?;
    let wrong = |why: String| keys.invalid("embedding_length", why);
    let config: BertConfig = serde_json::from_value(config).map_err(|error| wrong(error.to_string()))?;
    config.check(family).map_err(|problem| wrong(problem.to_string()))?;
    Ok(BertKeys { config, pooling, scores, labels })
}

/// How a file's rows become its answer.
struct FileAnswer {
    /// `None` where the file does not say it.
    pooling: Option<Pooling>,
    scores: bool,
}

/// What the key of the pooling says. Without it a file with the last projection of a head gives scores.
fn answer(
    architecture: &FileArchitecture,
    keys: &ArchKeys<'_>,
    weights: &Weights,
) -> Result<FileAnswer, GgufProblem> {
    let vectors = |pooling| FileAnswer { pooling: Some(pooling), scores: false };
    match keys.optional_count("pooling_type")? {
        None => {
            Ok(FileAnswer { pooling: None, scores: architecture.scores && weights.find(OUT[0]).is_some() })
        }
        Some(1) => Ok(vectors(Pooling::Mean)),
        Some(2) => Ok(vectors(Pooling::Cls)),
        Some(3) => Ok(vectors(Pooling::Last)),
        Some(RANK) if architecture.scores => Ok(FileAnswer { pooling: None, scores: true }),
        Some(other) => {
            let supported = if architecture.scores {
                format!("0 (none), 1 (mean), 2 (first), 3 (last) and {RANK} (rank) are")
            } else {
                "0 (none), 1 (mean), 2 (first) and 3 (last) are".to_owned()
            };
            Err(keys.invalid("pooling_type", format!("{other} is not supported; {supported}")))
        }
    }
}

/// The names of the scores, where the file has them.
fn labels(keys: &ArchKeys<'_>, gguf: &Gguf, bytes: &[u8]) -> Result<Option<Vec<String>>, GgufProblem> {
    let Some(list) = gguf.metadata.opt_array(&keys.name(LABELS), bytes)? else { return Ok(None) };
    match list.strings() {
        Some(labels) => Ok(Some(labels.map(str::to_owned).collect())),
        None => Err(keys.invalid(LABELS, "it is not a list of texts".to_owned())),
    }
}

/// The base of the rotation of whole heads.
fn rotation_base(keys: &ArchKeys<'_>, head_dim: usize) -> Result<f32, GgufProblem> {
    if let Some(dims) = keys.optional_size("rope.dimension_count")?.filter(|dims| *dims != head_dim) {
        let why = format!("{dims} is not supported; only {head_dim} is");
        return Err(keys.invalid("rope.dimension_count", why));
    }
    Ok(keys.optional_float("rope.freq_base")?.unwrap_or(DEFAULT_BASE))
}

/// The tensors under the names of a checkpoint. Views of them, so that quantised ones stay as stored.
pub(crate) fn tensors(
    architecture: &FileArchitecture,
    shape: &EncoderShape<'_>,
    stored: &Weights,
) -> Result<EncoderTensors, TensorProblem> {
    let scores = shape.head.scores;
    if scores {
        check_head(stored)?;
    }
    let mut named = Vec::new();
    for (_, weight) in stored.iter() {
        let own = weight.name();
        let wrong = |why: String| TensorProblem { name: own.to_owned(), why };
        let Some(name) = name_in_plan(architecture, own, scores) else {
            let name = architecture.name;
            return Err(wrong(format!("it is not part of the {name} architecture as supported here")));
        };
        let renamed = if name == bert::TYPES && shape.has_segments() {
            // Two types at most are ever used: a text, and another one beside it.
            weight.view(name, &WeightView::Rows(0..2))
        } else if name == bert::TYPES && weight.rows() > 0 {
            // Added to rows of activations, as a vector of plain numbers.
            let mut row = vec![0.0; weight.cols()];
            weight.dequantise_row(0, &mut row);
            Weight::from_f32(name, (1, weight.cols()), &row)
        } else {
            weight.view(name, &WeightView::Rows(0..weight.rows()))
        };
        let weight = renamed.map_err(|problem| wrong(problem.to_string()))?;
        named.push(NamedWeight { stored: own.to_owned(), weight });
    }
    shape.sorted(named, &OUT.map(str::to_owned))
}

/// Refuses a file without the projections of a head. Converters leave out the pooler of a BERT, which is the
/// first of them.
fn check_head(stored: &Weights) -> Result<(), TensorProblem> {
    let without_pooler = "it is missing: the converter left out the pooler, without which scores are not those of the \
         model; serve the folder that was converted";
    let incomplete = "it is missing; convert the model again";
    let needed = [(OUT[0], incomplete), (OUT[1], incomplete), ("cls.weight", without_pooler)];
    match needed.into_iter().find(|(name, _)| stored.find(name).is_none()) {
        None => Ok(()),
        Some((name, why)) => Err(TensorProblem { name: name.to_owned(), why: why.to_owned() }),
    }
}

fn name_in_plan(architecture: &FileArchitecture, own: &str, scores: bool) -> Option<String> {
    if scores
        && let Some((part, kind)) = own.rsplit_once('.')
        && let Some((_, name)) = HEAD_PARTS.iter().find(|(stored, _)| *stored == part)
    {
        return Some(format!("{name}.{kind}"));
    }
    if let Some((_, name)) = WHOLE.iter().find(|(stored, _)| *stored == own) {
        return Some((*name).to_owned());
    }
    let (layer, rest) = own.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (_, name) = PARTS.iter().chain(architecture.parts).find(|(stored, _)| *stored == part)?;
    Some(format!("encoder.layer.{layer}.{name}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Metadata;

    #[test]
    fn the_last_projection_of_a_head_makes_scores_only_in_files_of_bert() {
        let (keys, mut weights) = (Metadata::default(), Weights::new());
        weights.push(Weight::from_f32(OUT[0], (1, 4), &[0.0; 4]).unwrap()).unwrap();
        for (name, wanted) in [("bert", true), ("nomic-bert", false)] {
            let keys = ArchKeys::new(&keys, name);
            assert_eq!(answer(of_name(name).unwrap(), &keys, &weights).unwrap().scores, wanted, "{name}");
        }
        assert_eq!(names().collect::<Vec<_>>(), ["bert", "nomic-bert"]);
    }
}
