//! A BERT in a GGUF file: its keys, and the names of its tensors, as those of a checkpoint.

use super::encoder_family::BERT;
use super::keys::ArchKeys;
use super::tensors::TensorProblem;
use crate::checkpoint::BertConfig;
use crate::gguf::{GgufProblem, Metadata};
use serde_json::json;
use trustformers_plan::{Pooling, Weight, WeightView, Weights};

/// Its name in `general.architecture`.
pub(crate) const NAME: &str = "bert";

/// The table of token types. Only the row of the first type is used: texts come one at a time.
const TYPES: &str = "token_types.weight";

/// Names of tensors outside of blocks.
const WHOLE: [(&str, &str); 5] = [
    ("token_embd.weight", "embeddings.word_embeddings.weight"),
    ("position_embd.weight", "embeddings.position_embeddings.weight"),
    (TYPES, "embeddings.token_type_embeddings.weight"),
    ("token_embd_norm.weight", "embeddings.LayerNorm.weight"),
    ("token_embd_norm.bias", "embeddings.LayerNorm.bias"),
];

/// Names of the parts of a block, each with weight and bias.
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

/// What a file's keys say.
#[derive(Debug)]
pub(crate) struct BertKeys {
    pub(crate) config: BertConfig,
    /// `None` where the file does not say it.
    pub(crate) pooling: Option<Pooling>,
}

/// Reads and checks the keys; the numbers of tokens and of token types are those of the tensors.
pub(crate) fn keys(meta: &Metadata, weights: &Weights) -> Result<BertKeys, GgufProblem> {
    let keys = ArchKeys::new(meta, NAME);
    keys.refuse_effects(&["attention.causal", "pooling_type"])?;
    if meta.opt_bool(&keys.name("attention.causal"))?.unwrap_or(true) {
        let why = "only false is supported, and it may not be left out; convert the model again";
        return Err(keys.invalid("attention.causal", why.to_owned()));
    }
    let pooling = match keys.optional_count("pooling_type")? {
        None => None,
        Some(1) => Some(Pooling::Mean),
        Some(2) => Some(Pooling::Cls),
        Some(3) => Some(Pooling::Last),
        Some(other) => {
            let why = format!("{other} is not supported; 0 (none), 1 (mean), 2 (first) and 3 (last) are");
            return Err(keys.invalid("pooling_type", why));
        }
    };
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
    let config = json!({
        "hidden_size": width,
        "num_hidden_layers": keys.size("block_count")?,
        "num_attention_heads": heads,
        "intermediate_size": keys.size("feed_forward_length")?,
        "max_position_embeddings": keys.size("context_length")?,
        "vocab_size": vocabulary,
        "type_vocab_size": 1,
        "layer_norm_eps": eps,
    });
    keys.all_read()?;
    let wrong = |why: String| keys.invalid("embedding_length", why);
    let config: BertConfig = serde_json::from_value(config).map_err(|error| wrong(error.to_string()))?;
    config.check(&BERT).map_err(|problem| wrong(problem.to_string()))?;
    Ok(BertKeys { config, pooling })
}

/// The tensors under the names of a checkpoint. Views of them, so that quantised ones stay as stored.
pub(crate) fn renamed(stored: &Weights) -> Result<Weights, TensorProblem> {
    let mut weights = Weights::new();
    for (_, weight) in stored.iter() {
        let own = weight.name();
        let wrong = |why: String| TensorProblem { name: own.to_owned(), why };
        let Some(name) = name_in_plan(own) else {
            return Err(wrong("it is not part of the bert architecture as supported here".to_owned()));
        };
        let renamed = if own == TYPES && weight.rows() > 0 {
            // Added to rows of activations, as a vector of plain numbers.
            let mut row = vec![0.0; weight.cols()];
            weight.dequantise_row(0, &mut row);
            Weight::from_f32(name, (1, weight.cols()), &row)
        } else {
            weight.view(name, &WeightView::Rows(0..weight.rows()))
        };
        let pushed = renamed.and_then(|renamed| weights.push(renamed));
        pushed.map_err(|problem| wrong(problem.to_string()))?;
    }
    Ok(weights)
}

fn name_in_plan(own: &str) -> Option<String> {
    if let Some((_, name)) = WHOLE.iter().find(|(stored, _)| *stored == own) {
        return Some((*name).to_owned());
    }
    let (layer, rest) = own.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (_, name) = PARTS.iter().find(|(stored, _)| *stored == part)?;
    Some(format!("encoder.layer.{layer}.{name}.{kind}"))
}
