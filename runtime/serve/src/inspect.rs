//! `trustformers-serve inspect`: what a model's files say, and what its cache will take, without serving it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use trustformers_model::{LoadError, Model, Task};

use crate::one_shot::{OutputError, print};

/// Which model, and in which form.
#[derive(Debug, Args)]
pub(crate) struct InspectFlags {
    /// A .gguf file, or the folder of a checkpoint.
    #[arg(value_name = "PATH")]
    pub(crate) model: PathBuf,
    /// Prints one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Why a model was not described.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InspectError {
    /// The model cannot be served; the message names the key, tensor or type.
    #[error(transparent)]
    Model(#[from] Box<LoadError>),
    /// The output is not JSON.
    #[error("the description cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The output could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Description {
    architecture: String,
    task: String,
    name: Option<String>,
    parameters: u64,
    context_tokens: usize,
    vocabulary: usize,
    layers: usize,
    key_value_heads: usize,
    head_elements: usize,
    file_bytes: u64,
    /// For each stored type, how many tensors have it.
    types: BTreeMap<String, usize>,
    begin_token: Option<u32>,
    end_tokens: Vec<u32>,
    has_chat_template: bool,
    /// Of a model that generates.
    cache: Option<CacheDescription>,
    warnings: Vec<String>,
}

/// Memory of keys and values: `layers * 2 * key_value_heads * head_elements` numbers for each token.
#[derive(Debug, Serialize)]
struct CacheDescription {
    numbers_per_token: usize,
    f32_bytes_per_token: usize,
    f16_bytes_per_token: usize,
    /// A whole context in f16 or bf16.
    f16_bytes_per_context: usize,
}

/// Describes the model that the flags name.
pub(crate) fn run(flags: InspectFlags) -> Result<ExitCode, InspectError> {
    let InspectFlags { model, json } = flags;
    let description = describe(&model)?;
    let text = if json { serde_json::to_string_pretty(&description)? + "\n" } else { description.lines() };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Reads and checks the whole model, as a server does before it serves it.
fn describe(path: &Path) -> Result<Description, Box<LoadError>> {
    let model = Model::load(path, &mut |_| {}).map_err(Box::new)?;
    let facts = model.facts();
    let mut types: BTreeMap<String, usize> = BTreeMap::new();
    for (_, weight) in model.weights().iter() {
        *types.entry(weight.dtype().to_string()).or_default() += 1;
    }
    let numbers = facts.layers * 2 * facts.kv_heads * facts.head_dim;
    let cache = (facts.task == Task::Generate).then_some(CacheDescription {
        numbers_per_token: numbers,
        f32_bytes_per_token: numbers * 4,
        f16_bytes_per_token: numbers * 2,
        f16_bytes_per_context: (numbers * 2).saturating_mul(facts.context_tokens),
    });
    Ok(Description {
        architecture: facts.architecture.clone(),
        task: facts.task.to_string(),
        name: facts.name.clone(),
        parameters: facts.parameters,
        context_tokens: facts.context_tokens,
        vocabulary: facts.vocabulary,
        layers: facts.layers,
        key_value_heads: facts.kv_heads,
        head_elements: facts.head_dim,
        file_bytes: facts.file_bytes,
        types,
        begin_token: model.tokenizer().begin_id(),
        end_tokens: model.tokenizer().eos_ids().to_vec(),
        has_chat_template: facts.chat_template.is_some(),
        cache,
        warnings: facts.warnings.clone(),
    })
}

impl Description {
    /// A line for each fact.
    fn lines(&self) -> String {
        let ids = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let types = self.types.iter().map(|(name, count)| format!("{name} x {count}"));
        let mut lines = vec![
            ("architecture", self.architecture.clone()),
            ("task", self.task.clone()),
            ("name", self.name.clone().unwrap_or_else(|| "none".to_owned())),
            ("parameters", self.parameters.to_string()),
            ("context", format!("{} tokens", self.context_tokens)),
            ("vocabulary", format!("{} tokens", self.vocabulary)),
            (
                "layers",
                format!(
                    "{}, each with {} key/value heads of {}",
                    self.layers, self.key_value_heads, self.head_elements
                ),
            ),
            ("weights", format!("{} bytes; {}", self.file_bytes, types.collect::<Vec<_>>().join(", "))),
            ("begin token", self.begin_token.map_or_else(|| "none".to_owned(), |id| id.to_string())),
            ("end tokens", ids(&self.end_tokens)),
            ("chat template", if self.has_chat_template { "yes" } else { "no" }.to_owned()),
        ];
        if let Some(cache) = &self.cache {
            let CacheDescription { f32_bytes_per_token, f16_bytes_per_token, f16_bytes_per_context, .. } =
                cache;
            lines.push((
                "cache",
                format!(
                    "{f16_bytes_per_token} bytes a token in f16 or bf16 ({f16_bytes_per_context} for a whole \
                     context), {f32_bytes_per_token} in f32"
                ),
            ));
        }
        lines.extend(self.warnings.iter().map(|warning| ("warning", warning.clone())));
        lines.into_iter().map(|(name, text)| format!("{name:<14}{text}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_model::seeded::SeededModel;

    #[test]
    fn a_model_is_described_without_serving_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, SeededModel::default().gguf()).unwrap();
        let description = describe(&path).unwrap();
        let lines = description.lines();
        assert!(lines.contains("architecture  llama\n"), "{lines}");
        assert!(lines.contains("layers        2, each with 2 key/value heads of 16\n"), "{lines}");
        // Two layers, keys and values, two heads of 16 elements.
        let cache = description.cache.unwrap();
        assert_eq!((cache.numbers_per_token, cache.f16_bytes_per_context), (128, 128 * 2 * 256));
        assert_eq!(description.types.keys().collect::<Vec<_>>(), ["F32"]);
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let key = ("llama.clamp", trustformers_model::gguf::GgufValue::F32(1.0));
        std::fs::write(&path, SeededModel::default().gguf_with(&[key])).unwrap();
        let error = describe(&path).unwrap_err().to_string();
        assert!(error.contains("key llama.clamp is not part of the llama architecture"), "{error}");
    }
}
