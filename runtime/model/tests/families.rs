//! Small seeded models of every family answer as transformers does in float32: from a GGUF file, and from the
//! checkpoint that transformers would write. `e2e/reference/families.py` made the expectations.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use trustformers_model::gguf::{Gguf, GgufValue};
use trustformers_model::seeded::{SeededFamily, SeededModel};
use trustformers_model::{Model, PlanRequest};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Backend, DType, Executable, FusedOps, KvType, Limits, LoadSpec, LogitsRows, Numerics, SequenceStep,
    StepInput, StepOutput,
};

/// What a file of `tests/reference` holds.
#[derive(Deserialize)]
struct Case {
    config: Value,
    /// For each tensor of the checkpoint its name in a GGUF file, and how its values differ from that file's.
    tensors: BTreeMap<String, (String, String)>,
    ids: Vec<u32>,
    positions: Vec<usize>,
    logits: Vec<Vec<f32>>,
    /// The last logits of fewer tokens, for a family whose rotation depends on the length.
    short: Vec<f32>,
}

impl Case {
    fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/reference/{name}.json"));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }
}

/// Tokens of the short text: within the original context of the seeded Phi-3.
const SHORT_TOKENS: usize = 28;
/// Longest sequence of the plans.
const CONTEXT_TOKENS: usize = 64;
/// The original context of the seeded Phi-3.
const ORIGINAL_CONTEXT_TOKENS: usize = 32;

/// Largest difference of a logit, as a share of the largest: sums in f32 here and in f64 there.
const SHARE: f32 = 1e-4;

const CASES: [&str; 16] = [
    "gemma2",
    "gemma3",
    "gpt2",
    "granite",
    "linear",
    "llama",
    "llama3",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "yarn",
];

fn seeded(name: &str) -> SeededModel {
    let (family, layers) = match name {
        "llama" | "llama3" | "linear" | "mistral" => (SeededFamily::Llama, 2),
        "qwen2" | "yarn" => (SeededFamily::Qwen2, 2),
        "qwen3" => (SeededFamily::Qwen3, 2),
        "smollm3" => (SeededFamily::SmolLm3, 4),
        "olmo2" => (SeededFamily::Olmo2, 2),
        "granite" => (SeededFamily::Granite, 2),
        "phi3" => (SeededFamily::Phi3, 2),
        "gemma2" => (SeededFamily::Gemma2, 2),
        "gemma3" => (SeededFamily::Gemma3, 6),
        "gpt2" => (SeededFamily::Gpt2, 2),
        "mixtral" => (SeededFamily::Mixtral, 2),
        "qwen3_moe" => (SeededFamily::Qwen3Moe, 2),
        other => panic!("no family for {other}"),
    };
    SeededModel { family, layers, ..SeededModel::default() }
}

/// The GGUF file of a case. A file of Llama 3 would store its scaled frequencies, which this one does not.
fn gguf(name: &str) -> Vec<u8> {
    let text = |t: &str| GgufValue::String(t.to_owned());
    let keys: Vec<(&str, GgufValue)> = match name {
        "mistral" => vec![("llama.attention.sliding_window", GgufValue::U32(16))],
        "linear" => vec![
            ("llama.rope.scaling.type", text("linear")),
            ("llama.rope.scaling.factor", GgufValue::F32(4.0)),
        ],
        "yarn" => vec![
            ("qwen2.rope.scaling.type", text("yarn")),
            ("qwen2.rope.scaling.factor", GgufValue::F32(4.0)),
            ("qwen2.rope.scaling.original_context_length", GgufValue::U32(64)),
        ],
        _ => Vec::new(),
    };
    seeded(name).gguf_with(&keys)
}

/// A model on the oracle.
struct Runner(Box<dyn Executable>);

impl Runner {
    fn new(model: &Model, context_tokens: usize) -> Self {
        let limits = Limits { rows: CONTEXT_TOKENS, sequences: 1, logits_rows: CONTEXT_TOKENS };
        let plan = model.plan(&PlanRequest { context_tokens, limits, fused: FusedOps::NONE }).unwrap();
        let spec = LoadSpec {
            weights: Arc::clone(model.weights()),
            plan: &plan,
            kv_blocks: 4,
            kv_type: KvType::F32,
            numerics: Numerics::Exact,
            progress: &mut |_| {},
        };
        Self(Oracle::new().load(spec).unwrap().compile(&plan).unwrap())
    }

    /// The logits after each of `ids[from..to]`, whose predecessors are cached.
    fn step(&mut self, ids: &[u32], from: usize, to: usize) -> Vec<Vec<f32>> {
        let mut input = StepInput::new();
        input.push_sequence(SequenceStep {
            tokens: &ids[from..to],
            cached_tokens: from,
            blocks: &[2, 0, 3, 1][..to.div_ceil(16)],
            logits: LogitsRows::All,
        });
        let mut output = StepOutput::new();
        self.0.submit(&input).unwrap();
        self.0.wait(&mut output).unwrap();
        (0..output.rows()).map(|row| output.row(row).to_vec()).collect()
    }
}

fn near(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    let off = found.iter().zip(expected).fold(0.0_f32, |most, (f, e)| most.max((f - e).abs()));
    assert!(off <= SHARE * largest, "{what}: off by {off} where the largest is {largest}");
}

/// Compares a model with a case: the whole text in one step, and in a prompt and single tokens.
fn check(what: &str, model: &Model, case: &Case) {
    let whole = Runner::new(model, CONTEXT_TOKENS).step(&case.ids, 0, case.ids.len());
    for (position, expected) in case.positions.iter().zip(&case.logits) {
        near(&format!("{what}, position {position}"), &whole[*position], expected);
    }
    let mut runner = Runner::new(model, CONTEXT_TOKENS);
    runner.step(&case.ids, 0, 21);
    for (from, expected) in whole.iter().enumerate().skip(21) {
        let one = runner.step(&case.ids, from, from + 1);
        near(&format!("{what}, token {from} alone"), &one[0], expected);
    }
    if !case.short.is_empty() {
        let short = Runner::new(model, ORIGINAL_CONTEXT_TOKENS).step(&case.ids, 0, SHORT_TOKENS);
        near(&format!("{what}, short"), &short[SHORT_TOKENS - 1], &case.short);
    }
}

#[test]
fn gguf_files_of_every_family_answer_as_the_reference() {
    for name in CASES.into_iter().filter(|name| *name != "llama3") {
        let model = Model::from_bytes(Path::new("seeded.gguf"), Arc::new(gguf(name))).unwrap();
        check(name, &model, &Case::read(name));
    }
}

#[test]
fn a_model_in_two_gguf_files_answers_as_in_one() {
    let folder = tempfile::tempdir().unwrap();
    let name = |number: usize| folder.path().join(format!("qwen3-0000{number}-of-00002.gguf"));
    for (part, number) in seeded("qwen3").gguf_in_parts().iter().zip(1..) {
        std::fs::write(name(number), part).unwrap();
    }
    let model = Model::load(&name(1), &mut |_| {}).unwrap();
    check("qwen3 in two files", &model, &Case::read("qwen3"));
    let whole = Model::from_bytes(Path::new("m.gguf"), Arc::new(gguf("qwen3"))).unwrap();
    assert_eq!(model.facts().parameters, whole.facts().parameters);
    let second = Model::load(&name(2), &mut |_| {}).unwrap_err().to_string();
    assert!(second.contains("part 2 of 2") && second.contains("NAME-00001-of-00002.gguf"), "{second}");
    std::fs::remove_file(name(2)).unwrap();
    let lacking = Model::load(&name(1), &mut |_| {}).unwrap_err().to_string();
    assert!(lacking.contains("qwen3-00002-of-00002.gguf"), "{lacking}");
}

#[test]
fn checkpoints_of_every_family_answer_as_the_reference() {
    for name in CASES {
        let case = Case::read(name);
        for files in [1, 2] {
            let folder = tempfile::tempdir().unwrap();
            write_checkpoint(folder.path(), name, &case, files);
            let model = Model::load(folder.path(), &mut |_| {}).unwrap();
            check(&format!("{name} in {files} files"), &model, &case);
            assert_eq!(model.tokenizer().eos_ids(), [2]);
        }
    }
}

#[test]
fn a_quantised_checkpoint_answers_as_the_plain_one_with_its_values() {
    let case = Case::read("llama");
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for folder in &folders {
        write_checkpoint(folder.path(), "llama", &case, 1);
    }
    let [plain, packed] = folders.each_ref().map(tempfile::TempDir::path);
    quantise(plain, packed);
    let mut config = case.config.clone();
    config["quantization_config"] = json!({"quant_method": "compressed-tensors", "format": "int-quantized"});
    std::fs::write(packed.join("config.json"), config.to_string()).unwrap();
    let load = |folder: &Path| Model::load(folder, &mut |_| {}).unwrap();
    let (plain, packed) = (load(plain), load(packed));
    let types = packed.weights().iter().filter(|(_, weight)| weight.dtype() == DType::Q8_0).count();
    assert_eq!(types, 14, "seven projections of two layers");
    assert_eq!(packed.facts().parameters, plain.facts().parameters);
    let logits = |model: &Model| Runner::new(model, CONTEXT_TOKENS).step(&case.ids, 0, case.ids.len());
    let (expected, found) = (logits(&plain), logits(&packed));
    for (position, (found, expected)) in found.iter().zip(&expected).enumerate() {
        near(&format!("position {position}"), found, expected);
    }
}

/// Rounds the projections of the checkpoint in `plain` to bytes with a scale for each row, and writes the
/// bytes to `packed`.
fn quantise(plain: &Path, packed: &Path) {
    let stored = std::fs::read(plain.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&stored).unwrap();
    let (mut rounded, mut bytes) = (Vec::new(), Vec::new());
    for (name, view) in tensors.tensors() {
        let Some(module) = name.strip_suffix("_proj.weight") else {
            for list in [&mut rounded, &mut bytes] {
                list.push((name.clone(), view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            }
            continue;
        };
        let cols = view.shape()[1];
        let values: Vec<f32> =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        // A power of two, which every type of scales has.
        let scales = vec![2.0_f32.powi(-6); view.shape()[0]];
        let quants: Vec<i8> = values.iter().map(|value| (value * 64.0).round() as i8).collect();
        let values = quants.iter().flat_map(|q| (f32::from(*q) * scales[0]).to_le_bytes()).collect();
        rounded.push((name.clone(), Dtype::F32, view.shape().to_vec(), values));
        let quants = quants.iter().map(|q| q.cast_unsigned()).collect();
        bytes.push((name.clone(), Dtype::I8, vec![scales.len(), cols], quants));
        let scale = format!("{module}_proj.weight_scale");
        let values = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        bytes.push((scale, Dtype::F32, vec![scales.len(), 1], values));
    }
    for (folder, list) in [(plain, rounded), (packed, bytes)] {
        let views = list.iter().map(|(name, dtype, shape, data)| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let written = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        std::fs::write(folder.join("model.safetensors"), written).unwrap();
    }
}

#[test]
fn unread_keys_and_missing_files_of_a_checkpoint_are_named() {
    let case = Case::read("qwen3");
    let refused = |change: &dyn Fn(&mut Value)| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = case.config.clone();
        change(&mut config);
        write_checkpoint(folder.path(), "qwen3", &Case { config, ..Case::read("qwen3") }, 1);
        Model::load(folder.path(), &mut |_| {}).unwrap_err().to_string()
    };
    let error = refused(&|config| config["attention_chunk_size"] = 8192.into());
    assert!(error.contains("config.json: key attention_chunk_size is not part of qwen3"), "{error}");
    let error = refused(&|config| config["rope_parameters"]["rope_type"] = "dynamic".into());
    assert!(error.contains("rope_type \"dynamic\" is not supported"), "{error}");
    let error = refused(&|config| config["num_key_value_heads"] = 3.into());
    assert!(
        error.contains("key num_key_value_heads: 3 does not divide the 4 of num_attention_heads"),
        "{error}"
    );
    let error = refused(&|config| config["architectures"] = json!(["Qwen3ForTokenClassification"]));
    assert!(error.contains("a class that generates text"), "{error}");
    let error = refused(&|config| config["intermediate_size"] = 64.into());
    assert!(error.contains("tensor model.layers.0.mlp.gate_proj.weight: it is 128 x 48"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), "qwen3", &case, 2);
    std::fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    let error = Model::load(folder.path(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("model-00002-of-00002.safetensors: it is named by model.safetensors.index.json"));
}

/// Writes the checkpoint of a case, with its weights in one file or two.
fn write_checkpoint(folder: &Path, name: &str, case: &Case, files: usize) {
    let file = gguf(name);
    let parsed = Gguf::parse(&file).unwrap();
    let heads = |own: &str| if own.contains("attn_q") { seeded(name).heads } else { seeded(name).kv_heads };
    let mut tensors: BTreeMap<&str, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (stored, (own, how)) in &case.tensors {
        let info = parsed.tensor(own).unwrap_or_else(|| panic!("{name} has no tensor {own}"));
        let values: Vec<f32> = file[info.range.clone()]
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let mut shape: Vec<usize> = info.dims.iter().rev().copied().collect();
        let values = match how.as_str() {
            "same" => values,
            "less one" => values.iter().map(|v| v - 1.0).collect(),
            "transposed" => {
                shape.reverse();
                transposed(&values, shape[0])
            }
            "unpermuted" => unpermuted(&values, heads(own)),
            expert if expert.starts_with("expert ") => {
                let index: usize = expert["expert ".len()..].parse().unwrap();
                shape[0] /= 4;
                let len = values.len() / 4;
                values[index * len..(index + 1) * len].to_vec()
            }
            other => panic!("{other}"),
        };
        tensors.insert(stored, (shape, values.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }
    let names = |index: usize| format!("model-0000{}-of-00002.safetensors", index + 1);
    let half = if files == 1 { tensors.len() } else { tensors.len() / 2 };
    let list: Vec<_> = tensors.iter().collect();
    for (index, part) in list.chunks(half.max(1)).enumerate().take(2) {
        // An odd number leaves one tensor more than two halves, which the last file takes.
        let part = if index == 1 { &list[half..] } else { part };
        let views = part.iter().map(|(name, (shape, bytes))| {
            (name.to_string(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        let written = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        let file_name = if files == 1 { "model.safetensors".to_owned() } else { names(index) };
        std::fs::write(folder.join(file_name), written).unwrap();
    }
    if files == 2 {
        let map: BTreeMap<&str, String> =
            list.iter().enumerate().map(|(i, (name, _))| (**name, names(usize::from(i >= half)))).collect();
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    }
    std::fs::write(folder.join("config.json"), case.config.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), tokenizer(&file, &parsed)).unwrap();
}

/// A matrix of `rows` rows from its transpose.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let cols = values.len() / rows;
    (0..rows).flat_map(|row| (0..cols).map(move |col| values[col * rows + row])).collect()
}

/// Rows of queries or keys as they were trained, from rows whose neighbours rotate together.
fn unpermuted(values: &[f32], heads: usize) -> Vec<f32> {
    let head_dim = SeededModel::default().head_dim;
    let width = values.len() / heads / head_dim;
    let row_of = |row: usize| {
        let (head, within) = (row / head_dim, row % head_dim);
        let (side, pair) = (within / (head_dim / 2), within % (head_dim / 2));
        head * head_dim + 2 * pair + side
    };
    (0..heads * head_dim).flat_map(|row| values[row_of(row) * width..][..width].to_vec()).collect()
}

/// The tokenizer of the GGUF file as the tokenizers library writes it.
fn tokenizer(file: &[u8], gguf: &Gguf) -> String {
    let texts = |key: &str| -> Vec<String> {
        let list = gguf.metadata.array(key, file).unwrap();
        list.strings().unwrap().map(str::to_owned).collect()
    };
    let tokens = texts("tokenizer.ggml.tokens");
    let vocab: BTreeMap<&str, usize> = tokens.iter().enumerate().map(|(id, t)| (t.as_str(), id)).collect();
    let merges: Vec<Vec<String>> = texts("tokenizer.ggml.merges")
        .iter()
        .map(|merge| merge.split(' ').map(str::to_owned).collect())
        .collect();
    let added: Vec<Value> = tokens[..3]
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    })
    .to_string()
}
