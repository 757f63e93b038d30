//! `pod.yaml`: what one pod must load. The operator writes it into a ConfigMap, the pod reads it at start.
//!
//! It is a wire type, because operator and pod must agree on it across versions. Unknown keys are refused, so
//! that a field that an older pod would ignore is an error and not a silent difference.

use serde::{Deserialize, Serialize};

use crate::Task;
use crate::yaml::{self, YamlError};

/// Name of the file inside the mounted ConfigMap.
pub const FILE_NAME: &str = "pod.yaml";
/// Name of the file beside it with the cluster's public keys, a JSON Web Key Set.
pub const KEYS_FILE_NAME: &str = "keys.json";

/// The pod's whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodConfig {
    /// The model to load and serve.
    pub model: PodModel,
    /// Engine settings.
    #[serde(default)]
    pub engine: PodEngine,
    /// How long in-flight requests may take to end after SIGTERM, in milliseconds.
    #[serde(default = "default_drain_timeout_ms")]
    pub drain_timeout_ms: u64,
    /// The port on which the operator loads, swaps and unloads versions while the pod runs; none: the pod
    /// serves what it started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<PodAdmin>,
}

/// Who may change what the pod serves. The pod reads this section and the keys again every 30 s, so that
/// keys that rotate need no restart; the port is read at the start alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodAdmin {
    /// The port.
    pub port: u16,
    /// A file with the public keys that tokens are signed with, a JSON Web Key Set. Any of its keys is
    /// accepted.
    pub keys_file: String,
    /// The audience that a token must be made for.
    pub audience: String,
    /// The account that a token must be of: `system:serviceaccount:NAMESPACE:NAME`.
    pub subject: String,
    /// The issuer that a token must have; none: any, as the keys are the cluster's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
}

/// What to load, and the names it answers to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodModel {
    /// Names that callers may use: `namespace/name` first, then the bare name.
    pub names: Vec<String>,
    /// The revision this configuration stands for; echoed in the model's status.
    pub revision: String,
    /// Folder or file with the model, as mounted in the pod; with `fetch` also the address of one elsewhere.
    pub path: String,
    /// How the model is fetched, where `path` is an address such as `hf://org/name`, and its adapters where
    /// theirs are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetch: Option<PodFetch>,
    /// Globs below `path` that pick the model's files; empty picks what the folder holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// Expected sha256, 64 lower-case hex digits, of the file (of several: of their sorted digest lines).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The task that the files must serve; default: the task that the files state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// What the model must answer before it may serve.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub golden_prompts: Vec<PodGoldenPrompt>,
    /// Adapters (LoRA) that callers choose by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<PodAdapter>,
}

/// An adapter of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodAdapter {
    /// The name that callers use.
    pub name: String,
    /// Folder with the adapter as PEFT writes it, as mounted in the pod; also the address of one elsewhere,
    /// which is fetched as `fetch` of the model says.
    pub path: String,
    /// Branch, tag or commit, where `path` is an address that has such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Expected sha256 of the sorted digest lines of its files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// A prompt whose greedy answer begins with a text that is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodGoldenPrompt {
    /// The prompt, used as it is.
    pub prompt: String,
    /// How the answer begins, 1 to 256 bytes.
    pub expect: String,
}

/// Where fetched files go, and what they are fetched with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodFetch {
    /// Folder of the cache, as mounted in the pod. Several pods may share it.
    pub cache_dir: String,
    /// Branch, tag or commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Folder with the credentials, as mounted in the pod: each file is one, by its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_dir: Option<String>,
    /// Size in bytes that the cache does not exceed while it holds files that no pod uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cache_bytes: Option<u64>,
}

/// Settings of the engine; each default is the engine's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodEngine {
    /// `auto` or `cpu`; default `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// `fast` or `exact`; default `fast`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numerics: Option<String>,
    /// `auto`, `f32`, `f16` or `bf16`: the type in which keys and values are cached; default `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<String>,
    /// Longest prompt plus answer, in tokens; default: the smaller of the model's own limit and 8192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<u32>,
    /// Sequences that decode together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_batch_size: Option<u32>,
    /// Requests that may wait for a place in the batch; one more is answered 429.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_queue: Option<u32>,
    /// `time`, `size`, `dynamic` or `priority`: when waiting texts become a step; default `dynamic`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_strategy: Option<String>,
    /// Longest time that a free device waits for more texts to encode, 1 to 1000 ms; default 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_wait_ms: Option<u32>,
    /// Whether the priority class of a request decides its order; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<bool>,
}

fn default_drain_timeout_ms() -> u64 {
    60_000
}

/// Why a `pod.yaml` could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PodConfigError {
    /// The text is not YAML, or a value does not fit.
    #[error("pod.yaml: {0}")]
    Yaml(#[from] YamlError),
    /// A key that this version does not have.
    #[error("pod.yaml: {0}: there is no such key in this version")]
    UnknownKey(String),
    /// The list of names is empty.
    #[error("pod.yaml: model.names is empty: give at least one name")]
    NoName,
}

impl PodConfig {
    /// Parses the text of a `pod.yaml`.
    ///
    /// # Errors
    /// Names the key that is unknown, missing or of the wrong kind.
    pub fn parse(text: &str) -> Result<Self, PodConfigError> {
        let mut unknown = None;
        let config: Result<Self, YamlError> = yaml::read(text, |key| {
            unknown.get_or_insert(key);
        });
        if let Some(key) = unknown {
            return Err(PodConfigError::UnknownKey(key.path()));
        }
        let config = config?;
        if config.model.names.is_empty() {
            return Err(PodConfigError::NoName);
        }
        Ok(config)
    }

    /// The text of this configuration, ending in a newline. `parse` reads it back.
    ///
    /// # Errors
    /// Only if a value cannot be written as YAML, which no value of these types does.
    pub fn to_yaml(&self) -> Result<String, PodConfigError> {
        Ok(yaml::write(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = "model:\n  names: [default/a, a]\n  revision: r1\n  path: /models\n  fetch: {cacheDir: /c, revision: v1, secretDir: /s, maxCacheBytes: 9}\n  files: ['*.gguf']\n  sha256: ab\n  task: embed\n  goldenPrompts: [{prompt: '1 2', expect: ' 3'}]\n  adapters: [{name: sql, path: 'hf://o/sql', revision: v2, sha256: cd}]\nengine: {device: cpu, numerics: exact, kvCache: f16, contextTokens: 64, maxBatchSize: 2, maxQueue: 3, batchStrategy: size, maxWaitMs: 7, priority: true}\ndrainTimeoutMs: 5\nadmin: {port: 9092, keysFile: /c/keys.json, audience: a, subject: s, issuer: i}\n";

    #[test]
    fn what_is_written_is_read_back() {
        let config = PodConfig::parse(FULL).unwrap();
        assert_eq!(config.engine.context_tokens, Some(64));
        assert_eq!(config.engine.kv_cache.as_deref(), Some("f16"));
        assert_eq!(config.admin.as_ref().map(|admin| admin.port), Some(9092));
        assert_eq!(config.model.golden_prompts[0].expect, " 3");
        assert_eq!(config.model.adapters[0].revision.as_deref(), Some("v2"));
        assert_eq!(PodConfig::parse(&config.to_yaml().unwrap()).unwrap(), config);
    }

    #[test]
    fn missing_keys_take_their_defaults() {
        let config = PodConfig::parse("model: {names: [a], revision: r, path: /m}\n").unwrap();
        assert_eq!(config.engine, PodEngine::default());
        assert_eq!(config.drain_timeout_ms, 60_000);
        assert_eq!(config.admin, None);
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = PodConfig::parse("model: {names: [a], revision: r, path: /m, sha: x}\n").unwrap_err();
        assert!(error.to_string().starts_with("pod.yaml: model.sha: there is no such key"), "{error}");
    }

    #[test]
    fn an_unknown_task_is_refused_with_its_path() {
        let error =
            PodConfig::parse("model: {names: [a], revision: r, path: /m, task: dance}\n").unwrap_err();
        assert!(error.to_string().contains("model.task: \"dance\" is not a task"), "{error}");
    }

    #[test]
    fn no_name_is_refused() {
        let error = PodConfig::parse("model: {names: [], revision: r, path: /m}\n").unwrap_err();
        assert!(error.to_string().contains("model.names"), "{error}");
    }
}
