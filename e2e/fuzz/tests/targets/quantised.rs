//! A quantised checkpoint of a decoder: the first line of an input is `quantization_config`, the rest are the
//! weights.

use crate::{KIB, MIB, TIME, fuzz_made, split_line};
use serde_json::{Map, Value, json};
use std::path::Path;
use trustformers_fuzz::Bounds;
use trustformers_model::Model;

/// A weight of four bits becomes one of 32: the weights take eight times the input at most. The expression
/// that splits texts and the parsed header take some MiB.
const BOUNDS: Bounds = Bounds { input_bytes: 64 * KIB, heap_bytes: 32 * MIB, time: TIME };

const WIDTH: usize = 32;
const KEYS: usize = 16;
const LETTERS: usize = 26;

/// The projections of the one layer with their rows.
const PROJECTIONS: [(&str, usize); 7] = [
    ("self_attn.q_proj", WIDTH),
    ("self_attn.k_proj", KEYS),
    ("self_attn.v_proj", KEYS),
    ("self_attn.o_proj", WIDTH),
    ("mlp.gate_proj", WIDTH),
    ("mlp.up_proj", WIDTH),
    ("mlp.down_proj", WIDTH),
];

const WORDS: [&str; 12] = [
    "\"dtype\":\"I32\"",
    "\"F8_E4M3\"",
    "\"F8_E8M0\"",
    "\"shape\":[0,0]",
    "data_offsets",
    ".qweight",
    ".g_idx",
    ".weight_zero_point",
    "\"group_size\":",
    "\"weight_block_size\":[",
    "compressed-tensors",
    "-1",
];

/// A safetensors file in the making.
#[derive(Default)]
struct WeightFile {
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl WeightFile {
    fn add(&mut self, name: &str, dtype: &str, shape: &[usize], data: &[u8]) {
        let from = self.data.len();
        self.data.extend(data);
        let about = json!({"dtype": dtype, "shape": shape, "data_offsets": [from, self.data.len()]});
        self.header.insert(name.to_owned(), about);
    }

    /// A tensor whose bytes are all the same.
    fn plain(&mut self, name: &str, dtype: &str, shape: &[usize]) {
        let size = match dtype {
            "F8_E4M3" => 1,
            "F16" => 2,
            _ => 4,
        };
        self.add(name, dtype, shape, &vec![0x11; shape.iter().product::<usize>() * size]);
    }

    fn of_decoder() -> Self {
        let mut file = Self::default();
        file.plain("model.embed_tokens.weight", "F32", &[LETTERS, WIDTH]);
        for norm in
            ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
        {
            file.plain(&format!("{norm}.weight"), "F32", &[WIDTH]);
        }
        file
    }

    fn bytes(&self) -> Vec<u8> {
        let header = Value::Object(self.header.clone()).to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &self.data].concat()
    }
}

/// An input with all projections stored as `add` stores one of so many rows.
fn made(settings: &Value, add: impl Fn(&mut WeightFile, &str, usize)) -> Vec<u8> {
    let mut file = WeightFile::of_decoder();
    for (name, rows) in PROJECTIONS {
        add(&mut file, &format!("model.layers.0.{name}"), rows);
    }
    [settings.to_string().as_bytes(), b"\n", &file.bytes()].concat()
}

fn inputs() -> [Vec<u8>; 4] {
    let gptq = made(&json!({"quant_method": "gptq", "bits": 4, "group_size": 32}), |file, name, rows| {
        file.plain(&format!("{name}.qweight"), "I32", &[WIDTH / 8, rows]);
        file.plain(&format!("{name}.qzeros"), "I32", &[1, rows / 8]);
        file.plain(&format!("{name}.scales"), "F16", &[1, rows]);
    });
    let awq = made(&json!({"quant_method": "awq", "bits": 4, "group_size": 32}), |file, name, rows| {
        file.plain(&format!("{name}.qweight"), "I32", &[WIDTH, rows / 8]);
        file.plain(&format!("{name}.qzeros"), "I32", &[1, rows / 8]);
        file.plain(&format!("{name}.scales"), "F16", &[1, rows]);
    });
    let fp8 = made(&json!({"quant_method": "fp8", "weight_block_size": [16, 16]}), |file, name, rows| {
        file.plain(&format!("{name}.weight"), "F8_E4M3", &[rows, WIDTH]);
        file.plain(&format!("{name}.weight_scale_inv"), "F32", &[rows / 16, WIDTH / 16]);
    });
    let settings = json!({"quant_method": "compressed-tensors", "format": "pack-quantized"});
    let packed = made(&settings, |file, name, rows| {
        file.plain(&format!("{name}.weight_packed"), "I32", &[rows, WIDTH / 8]);
        file.plain(&format!("{name}.weight_scale"), "F16", &[rows, 1]);
        let shape = [rows as u64, WIDTH as u64].map(u64::to_le_bytes).concat();
        file.add(&format!("{name}.weight_shape"), "I64", &[2], &shape);
    });
    [gptq, awq, fp8, packed]
}

fn config(settings: &Value) -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": KEYS,
        "intermediate_size": WIDTH, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "vocab_size": LETTERS, "tie_word_embeddings": true, "eos_token_id": 0,
        "quantization_config": settings
    })
}

fn tokenizer() -> Value {
    let vocab: Map<String, Value> =
        ('a'..='z').zip(0..).map(|(letter, id): (char, u32)| (letter.to_string(), id.into())).collect();
    json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                  "merges": []}
    })
}

fn load(folder: &Path, input: &[u8]) -> String {
    let (line, weights) = split_line(input);
    let settings = serde_json::from_str(line).unwrap_or(Value::Null);
    std::fs::write(folder.join("config.json"), config(&settings).to_string()).unwrap();
    let path = folder.join("model.safetensors");
    // A file system writes one that is truncated to nothing to the disk at once, so it goes first.
    let _absent_at_first = std::fs::remove_file(&path);
    std::fs::write(&path, weights).unwrap();
    match Model::load(folder, &mut |_| {}) {
        Err(error) => error.to_string().replace(&folder.display().to_string(), ""),
        Ok(model) => {
            let mut row = vec![0.0; WIDTH];
            for (_, weight) in model.weights().iter().filter(|(_, weight)| weight.cols() == WIDTH) {
                (0..weight.rows()).for_each(|at| weight.dequantise_row(at, &mut row));
            }
            "loaded".to_owned()
        }
    }
}

#[test]
fn quantised() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    for input in inputs() {
        assert_eq!(load(folder.path(), &input), "loaded");
    }
    fuzz_made("quantised", &inputs(), &WORDS, BOUNDS, |input| load(folder.path(), input));
}
