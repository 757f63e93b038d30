//! Wire types: the gRPC services, generated from `proto/`, the configuration file of a pod, the [`Task`]
//! words that all of them share, and the buckets of users and latencies in reports.

pub mod ab_test;
pub mod bounded_codec;
pub mod buckets;
pub mod latency;
mod outcome;
pub mod pod_config;
mod task;
pub mod yaml;

#[cfg(test)]
mod wire;

pub use task::{Task, UnknownTask};

/// HTTP header, and gRPC metadata key, of a request to a gateway: the model that is meant where the request
/// itself names none. The HTTPRoute of a model sets it.
pub const MODEL_HEADER: &str = "x-trustformers-model";

/// Header of a request to a pod whose answer shall tell the pod's load in its head, and end with trailers
/// that say how it ended.
pub const REPORT_HEADER: &str = "x-trustformers-report-end";

/// Header of such an answer: requests of all gateways that are in flight in the pod, this one included. A
/// gateway knows only its own, and balances better with all of them.
pub const LOAD_HEADER: &str = "x-trustformers-load";

/// Package `trustformers.v1`: what callers of a model see.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("trustformers.v1");
}

/// Package `trustformers.control.v1`: the operator's route feed.
pub mod control {
    /// Version 1 of the feed.
    #[allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        unreachable_pub,
        unused_qualifications,
        reason = "generated code"
    )]
    pub mod v1 {
        tonic::include_proto!("trustformers.control.v1");
    }
}

/// Package `inference`: the Open Inference Protocol of KServe and Triton.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// The encoded `FileDescriptorSet` of all packages, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
