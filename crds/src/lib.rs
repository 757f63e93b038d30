//! Custom resources of `serving.trustformers.dev`, and the CustomResourceDefinitions made from them.
//!
//! The Rust types are the only source: the YAML that users install is generated from them, and a test
//! compares the committed copies. A field is here only if the operator honours it. Every list, map and string
//! is bounded, because the API server computes the cost of CEL rules from the bounds. Every default is in the
//! schema, so that
//! `kubectl get -o yaml` shows the values that the operator uses.

mod ab_test;
mod inference_model;
mod quantity;
mod rollout;
mod runtime;
mod scheduling;
mod source;
mod status;
mod traffic;

pub use ab_test::{
    ABTest, ABTestPhase, ABTestSpec, ABTestStatus, ABTestVerdict, AssignBy, Assignment, Direction,
    ForcedUser, Goal, Guardrail, MAX_VARIANTS, Metric, MetricStatus, ModelRef, OnConclusion, OwnerRange,
    RampStep, SecondaryMetric, StopWhen, TestEpoch, Variant, VariantStatus, ab_test_crd_yaml,
};
pub use inference_model::{
    Disruption, InferenceModel, InferenceModelSpec, MAX_NAME_CHARS, Scaling, crd_yaml,
};
pub use quantity::Quantity;
pub use rollout::{
    Analysis, CandidateRevision, ConsumedCommands, CountedProcess, GoldenPrompt, RetiringRevision, Rollout,
    RolloutDecision, RolloutFailure, RolloutPlacement, RolloutSample, RolloutStatus, RolloutStep,
};
pub use runtime::{
    BatchStrategy, Batching, DEFAULT_MAX_WAIT_MS, Device, EnvVar, KvCache, Numerics, Resources, Runtime,
};
pub use scheduling::{PodSettings, Toleration, TolerationEffect, TolerationOperator, TopologySpread};
pub use source::{ClaimCache, EmptyDirCache, OciAccess, SecretRef, Source, SourceCache};
pub use status::{Condition, InferenceModelStatus, Loading, Phase, StableRevision};
pub use traffic::{CircuitBreaker, HashOn, HealthCheck, Hedge, Hold, LoadBalancing, RetryBudget, Traffic};

/// API group of the resources.
pub const GROUP: &str = "serving.trustformers.dev";
/// Version that is served and stored.
pub const VERSION: &str = "v1alpha1";
