//! The files of a seeded Nomic BERT: as the library's own class writes them, as the models were published,
//! and as a GGUF file. All have the same values.

use super::encoder::{GgufFormat, Tensors, vocabulary};
use super::families::SeededCheckpoint;
use super::folder::{Files, json_file};
use crate::gguf::GgufValue;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use trustformers_plan::DType;

/// The base of the rotation.
const BASE: f32 = 1000.0;

/// The last part of the name of a layer's tensor in the library, in published files and in GGUF files.
const LAYER_NAMES: [[&str; 3]; 9] = [
    ["self_attn.q_proj", "attn.Wqkv", "attn_qkv"],
    ["self_attn.k_proj", "attn.Wqkv", "attn_qkv"],
    ["self_attn.v_proj", "attn.Wqkv", "attn_qkv"],
    ["self_attn.o_proj", "attn.out_proj", "attn_output"],
    ["post_attention_layernorm", "norm1", "attn_output_norm"],
    ["mlp.up_proj", "mlp.fc11", "ffn_up"],
    ["mlp.gate_proj", "mlp.fc12", "ffn_gate"],
    ["mlp.down_proj", "mlp.fc2", "ffn_down"],
    ["post_mlp_layernorm", "norm2", "layer_output_norm"],
];

/// The same of the tensors outside of layers.
const WHOLE_NAMES: [[&str; 3]; 3] = [
    ["embeddings.word_embeddings", "embeddings.word_embeddings", "token_embd"],
    ["embeddings.token_type_embeddings", "embeddings.token_type_embeddings", "token_types"],
    ["embeddings.LayerNorm", "emb_ln", "token_embd_norm"],
];

/// Names of published files in [`LAYER_NAMES`].
const PUBLISHED: usize = 1;
/// Names of GGUF files there.
const GGUF: usize = 2;

impl SeededCheckpoint {
    /// The keys of `config.json` that only this family has.
    pub(super) fn nomic_config(&self) -> Value {
        let shape = &self.shape;
        json!({
            "hidden_size": shape.width(), "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "intermediate_size": shape.feed_forward, "hidden_act": "silu", "layer_norm_eps": 1e-12,
            "type_vocab_size": 2, "head_dim": shape.head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
        })
    }

    /// Every file's bytes by its path below the folder, of a Nomic BERT without a head in the form in which
    /// such models were published. `keys` are not used.
    ///
    /// # Panics
    /// As [`super::SeededEncoder::files`].
    pub fn published_nomic(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let shape = &self.shape;
        let config = json!({
            "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "activation_function": "swiglu",
            "n_embd": shape.width(), "n_layer": shape.layers, "n_head": shape.heads, "n_inner": shape.feed_forward,
            "n_positions": shape.positions, "vocab_size": vocabulary().len(), "type_vocab_size": 2,
            "layer_norm_epsilon": 1e-12, "rotary_emb_base": BASE, "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": false, "qkv_proj_bias": false, "mlp_fc1_bias": false,
            "mlp_fc2_bias": false, "prenorm": false, "causal": false,
        });
        let mut files: Files = shape.files();
        files.insert("config.json", json_file(&config));
        files.insert("model.safetensors", self.joined_nomic().file());
        files
    }

    /// The bytes of a GGUF file of the same model, as llama.cpp's converter writes it, with matrices in a
    /// type and these keys added, or with these values for keys that it has.
    ///
    /// # Panics
    /// When a row is no whole number of blocks of the type.
    pub fn nomic_gguf(&self, matrices: DType, keys: &[(&str, GgufValue)]) -> Vec<u8> {
        let mut plain = self.clone();
        plain.shape.dtype = DType::F32;
        let base = ("nomic-bert.rope.freq_base", GgufValue::F32(BASE));
        let given = keys.iter().any(|(key, _)| *key == base.0);
        let keys: Vec<_> = keys.iter().cloned().chain((!given).then_some(base)).collect();
        let format = GgufFormat { architecture: "nomic-bert", name: gguf_name, matrices };
        plain.shape.gguf_of(&format, &plain.joined_nomic(), &keys)
    }

    /// The tensors by the names of the library.
    pub(super) fn nomic_tensors(&self) -> Tensors {
        let (width, inner) = (self.shape.width(), self.shape.feed_forward);
        let mut tensors = Tensors { seed: self.shape.seed, dtype: self.shape.dtype, list: Vec::new() };
        tensors.matrix("embeddings.word_embeddings.weight", vocabulary().len(), width);
        tensors.matrix("embeddings.token_type_embeddings.weight", 2, width);
        tensors.norm("embeddings.LayerNorm", width);
        for layer in 0..self.shape.layers {
            let name = |part: &str| format!("layers.{layer}.{part}");
            for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                tensors.matrix(&name(&format!("self_attn.{part}.weight")), width, width);
            }
            tensors.norm(&name("post_attention_layernorm"), width);
            tensors.matrix(&name("mlp.up_proj.weight"), inner, width);
            tensors.matrix(&name("mlp.gate_proj.weight"), inner, width);
            tensors.matrix(&name("mlp.down_proj.weight"), width, inner);
            tensors.norm(&name("post_mlp_layernorm"), width);
        }
        tensors
    }

    /// The tensors by their published names, with the queries, keys and values of a layer in one.
    fn joined_nomic(&self) -> Tensors {
        let Tensors { seed, dtype, list: own } = self.nomic_tensors();
        let mut list: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for (name, shape, bytes) in own {
            let name = renamed(&name, [0, PUBLISHED]).expect("both lists have all tensors");
            match list.last_mut() {
                Some((last, rows, joined)) if *last == name => {
                    rows[0] += shape[0];
                    joined.extend(bytes);
                }
                _ => list.push((name, shape, bytes)),
            }
        }
        Tensors { seed, dtype, list }
    }
}

/// A tensor's name in another column of the lists.
fn renamed(name: &str, columns: [usize; 2]) -> Option<String> {
    const LAYERS: [&str; 3] = ["layers.", "encoder.layers.", "blk."];
    let [from, to] = columns;
    let (part, kind) = name.rsplit_once('.')?;
    if let Some(names) = WHOLE_NAMES.iter().find(|names| names[from] == part) {
        return Some(format!("{}.{kind}", names[to]));
    }
    let (layer, part) = part.strip_prefix(LAYERS[from])?.split_once('.')?;
    let names = LAYER_NAMES.iter().find(|names| names[from] == part)?;
    Some(format!("{}{layer}.{}.{kind}", LAYERS[to], names[to]))
}

/// The name of a published tensor in a GGUF file, and whether converters pack it.
fn gguf_name(name: &str) -> Option<(String, bool)> {
    let own = renamed(name, [PUBLISHED, GGUF])?;
    let is_packed = !own.contains("norm") && own != "token_types.weight";
    Some((own, is_packed))
}
