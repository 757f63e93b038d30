//! How the model is run: device, numerics, sizes, and the container around it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{AdapterSource, Quantity};

/// How the model is run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!has(self.gpus) || self.gpus == 0 || !has(self.device) || self.device != 'cpu'",
    "message": "spec.runtime.gpus: device cpu uses no GPU; set spec.runtime.device to auto, or remove gpus"
}, {
    "rule": "!has(self.gpus) || self.gpus == 0 || !has(self.gpuResource) || !has(self.resources) || !(has(self.resources.limits) && self.gpuResource in self.resources.limits || has(self.resources.requests) && self.gpuResource in self.resources.requests)",
    "message": "spec.runtime.gpus: spec.runtime.resources has a number of spec.runtime.gpuResource too; remove that one"
}]))]
pub struct Runtime {
    /// The device that computes. `auto` uses the best device that the pod finds; `status.device` shows which.
    #[serde(default)]
    pub device: Device,

    /// GPUs of each pod, which the nodes' device plugin offers under `gpuResource`. The pods tolerate the
    /// taint of that name, and a change of the pod ends one before its successor starts. Which device
    /// computes is in `status.device`.
    #[serde(default)]
    #[schemars(range(min = 0, max = 64), extend("format" = "int64"))]
    pub gpus: u32,

    /// Name under which the device plugin of the nodes offers GPUs, such as `amd.com/gpu`.
    #[serde(default = "default_gpu_resource")]
    #[schemars(
        length(min = 3, max = 128),
        regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")
    )]
    pub gpu_resource: String,

    /// `fast` may quantise activations. `exact` computes in f32, with results that do not depend on the
    /// batch.
    #[serde(default)]
    pub numerics: Numerics,

    /// The type in which a model that generates caches keys and values. `bf16` and `f16` take half the memory
    /// of `f32`, and long contexts are faster. `auto`: the type with which the device is fastest, `f32` where
    /// numerics are exact.
    #[serde(default)]
    pub kv_cache: KvCache,

    /// Longest prompt plus response, in tokens. Default: the model's own limit, at most 8192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 1_048_576), extend("format" = "int64"))]
    pub context_tokens: Option<u32>,

    /// Adapters (LoRA) of a model that generates. Callers name one instead of the model, as `MODEL:ADAPTER`
    /// or by its own name where no other model has it. A change is a rollout, as of every setting of the
    /// engine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])
    )]
    pub adapters: Vec<Adapter>,

    /// How requests share the engine.
    #[serde(default)]
    pub batching: Batching,

    /// Image of the pod's container. Default: the runtime image of the operator's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,

    /// Environment variables of the pod's container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])
    )]
    pub env: Vec<EnvVar>,

    /// Requests and limits of the pod's container.
    #[serde(default)]
    pub resources: Resources,
}

fn default_gpu_resource() -> String {
    "nvidia.com/gpu".to_owned()
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            device: Device::default(),
            gpus: 0,
            gpu_resource: default_gpu_resource(),
            numerics: Numerics::default(),
            kv_cache: KvCache::default(),
            context_tokens: None,
            adapters: Vec::new(),
            batching: Batching::default(),
            image: None,
            env: Vec::new(),
            resources: Resources::default(),
        }
    }
}

/// An adapter, as PEFT writes it: `adapter_config.json` and `adapter_model.safetensors`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Adapter {
    /// The name that callers use, at most 63 letters, digits, `-`, `_` and `.`.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-zA-Z0-9]([-._a-zA-Z0-9]*[a-zA-Z0-9])?$"))]
    pub name: String,
    /// Where its files come from.
    pub source: AdapterSource,
}

/// A device that can compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The best device that the pod finds.
    #[default]
    Auto,
    /// The processor.
    Cpu,
}

impl Device {
    /// The name as users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
        }
    }
}

/// How numbers are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// Activations may be quantised.
    #[default]
    Fast,
    /// f32 activations; the same results alone and in a batch.
    Exact,
}

impl Numerics {
    /// The name as users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Exact => "exact",
        }
    }
}

/// The type of a cache of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KvCache {
    /// The type with which the device is fastest; `f32` where numerics are exact.
    #[default]
    Auto,
    /// As they are computed.
    F32,
    /// Half precision: eleven bits, up to 65504.
    F16,
    /// The upper half of an f32: eight bits.
    Bf16,
}

impl KvCache {
    /// The name as users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// How requests share the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Batching {
    /// When queued texts become a batch of an encoder. `dynamic` adapts the wait to the rate of requests and
    /// the time of a step, so that sparse requests never wait. `time` waits for a fixed time, `size` for a
    /// full batch or that time.
    /// `priority` is `dynamic` with priority classes. Generation is batched continuously: it allows only
    /// `dynamic` and `priority`.
    #[serde(default)]
    pub strategy: BatchStrategy,

    /// Sequences that decode together, or texts that are encoded together.
    #[serde(default = "default_max_batch_size")]
    #[schemars(range(min = 1, max = 256), extend("format" = "int64"))]
    pub max_batch_size: u32,

    /// Longest time that an idle pod waits for more texts to encode, in milliseconds. Generation never waits.
    #[serde(default = "default_max_wait_ms")]
    #[schemars(range(min = 1, max = 1000), extend("format" = "int64"))]
    pub max_wait_ms: u32,

    /// Requests, or texts to encode, that may be queued in one pod. Further ones get status 429.
    #[serde(default = "default_max_queue")]
    #[schemars(range(min = 1, max = 65_536), extend("format" = "int64"))]
    pub max_queue: u32,

    /// Whether the priority class of a request (`high`, `normal` or `low`, in the header
    /// `x-trustformers-priority` or the field `priority`) orders the queue, with any strategy.
    #[serde(default)]
    pub priority: bool,
}

/// When queued texts become a batch of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BatchStrategy {
    /// A wait that adapts to the rate of requests and the time of a step.
    #[default]
    Dynamic,
    /// A fixed time from the first text.
    Time,
    /// A full batch, or the end of that time.
    Size,
    /// Like `dynamic`, with priority classes.
    Priority,
}

impl BatchStrategy {
    /// The name as users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Time => "time",
            Self::Size => "size",
            Self::Priority => "priority",
        }
    }
}

/// Default of `maxWaitMs`.
pub const DEFAULT_MAX_WAIT_MS: u32 = 10;

fn default_max_wait_ms() -> u32 {
    DEFAULT_MAX_WAIT_MS
}

fn default_max_batch_size() -> u32 {
    32
}

fn default_max_queue() -> u32 {
    512
}

impl Default for Batching {
    fn default() -> Self {
        Self {
            strategy: BatchStrategy::default(),
            max_batch_size: default_max_batch_size(),
            max_wait_ms: default_max_wait_ms(),
            max_queue: default_max_queue(),
            priority: false,
        }
    }
}

/// One variable of the container's environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnvVar {
    /// Name of the variable.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"))]
    pub name: String,
    /// Its value.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// Requests and limits of the pod's container, as in a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// The most that the container may use.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub limits: BTreeMap<String, Quantity>,
    /// What the scheduler reserves.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub requests: BTreeMap<String, Quantity>,
}
