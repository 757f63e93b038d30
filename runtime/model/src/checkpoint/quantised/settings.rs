//! `quantization_config` of `config.json`: which tensors are packed, and how. Every key is read, harmless, or
//! refused by name, because a key that is not read may change what the weights mean.

use super::{PackedModule, PackedProblem, Unpacked, fp8, integers};
use crate::checkpoint::CheckpointProblem;
use serde_json::{Map, Value};
use trustformers_plan::MatrixShape;

/// The key of `config.json`.
const KEY: &str = "quantization_config";

/// What can be read.
const METHODS: &str = "fp8, gptq and awq (four bits), compressed-tensors (pack-quantized, int-quantized, \
     naive-quantized, float-quantized)";

/// How the weights of a checkpoint are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quantisation {
    /// `F8_E4M3`, with a scale for each block, row or tensor.
    Fp8 {
        /// Rows and columns of a block; `None` where tensors or rows have one scale.
        block: Option<MatrixShape>,
    },
    /// GPTQ with four bits.
    Gptq {
        /// Columns of a group; `None` where rows have one scale.
        group: Option<usize>,
        /// Whether zeros are stored less one, as in the first version of the format.
        less_one: bool,
    },
    /// AWQ with four bits.
    Awq {
        /// Columns of a group; `None` where rows have one scale.
        group: Option<usize>,
    },
    /// The library of that name. Its tensors say the rest.
    CompressedTensors {
        /// Rows and columns of a block of `F8_E4M3`.
        block: Option<MatrixShape>,
    },
}

/// Without effect on the weights: how they were found, and which modules were left out, which their tensors
/// show.
const HARMLESS: [&str; 42] = [
    "quant_method",
    "activation_scheme",
    "amp",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "dequantize",
    "desc_act",
    "disable_exllama",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "global_compression_ratio",
    "ignore",
    "ignored_layers",
    "lm_head",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "modules_to_fuse",
    "modules_to_not_convert",
    "mse",
    "pad_token_id",
    "quant_type",
    "quantization_status",
    "quantizer",
    "scale_fmt",
    "static_groups",
    "sym",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
    "zero_point",
];

impl Quantisation {
    /// Takes the settings out of `config.json`; `None` where its weights are plain.
    pub(crate) fn take(config: &mut Map<String, Value>) -> Result<Option<Self>, CheckpointProblem> {
        let Some(value) = config.remove(KEY) else { return Ok(None) };
        let Value::Object(settings) = value else {
            return Err(CheckpointProblem::key(KEY, "it is not an object".to_owned()));
        };
        let settings = Settings(settings);
        let method = settings.text("quant_method")?.unwrap_or_default();
        let (own, read): (Self, &[&str]) = match method {
            "fp8" => (settings.fp8()?, &["fmt", "weight_block_size"]),
            "gptq" => (
                settings.gptq()?,
                &["bits", "group_size", "checkpoint_format", "format", "pack_dtype", "dynamic"],
            ),
            "awq" => (settings.awq()?, &["bits", "w_bit", "group_size", "q_group_size", "version"]),
            "compressed-tensors" => (
                settings.compressed_tensors()?,
                &[
                    "config_groups",
                    "format",
                    "kv_cache_scheme",
                    "sparsity_config",
                    "transform_config",
                    "version",
                ],
            ),
            other => {
                let why = format!("{other:?} is not supported; supported: {METHODS}");
                return Err(CheckpointProblem::key(&inside("quant_method"), why));
            }
        };
        let unread = |key: &&String| !read.contains(&key.as_str()) && !HARMLESS.contains(&key.as_str());
        match settings.0.keys().find(unread) {
            None => Ok(Some(own)),
            Some(key) => {
                let model_type = format!("{method} checkpoints");
                Err(CheckpointProblem::UnreadConfigKey { key: inside(key), model_type })
            }
        }
    }

    /// Its name in `config.json`.
    pub(super) fn method(self) -> &'static str {
        match self {
            Self::Fp8 { .. } => "fp8",
            Self::Gptq { .. } => "gptq",
            Self::Awq { .. } => "awq",
            Self::CompressedTensors { .. } => "compressed-tensors",
        }
    }

    /// The weights of a module.
    pub(super) fn unpack(self, module: &mut PackedModule) -> Result<Unpacked, PackedProblem> {
        let (block, has_integers) = match self {
            Self::Gptq { group, less_one } => return integers::gptq(module, group, less_one),
            Self::Awq { group } => return integers::awq(module, group),
            Self::Fp8 { block } => (block, false),
            Self::CompressedTensors { block } => (block, true),
        };
        match module.take("weight") {
            Some(weight) if has_integers && weight.tensor.stored_as == integers::BYTES => {
                integers::bytes(module, &weight)
            }
            Some(weight) => fp8::unpack(module, &weight, block),
            None if has_integers => integers::packed(module),
            None => Err(integers::lacking(module, "weight")),
        }
    }
}

fn inside(key: &str) -> String {
    format!("{KEY}.{key}")
}

/// The object `quantization_config`.
struct Settings(Map<String, Value>);

impl Settings {
    fn text(&self, key: &str) -> Result<Option<&str>, CheckpointProblem> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(CheckpointProblem::key(&inside(key), format!("{other} is not a text"))),
        }
    }

    /// Refuses a text that is none of these.
    fn one_of(&self, key: &str, supported: &[&str]) -> Result<(), CheckpointProblem> {
        match self.text(key)?.filter(|text| !supported.contains(text)) {
            None => Ok(()),
            Some(text) => {
                let why = format!("{text:?} is not supported; supported: {}", supported.join(", "));
                Err(CheckpointProblem::key(&inside(key), why))
            }
        }
    }

    /// Refuses an object or list with something in it.
    fn empty(&self, key: &str) -> Result<(), CheckpointProblem> {
        let is_empty = match self.0.get(key) {
            None => true,
            Some(Value::Object(entries)) => entries.is_empty(),
            Some(Value::Array(entries)) => entries.is_empty(),
            Some(_) => false,
        };
        if is_empty {
            return Ok(());
        }
        Err(CheckpointProblem::key(
            &inside(key),
            "it is not supported; quantise the model without it".to_owned(),
        ))
    }

    /// Refuses weights of other than four bits.
    fn four_bits(&self, keys: [&str; 2]) -> Result<(), CheckpointProblem> {
        for key in keys {
            if let Some(bits) = self.0.get(key).filter(|bits| bits.as_u64() != Some(4)) {
                return Err(CheckpointProblem::key(
                    &inside(key),
                    format!("{bits} is not supported; only 4 is"),
                ));
            }
        }
        Ok(())
    }

    /// Columns of a group under the first of these keys; -1 stands for whole rows.
    fn group(&self, keys: [&str; 2]) -> Result<Option<usize>, CheckpointProblem> {
        let Some((key, value)) = keys.into_iter().find_map(|key| Some((key, self.0.get(key)?))) else {
            let why = "it is missing; it says how many columns share a scale".to_owned();
            return Err(CheckpointProblem::key(&inside(keys[0]), why));
        };
        match value.as_i64() {
            Some(-1) => Ok(None),
            Some(size @ 1..=0xffff_ffff) => Ok(usize::try_from(size).ok()),
            _ => Err(CheckpointProblem::key(&inside(key), format!("{value} is neither a count nor -1"))),
        }
    }

    fn block(&self, key: &str, value: Option<&Value>) -> Result<Option<MatrixShape>, CheckpointProblem> {
        let Some(value) = value else { return Ok(None) };
        let size = |value: &Value| {
            let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
            size.filter(|size| (1..=u32::MAX as usize).contains(size))
        };
        let sizes: Option<Vec<usize>> = value.as_array().and_then(|sizes| sizes.iter().map(size).collect());
        match sizes.as_deref() {
            Some([rows, cols]) => Ok(Some(MatrixShape { rows: *rows, cols: *cols })),
            _ => {
                let why = format!("{value} is not a pair of rows and columns");
                Err(CheckpointProblem::key(&inside(key), why))
            }
        }
    }

    fn fp8(&self) -> Result<Quantisation, CheckpointProblem> {
        self.one_of("fmt", &["e4m3", "float8_e4m3fn"])?;
        let key = "weight_block_size";
        Ok(Quantisation::Fp8 { block: self.block(key, self.0.get(key))? })
    }

    fn gptq(&self) -> Result<Quantisation, CheckpointProblem> {
        self.four_bits(["bits", "bits"])?;
        self.one_of("pack_dtype", &["int32"])?;
        self.empty("dynamic")?;
        // Some libraries write the version of the format under one key, some under the other.
        let versions = ["gptq", "gptq_v2"];
        self.one_of("checkpoint_format", &versions)?;
        self.one_of("format", &versions)?;
        let version = self.text("checkpoint_format")?.or(self.text("format")?).unwrap_or(versions[0]);
        let group = self.group(["group_size", "group_size"])?;
        Ok(Quantisation::Gptq { group, less_one: version == versions[0] })
    }

    fn awq(&self) -> Result<Quantisation, CheckpointProblem> {
        self.four_bits(["bits", "w_bit"])?;
        self.one_of("version", &["gemm", "GEMM"])?;
        Ok(Quantisation::Awq { group: self.group(["group_size", "q_group_size"])? })
    }

    fn compressed_tensors(&self) -> Result<Quantisation, CheckpointProblem> {
        let formats =
            ["pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision"];
        self.one_of("format", &formats)?;
        for key in ["kv_cache_scheme", "transform_config"] {
            self.empty(key)?;
        }
        let sparsity = self.0.get("sparsity_config").and_then(|config| config.get("format"));
        if let Some(format) = sparsity.filter(|format| format.as_str() != Some("dense")) {
            let why = format!("{format} is not supported; only \"dense\" is");
            return Err(CheckpointProblem::key(&inside("sparsity_config.format"), why));
        }
        let mut block = None;
        let groups = self.0.get("config_groups").and_then(Value::as_object);
        for (name, group) in groups.into_iter().flatten() {
            let own = format!("config_groups.{name}.weights");
            if let Some(format) = group.get("format").and_then(Value::as_str).filter(|f| !formats.contains(f))
            {
                let why = format!("{format:?} is not supported; supported: {}", formats.join(", "));
                return Err(CheckpointProblem::key(&inside(&format!("config_groups.{name}.format")), why));
            }
            let Some(weights) = group.get("weights") else { continue };
            let kind = (
                weights.get("type").and_then(Value::as_str),
                weights.get("num_bits").and_then(Value::as_u64),
            );
            if !matches!(kind, (Some("int"), Some(4 | 8)) | (Some("float"), Some(8))) {
                let why = format!(
                    "type {:?} with {:?} bits is not supported; supported: int with 4 or 8, float with 8",
                    kind.0.unwrap_or_default(),
                    kind.1.unwrap_or_default()
                );
                return Err(CheckpointProblem::key(&inside(&own), why));
            }
            block = block.or(self.block(&format!("{own}.block_structure"), weights.get("block_structure"))?);
        }
        Ok(Quantisation::CompressedTensors { block })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn take(settings: Value) -> Result<Option<Quantisation>, String> {
        let mut config = Map::from_iter([(KEY.to_owned(), settings)]);
        let taken = Quantisation::take(&mut config).map_err(|problem| problem.to_string());
        assert!(config.is_empty());
        taken
    }

    #[test]
    fn settings_of_every_method_are_read() {
        let square = MatrixShape { rows: 128, cols: 128 };
        let cases = [
            (
                json!({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}),
                Quantisation::Fp8 { block: Some(square) },
            ),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": true, "sym": true}),
                Quantisation::Gptq { group: Some(128), less_one: true },
            ),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"}),
                Quantisation::Gptq { group: None, less_one: false },
            ),
            (
                json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": true}),
                Quantisation::Awq { group: Some(64) },
            ),
            (
                json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {
                    "weights": {"type": "float", "num_bits": 8, "block_structure": [128, 128]}}}}),
                Quantisation::CompressedTensors { block: Some(square) },
            ),
        ];
        for (settings, expected) in cases {
            assert_eq!(take(settings.clone()), Ok(Some(expected)), "{settings}");
        }
        assert_eq!(Quantisation::take(&mut Map::new()), Ok(None));
    }

    #[test]
    fn variants_that_are_not_read_are_refused_by_name() {
        let gptq = |key: &str, value: Value| {
            let mut settings = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
            settings[key] = value;
            settings
        };
        let compressed = |key: &str, value: Value| {
            let mut settings = json!({"quant_method": "compressed-tensors", "format": "pack-quantized"});
            settings[key] = value;
            settings
        };
        let four_bit_floats = json!({"group_0": {"weights": {"type": "float", "num_bits": 4}}});
        let cases = [
            (json!({"quant_method": "bitsandbytes"}), "quantization_config.quant_method: \"bitsandbytes\""),
            (json!({"load_in_4bit": true}), "quantization_config.quant_method: \"\""),
            (json!(4), "it is not an object"),
            (gptq("bits", json!(3)), "quantization_config.bits: 3 is not supported; only 4 is"),
            (gptq("checkpoint_format", json!("marlin")), "checkpoint_format: \"marlin\" is not supported"),
            (
                gptq("dynamic", json!({"+:.*": {"bits": 8}})),
                "quantization_config.dynamic: it is not supported",
            ),
            (gptq("group_size", json!(0)), "0 is neither a count nor -1"),
            (gptq("rotation", json!("hadamard")), "key quantization_config.rotation is not part of gptq"),
            (json!({"quant_method": "awq", "bits": 4}), "quantization_config.group_size: it is missing"),
            (
                json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}),
                "version: \"gemv\" is not supported; supported: gemm",
            ),
            (
                json!({"quant_method": "fp8", "fmt": "e5m2"}),
                "quantization_config.fmt: \"e5m2\" is not supported; supported: e4m3",
            ),
            (
                json!({"quant_method": "fp8", "weight_block_size": [0, 1]}),
                "[0,1] is not a pair of rows and columns",
            ),
            (compressed("format", json!("nvfp4-pack-quantized")), "format: \"nvfp4-pack-quantized\""),
            (compressed("config_groups", four_bit_floats), "type \"float\" with 4 bits is not supported"),
            (compressed("transform_config", json!({"a": 1})), "transform_config: it is not supported"),
            (compressed("sparsity_config", json!({"format": "sparse-24"})), "only \"dense\" is"),
        ];
        for (settings, expected) in cases {
            let refused = take(settings.clone()).unwrap_err();
            assert!(refused.contains(expected), "{settings}: {refused}");
        }
    }
}
