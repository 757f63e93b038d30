//! Adapters (LoRA) as PEFT's `save_pretrained` writes them: `adapter_config.json` beside
//! `adapter_model.safetensors`.
//!
//! Only the plain form of LoRA is read. A key of the configuration that changes what an adapter computes and
//! is not read is refused by name, as is a tensor that is not one of a projection.

use crate::checkpoint::{CheckpointFiles, CheckpointProblem, StoredTensor, StoredTensors};
use crate::error::LoadError;
use crate::source::OnRead;
use crate::{Model, PlanRequest, TensorProblem};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use trustformers_plan::{Adapter, FusedOps, Limits, LowRank, Op, PlanError, RopeLayout, Weight, WeightId};

/// The settings of the training.
const CONFIG: &str = "adapter_config.json";
/// The matrices.
const WEIGHTS: &str = "adapter_model.safetensors";

/// What a name of a tensor begins with, and how it ends in the two matrices of a projection.
const PREFIX: &str = "base_model.model.";
const DOWN: &str = ".lora_A.weight";
const UP: &str = ".lora_B.weight";

/// Projections of a layer by their names in transformers and in GGUF files.
const GGUF_PROJECTIONS: [(&str, &str); 7] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Keys that are about the training, or that the tensors show: the names of the projections, the ranks.
const WITHOUT_EFFECT: [&str; 18] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
];

/// Ways to begin a training that leave the model as it is. Others train against a changed model.
const INITIALISATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// What of `adapter_config.json` decides how a change is scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
struct LoraConfig {
    rank: usize,
    alpha: f32,
    /// Whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
    stabilised: bool,
    /// Whether ranks differ between projections.
    mixed_ranks: bool,
}

impl LoraConfig {
    fn of(keys: &BTreeMap<String, Value>) -> Result<Self, CheckpointProblem> {
        let own = Self {
            rank: size(keys, "r")?,
            alpha: number(keys, "lora_alpha")?,
            stabilised: keys.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            mixed_ranks: keys.get("rank_pattern").is_some_and(|pattern| !is_neutral(pattern)),
        };
        let text = |key: &str| keys.get(key).and_then(Value::as_str);
        if text("peft_type") != Some("LORA") {
            let found = keys.get("peft_type").map_or_else(|| "missing".to_owned(), Value::to_string);
            return Err(CheckpointProblem::unsupported("peft_type", found, "LORA"));
        }
        if let Some(task) = text("task_type").filter(|task| *task != "CAUSAL_LM") {
            return Err(CheckpointProblem::unsupported("task_type", task, "CAUSAL_LM, or none"));
        }
        if let Some(how) = text("init_lora_weights").filter(|how| !INITIALISATIONS.contains(how)) {
            return Err(CheckpointProblem::unsupported("init_lora_weights", how, "true, false or gaussian"));
        }
        let is_read = |key: &str| {
            let read = ["r", "lora_alpha", "use_rslora", "peft_type", "task_type", "init_lora_weights"];
            read.contains(&key) || WITHOUT_EFFECT.contains(&key)
        };
        let is_plain = |key: &str, value: &Value| is_neutral(value) || key == "bias" && value == "none";
        match keys.iter().find(|(key, value)| !is_read(key) && !is_plain(key, value)) {
            Some((key, value)) => {
                Err(CheckpointProblem::UnreadKey { key: key.clone(), found: value.to_string() })
            }
            None => Ok(own),
        }
    }

    fn scale(&self, rank: usize) -> f32 {
        let rank = rank as f32;
        self.alpha / if self.stabilised { rank.sqrt() } else { rank }
    }
}

/// Whether a value of a key says that it is not used.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
    }
}

fn size(keys: &BTreeMap<String, Value>, key: &'static str) -> Result<usize, CheckpointProblem> {
    let given = keys.get(key).and_then(Value::as_u64).and_then(|size| u32::try_from(size).ok());
    match given {
        Some(size) if size > 0 => Ok(size as usize),
        _ => {
            Err(CheckpointProblem::Malformed { key, why: "it must be a whole number above zero".to_owned() })
        }
    }
}

fn number(keys: &BTreeMap<String, Value>, key: &'static str) -> Result<f32, CheckpointProblem> {
    let given = keys.get(key).and_then(Value::as_f64).map(|number| number as f32);
    given
        .filter(|number| number.is_finite())
        .ok_or_else(|| CheckpointProblem::Malformed { key, why: "it must be a number".to_owned() })
}

/// The two matrices of a projection.
#[derive(Debug, Default, Clone, Copy)]
struct MatrixPair<'a> {
    down: Option<&'a StoredTensor>,
    up: Option<&'a StoredTensor>,
}

/// What the model has that adapters can change.
struct Projections {
    weights: BTreeSet<WeightId>,
    /// Elements of a head whose halves lie side by side in the file, element by element, as GGUF files of
    /// Llamas store queries and keys. `None` where heads are stored as transformers store them.
    interleaved_head: Option<usize>,
}

impl Model {
    /// Reads an adapter of this model, under a name for messages.
    ///
    /// # Errors
    /// The first problem of a file, by name; [`LoadError::is_transient`] separates failing storage.
    pub fn read_adapter(&self, name: &str, files: &CheckpointFiles) -> Result<Adapter, LoadError> {
        self.read_adapter_while(name, files, &mut |_| ControlFlow::Continue(()))
    }

    /// [`Self::read_adapter`], which ends early where `progress` says so.
    ///
    /// # Errors
    /// As [`Self::read_adapter`], and [`LoadError::Stopped`].
    pub fn read_adapter_while(
        &self,
        name: &str,
        files: &CheckpointFiles,
        progress: &mut OnRead<'_>,
    ) -> Result<Adapter, LoadError> {
        let keys: Option<BTreeMap<String, Value>> = files.optional_json(CONFIG)?;
        let keys = keys.ok_or_else(|| files.wrong(CONFIG, CheckpointProblem::NoAdapter))?;
        let config = LoraConfig::of(&keys).map_err(|problem| files.wrong(CONFIG, problem))?;
        let stored = files.tensors_in(WEIGHTS, CheckpointProblem::NoAdapter, progress)?;
        let projections =
            self.projections().map_err(|problem| LoadError::Plan { path: files.path(WEIGHTS), problem })?;
        let changes = self.changes(&config, &stored, &projections);
        let changes = changes.map_err(|problem| files.wrong(WEIGHTS, problem))?;
        Ok(Adapter { name: name.to_owned(), changes })
    }

    /// Read from the plan, so that it holds for every architecture.
    fn projections(&self) -> Result<Projections, PlanError> {
        let limits = Limits { rows: 1, sequences: 1, logits_rows: 1 };
        let context_tokens = self.facts().context_tokens;
        let plan = self.plan(&PlanRequest { context_tokens, limits, fused: FusedOps::NONE })?;
        let mut projections = Projections { weights: BTreeSet::new(), interleaved_head: None };
        for op in plan.ops() {
            match op {
                Op::MatMul { segments, .. } => {
                    projections.weights.extend(segments.iter().map(|segment| segment.weight));
                }
                Op::Rope { spec, .. }
                    if spec.layout == RopeLayout::Interleaved && spec.dims == spec.head_dim =>
                {
                    projections.interleaved_head = Some(spec.head_dim);
                }
                _ => {}
            }
        }
        Ok(projections)
    }

    fn changes(
        &self,
        config: &LoraConfig,
        stored: &StoredTensors,
        projections: &Projections,
    ) -> Result<BTreeMap<WeightId, LowRank>, CheckpointProblem> {
        let mut changes = BTreeMap::new();
        for (module, pair) in pairs(stored)? {
            let wrong =
                |matrix: &str, why: String| TensorProblem { name: format!("{PREFIX}{module}{matrix}"), why };
            let found = self.projection(module, projections);
            let (id, in_file) = found.map_err(|why| wrong(DOWN, why))?;
            let weight = self.weights().get(id);
            let MatrixPair { down: Some(down), up: Some(up) } = pair else {
                let missing = if pair.down.is_none() { DOWN } else { UP };
                return Err(wrong(missing, "it is missing; the other matrix is there".to_owned()).into());
            };
            let rank = down.matrix.0;
            if !config.mixed_ranks && rank != config.rank {
                let why = format!("it has rank {rank}, and r is {} in {CONFIG}", config.rank);
                return Err(wrong(DOWN, why).into());
            }
            for (matrix, tensor, wanted) in
                [(DOWN, down, (rank, weight.cols())), (UP, up, (weight.rows(), rank))]
            {
                if tensor.matrix != wanted || rank == 0 {
                    let (rows, cols) = tensor.matrix;
                    let why = format!(
                        "it is {rows} x {cols}, and {} needs {} x {}; was the adapter trained for another model?",
                        weight.name(),
                        wanted.0,
                        wanted.1
                    );
                    return Err(wrong(matrix, why).into());
                }
            }
            let down = values(down, stored).map_err(|why| wrong(DOWN, why))?;
            let mut up = values(up, stored).map_err(|why| wrong(UP, why))?;
            let is_rotated = ["attn_q", "attn_k"].iter().any(|part| weight.name().contains(part));
            if let Some(head) =
                projections.interleaved_head.filter(|_| in_file == NamedBy::Gguf && is_rotated)
            {
                up = interleaved(&up, rank, head);
            }
            changes.insert(id, LowRank { rank, scale: config.scale(rank), down, up });
        }
        Ok(changes)
    }

    /// The weight of a module of transformers, and whose name the file has for it.
    fn projection(&self, module: &str, projections: &Projections) -> Result<(WeightId, NamedBy), String> {
        let own = self.weights().find(&format!("{module}.weight")).map(|id| (id, NamedBy::Transformers));
        let gguf = || Some((self.weights().find(&gguf_name(module)?)?, NamedBy::Gguf));
        match own.or_else(gguf) {
            Some(found) if projections.weights.contains(&found.0) => Ok(found),
            Some((id, _)) => Err(format!(
                "{} is no projection of a layer, and only these can be changed by an adapter",
                self.weights().get(id).name()
            )),
            None => Err(format!(
                "the model has no projection {module}; was the adapter trained for another model?"
            )),
        }
    }
}

/// Whose names the tensors of a file have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NamedBy {
    Transformers,
    Gguf,
}

/// `model.layers.3.mlp.up_proj` as `blk.3.ffn_up.weight`.
fn gguf_name(module: &str) -> Option<String> {
    let (layer, projection) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (_, part) = GGUF_PROJECTIONS.iter().find(|(name, _)| *name == projection)?;
    Some(format!("blk.{layer}.{part}.weight"))
}

/// The matrices of each module.
fn pairs(stored: &StoredTensors) -> Result<BTreeMap<&str, MatrixPair<'_>>, CheckpointProblem> {
    let mut pairs: BTreeMap<&str, MatrixPair<'_>> = BTreeMap::new();
    for (name, tensor) in &stored.tensors {
        let own = name.strip_prefix(PREFIX);
        if let Some(module) = own.and_then(|name| name.strip_suffix(DOWN)) {
            pairs.entry(module).or_default().down = Some(tensor);
        } else if let Some(module) = own.and_then(|name| name.strip_suffix(UP)) {
            pairs.entry(module).or_default().up = Some(tensor);
        } else {
            let why = "it is no matrix lora_A or lora_B of a projection, and what else an adapter can have is not \
                       read by this version; merge the adapter into the model and serve that";
            return Err(TensorProblem { name: name.clone(), why: why.to_owned() }.into());
        }
    }
    if pairs.is_empty() {
        let why = "the file has no tensor, so that the adapter changes nothing".to_owned();
        return Err(TensorProblem { name: format!("{PREFIX}*{DOWN}"), why }.into());
    }
    Ok(pairs)
}

/// The values of a matrix as f32.
fn values(tensor: &StoredTensor, stored: &StoredTensors) -> Result<Vec<f32>, String> {
    let StoredTensor { dtype, stored_as, matrix, range } = tensor;
    let dtype = dtype.ok_or_else(|| format!("it is stored as {stored_as}; F32, F16 and BF16 are read"))?;
    let source = Arc::clone(&stored.source);
    let matrix =
        Weight::new("", dtype, *matrix, source, range.clone()).map_err(|problem| problem.to_string())?;
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    for (row, values) in values.chunks_exact_mut(matrix.cols()).enumerate() {
        matrix.dequantise_row(row, values);
    }
    if values.iter().any(|value| !value.is_finite()) {
        return Err("it has a number that is not finite".to_owned());
    }
    Ok(values)
}

/// The rows of each head in the order in which converters store them: the two halves of a head element by
/// element, so that neighbours rotate together.
fn interleaved(up: &[f32], rank: usize, head_dim: usize) -> Vec<f32> {
    let row = |row: usize| &up[row * rank..(row + 1) * rank];
    let rows = (0..up.len() / rank).flat_map(|at| {
        let (head, element) = (at / head_dim, at % head_dim);
        row(head * head_dim + element % 2 * (head_dim / 2) + element / 2)
    });
    rows.copied().collect()
}

#[cfg(test)]
mod tests;
