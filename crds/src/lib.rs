//! Custom resources of `serving.trustformers.dev`, and the CustomResourceDefinitions made from them.
//!
//! The Rust types are the only source: the YAML that users install is generated from them, and a test
//! compares the committed copies. A field is here only if the operator honours it. Every list, map and string
//! is bounded, because the API server computes the cost of CEL rules from the bounds. Every default is in the
//! schema, so that
//! `kubectl get -o yaml` shows the values that the operator uses.

pub mod names;

mod ab_test;
mod inference_model;
mod monitoring;
mod network;
mod quantity;
mod rollout;
mod route;
mod runtime;
mod scaling;
mod scheduling;
mod source;
mod status;
mod traffic;

pub use ab_test::{
    ABTest, ABTestPhase, ABTestSpec, ABTestStatus, ABTestVerdict, AssignBy, Assignment, Cost, Direction,
    ForcedUser, Goal, Guardrail, Layer, LookEffect, MAX_VARIANTS, Metric, MetricStatus, ModelRef,
    OnConclusion, OwnerRange, RampStep, SecondaryMetric, ShadowStatus, StopWhen, TestEpoch, TestLook,
    TestShadow, Variant, VariantStatus, ab_test_crd_yaml,
};
pub use inference_model::{Disruption, InferenceModel, InferenceModelSpec, MAX_NAME_CHARS, crd_yaml};
pub use monitoring::Monitoring;
pub use network::{NetworkCallers, NetworkPolicySettings};
pub use quantity::Quantity;
pub use rollout::{
    Analysis, CandidateRevision, ConsumedCommands, CountedProcess, GoldenPrompt, RetiringRevision, Rollout,
    RolloutDecision, RolloutFailure, RolloutPlacement, RolloutSample, RolloutStatus, RolloutStep,
};
pub use route::{GatewayRef, RouteSettings};
pub use runtime::{
    Adapter, BatchStrategy, Batching, DEFAULT_MAX_WAIT_MS, Device, EnvVar, KvCache, Numerics, Resources,
    Runtime,
};
pub use scaling::{Scaling, ScalingBehavior, ScalingMetric, ScalingPace};
pub use scheduling::{PodSettings, Toleration, TolerationEffect, TolerationOperator, TopologySpread};
pub use source::{AdapterSource, ClaimCache, EmptyDirCache, OciAccess, SecretRef, Source, SourceCache};
pub use status::{Condition, InferenceModelStatus, Loading, Phase, StableRevision};
pub use traffic::{
    CircuitBreaker, HashOn, HealthCheck, Hedge, Hold, LoadBalancing, RetryBudget, Traffic, TrafficShadow,
};

/// API group of the resources.
pub const GROUP: &str = "serving.trustformers.dev";
/// Version that is served and stored.
pub const VERSION: &str = "v1alpha1";
