//! Custom resources of `serving.trustformers.dev`, and the CustomResourceDefinitions made from them.
//!
//! The Rust types are the only source: the YAML that users install is generated from them and a test keeps the
//! committed copies fresh. A field is here only once the operator honours it; every list, map and string is
//! bounded, since CEL's cost budget is computed from the bounds; every default is in the schema, so that what the
//! operator works with is what `kubectl get -o yaml` shows.

mod inference_model;
mod quantity;
mod runtime;
mod scheduling;
mod source;
mod status;

pub use inference_model::{
    Disruption, InferenceModel, InferenceModelSpec, MAX_NAME_CHARS, Scaling, Task, Traffic, crd_yaml,
};
pub use quantity::Quantity;
pub use runtime::{
    BatchStrategy, Batching, DEFAULT_MAX_WAIT_MS, Device, EnvVar, Numerics, Resources, Runtime,
};
pub use scheduling::{PodSettings, Toleration, TolerationEffect, TolerationOperator, TopologySpread};
pub use source::Source;
pub use status::{Condition, InferenceModelStatus, Loading, Phase, StableRevision};

/// API group of every resource here.
pub const GROUP: &str = "serving.trustformers.dev";
/// Version that is served and stored.
pub const VERSION: &str = "v1alpha1";
